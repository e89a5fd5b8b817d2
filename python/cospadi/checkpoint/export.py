"""Multiplying a compressed checkpoint out into an ordinary model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cospadi.checkpoint.atomic import check_vacant, new_folder
from cospadi.checkpoint.format import CONFIG_KEY
from cospadi.checkpoint.load import load
from cospadi.checkpoint.writer import hold_config, save_model, stored_state
from cospadi.factor.spec import dtype_name


def export_dense(
    path: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write the dense model that a compressed checkpoint stands for.

    The result has no trace of the compression: ordinary layers (GPT-2's ``Conv1D`` included), tied
    weights kept, no ``quantization_config``. Any software that reads model folders takes it.

    Parameters
    ----------
    path : str or Path
        The compressed checkpoint.
    out_dir : str or Path
        Must not exist or be an empty folder.
    dtype : torch.dtype
        Storage type; weights are multiplied out in float32 first.
    max_shard_size : int or str
        As in ``save_pretrained``.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be loaded.
    InputError
        If the folder is taken or unwritable.
    """
    check_vacant(out_dir)
    model, tokenizer = load(path, dtype=torch.float32)
    model = model.dequantize(torch.float32)
    return save_dense(model, tokenizer, out_dir, dtype, max_shard_size)


def save_dense(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    out_dir: str | Path,
    dtype: torch.dtype,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model without compressed layers, completely or not at all.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its tensors are not changed.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        Written beside the model; None writes none.
    out_dir, dtype, max_shard_size
        As for `export_dense`.

    Raises
    ------
    InputError
        If the folder is taken or unwritable.
    """
    with new_folder(out_dir) as folder:
        save_model(model, stored_state(model, None, dtype), folder, max_shard_size)
        hold_config(folder, {"dtype": dtype_name(dtype), CONFIG_KEY: None})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(out_dir)
