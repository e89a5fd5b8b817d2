"""What this build and this machine can do."""

from __future__ import annotations

from typing import Any

from cospadi import _C
from cospadi.native.support import native_errors


def runtime_info() -> dict[str, Any]:
    """Describe this build and this machine.

    Returns
    -------
    dict
        ``version``, ``isa`` (in use), ``available_isas``, ``cuda_built``, ``cuda_devices``, ``openmp`` (default
        thread count).

    Raises
    ------
    InputError
        If the environment variable ``COSPADI_ISA`` names an instruction set that is not available here.
    """
    with native_errors("runtime_info"):
        return {
            "version": _C.version(),
            "isa": _C.isa_name(),
            "available_isas": _C.available_isas(),
            "cuda_built": _C.cuda_built(),
            "cuda_devices": _C.cuda_device_count(),
            "openmp": _C.default_thread_count(),
        }
