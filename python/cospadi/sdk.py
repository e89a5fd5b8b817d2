"""Where the installed package keeps its C++ and C files; needs the standard library alone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from cospadi.errors import InputError

__all__ = ["cmake_dir", "include_dir", "onnx_library"]


def cmake_dir() -> Path:
    """Return the folder with ``cospadiConfig.cmake``, for ``cmake -Dcospadi_DIR=...``.

    Raises
    ------
    InputError
        If the package was installed without its C++ files.
    """
    return _folder("cmake", "cospadiConfig.cmake")


def include_dir() -> Path:
    """Return the folder that C++ and C programs include ``cospadi/...`` from; errors as `cmake_dir`."""
    return _folder("include", "cospadi/c_api.h")


def onnx_library() -> Path:
    """Return the operator library for ONNX Runtime's ``register_custom_ops_library``; errors as `cmake_dir`."""
    name = "libcospadi_onnx.so"
    return _folder("lib", name) / name


def _folder(name: str, file: str) -> Path:
    # An editable installation leaves Python files in the source tree and puts what CMake built beside
    # the extension; finding the extension does not load it.
    spec = find_spec("cospadi._C")
    origin = __file__ if spec is None or spec.origin is None else spec.origin
    folder = Path(origin).resolve().parent / name
    if not (folder / file).is_file():
        raise InputError(
            f"{folder / file}: missing: this installation of cospadi has no C++ files; install the wheel"
        )
    return folder
