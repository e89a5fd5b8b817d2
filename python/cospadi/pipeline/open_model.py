"""Open any model the tool can work with, dense or compressed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cospadi.checkpoint.export import export_dense, save_dense
from cospadi.checkpoint.format import CONFIG_KEY, QUANT_METHOD
from cospadi.checkpoint.load import load
from cospadi.errors import InputError
from cospadi.factor import STORAGE_DTYPES
from cospadi.model.source import open_source


def is_compressed(path: str | Path) -> bool:
    """Whether ``path`` is a folder whose config names our quantisation method."""
    config = Path(path) / "config.json"
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    section = data.get(CONFIG_KEY) if isinstance(data, dict) else None
    return isinstance(section, dict) and section.get("quant_method") == QUANT_METHOD


def open_model(path: str | Path, *, dtype: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Model in eval mode, and its tokenizer.

    Parameters
    ----------
    path : str or Path
        Compressed directory, Hugging Face folder, hub id, or GGUF file.
    dtype : {"bfloat16", "float16", "float32"}, optional
        Compute type; as stored (compressed) or float32 (dense) by default.

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
    source = open_source(path)
    if wanted not in (None, torch.float32):
        source.model.to(wanted)
    return source.model, source.tokenizer


def export_model(path: str | Path, out_dir: str | Path, *, dtype: str = "bfloat16") -> None:
    """Write any model as an ordinary dense Hugging Face folder.

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
    source = open_source(path)
    save_dense(source.model, source.tokenizer, out_dir, STORAGE_DTYPES[dtype])
