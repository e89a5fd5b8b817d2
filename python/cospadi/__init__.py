"""cospadi: calibration-guided sparse dictionary compression of large language models.

The public names are loaded on first use, so that ``import cospadi`` costs milliseconds and imports neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cospadi.checkpoint.load import load
    from cospadi.errors import CospadiError
    from cospadi.factor import FactorSpec, SparseFactor
    from cospadi.pipeline.compress import compress

__version__ = "0.1.0"

_EXPORTS = {
    "CospadiError": "cospadi.errors",
    "FactorSpec": "cospadi.factor",
    "SparseFactor": "cospadi.factor",
    "compress": "cospadi.pipeline.compress",
    "load": "cospadi.checkpoint.load",
}

__all__ = ["CospadiError", "FactorSpec", "SparseFactor", "__version__", "compress", "load"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name on first use (PEP 562)."""
    try:
        module = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module 'cospadi' has no attribute {name!r}") from None
    return getattr(import_module(module), name)
