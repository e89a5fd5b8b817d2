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
    from cospadi.factor.sparse_factor import SparseFactor
    from cospadi.factor.spec import FactorSpec
    from cospadi.pipeline.compress import compress
    from cospadi.sparse_coding import ksvd, omp
    from cospadi.sparse_dictionary import SparseDictionary

__version__ = "0.1.0"

_EXPORTS = {
    "CospadiError": "cospadi.errors",
    "FactorSpec": "cospadi.factor.spec",
    "SparseDictionary": "cospadi.sparse_dictionary",
    "SparseFactor": "cospadi.factor.sparse_factor",
    "compress": "cospadi.pipeline.compress",
    "ksvd": "cospadi.sparse_coding",
    "load": "cospadi.checkpoint.load",
    "omp": "cospadi.sparse_coding",
}

__all__ = [
    "CospadiError",
    "FactorSpec",
    "SparseDictionary",
    "SparseFactor",
    "__version__",
    "compress",
    "ksvd",
    "load",
    "omp",
]


def __dir__() -> list[str]:
    """Public names first of all, for completion in a shell."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name on first use (PEP 562)."""
    try:
        module = _EXPORTS[name]
    except KeyError:
        raise AttributeError(f"module 'cospadi' has no attribute {name!r}") from None
    return getattr(import_module(module), name)
