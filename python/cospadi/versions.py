"""Versions that a result depends on."""

from __future__ import annotations

import platform

import torch

from cospadi import __version__


def versions() -> dict[str, str]:
    """Versions of cospadi, torch, transformers and Python."""
    import transformers

    return {
        "cospadi": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
