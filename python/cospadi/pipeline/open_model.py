"""Open any model the tool can work with, dense or compressed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cospadi.checkpoint.export import export_dense, save_dense
from cospadi.checkpoint.format import CONFIG_KEY, QUANT_METHOD
from cospadi.checkpoint.load import load
from cospadi.errors import InputError
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.model.files import check_tokenizer_files
from cospadi.model.source import SourceModel, open_source


def is_compressed(path: str | Path) -> bool:
    """Whether ``path`` is a folder whose config names our quantisation method."""
    config = Path(path) / "config.json"
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    section = data.get(CONFIG_KEY) if isinstance(data, dict) else None
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD


def require_tokenizer(path: str | Path) -> None:
    """Refuse a compressed directory without a tokenizer, which opens nevertheless.

    Raises
    ------
    InputError
        It has none. A dense model without one is refused when it is opened.
    """
    if is_compressed(path):
        check_tokenizer_files(Path(path))


def open_model(
    path: str | Path, *, dtype: str | None = None, warn: Callable[[str], None] | None = None
) -> tuple[PreTrainedModel, Any]:
    """Model in eval mode, and its tokenizer.

    Parameters
    ----------
    path : str or Path
        Compressed directory, Hugging Face folder, hub id, or GGUF file.
    dtype : {"bfloat16", "float16", "float32"}, optional
        Compute type; as stored (compressed) or float32 (dense) by default.
    warn : callable, optional
        Receives each of `SourceModel.notes` of a dense model.

    Raises
    ------
    InputError
        Unknown dtype, or the model cannot be opened.
    """
    if dtype is not None and dtype not in STORAGE_DTYPES:
        raise InputError(f"--dtype: expected one of {', '.join(STORAGE_DTYPES)}, got {dtype!r}")
    wanted = STORAGE_DTYPES[dtype] if dtype is not None else None
    if is_compressed(path):
        model, tokenizer = load(path, dtype=wanted)
        return model, tokenizer
    source = _open_dense(path, warn)
    if wanted not in (None, torch.float32):
        source.model.to(wanted)
    return source.model, source.tokenizer


def export_model(
    path: str | Path,
    out_dir: str | Path,
    *,
    dtype: str = "bfloat16",
    warn: Callable[[str], None] | None = None,
) -> None:
    """Write any model as an ordinary dense Hugging Face folder; `warn` as for `open_model`.

    Raises
    ------
    InputError
        Unknown dtype, a model that cannot be opened, or an output that holds something.
    """
    if dtype not in STORAGE_DTYPES:
        raise InputError(f"--dtype: expected one of {', '.join(STORAGE_DTYPES)}, got {dtype!r}")
    if is_compressed(path):
        export_dense(path, out_dir, STORAGE_DTYPES[dtype])
        return
    source = _open_dense(path, warn)
    if warn is not None:
        warn(f"{path}: is not compressed; its weights are copied as {dtype}")
    save_dense(source.model, source.tokenizer, out_dir, STORAGE_DTYPES[dtype])


def _open_dense(path: str | Path, warn: Callable[[str], None] | None) -> SourceModel:
    source = open_source(path)
    if warn is not None:
        for note in source.notes:
            warn(note)
    return source
