"""Token ids: hashing, reading from safetensors, checking against a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.errors import InputError
from cospadi.model.discover import input_embeddings


def ids_sha256(ids: Tensor) -> str:
    """Return the hex SHA-256 of token ids as little-endian int64 in row-major order, without the shape."""
    values = ids.detach().to(device="cpu", dtype=torch.int64).contiguous().numpy()
    return hashlib.sha256(values.astype("<i8", copy=False).tobytes()).hexdigest()


def read_ids(path: Path, names: Sequence[str]) -> Tensor:
    """Read token ids from a safetensors file.

    Parameters
    ----------
    path
        The file.
    names
        Tensor names to look for, in this order; with none of them, the file's only tensor is taken.

    Returns
    -------
    Tensor
        int64, in its stored shape.

    Raises
    ------
    InputError
        The file is damaged, has several tensors and none of `names`, or the tensor holds no integers.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            keys = list(stored.keys())
            name = next((n for n in names if n in keys), keys[0] if len(keys) == 1 else None)
            if name is None:
                wanted = " or ".join(repr(n) for n in names)
                raise InputError(
                    f"{path.name} needs a tensor named {wanted}, got {sorted(keys)[:8]}"
                )
            ids: Tensor = stored.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path.name} is not a readable safetensors file: {error}") from error
    if (
        ids.is_floating_point()
        or ids.is_complex()
        or ids.dtype == torch.bool
        or ids.ndim not in (1, 2)
    ):
        raise InputError(
            f"{path.name}: the tensor {name!r} must hold integer token ids in one or two dimensions, "
            f"got {ids.dtype} {list(ids.shape)}"
        )
    return ids.to(torch.int64)


def check_ids(model: nn.Module, ids: Tensor, *, length: int) -> None:
    """Check that token ids fit the model's vocabulary, and a sequence length its context.

    Raises
    ------
    InputError
        The ids are no integers, are outside the vocabulary, or `length` exceeds ``max_position_embeddings``.
    """
    if ids.dtype not in (torch.int64, torch.int32) or ids.numel() == 0:
        raise InputError(
            f"token ids must be a non-empty integer tensor, got {ids.dtype} {list(ids.shape)}"
        )
    weight = getattr(input_embeddings(model), "weight", None)
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or (weight is not None and high >= weight.shape[0]):
        vocabulary = "0 or more" if weight is None else f"0 to {weight.shape[0] - 1}"
        raise InputError(
            f"token ids {low} to {high} do not fit the model's vocabulary ({vocabulary}): "
            "wrong tokenizer or ids file"
        )
    check_length(model, length)


def check_length(model: nn.Module, length: int) -> None:
    """Raise InputError if sequences of so many tokens exceed ``max_position_embeddings`` of the model."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text_config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise InputError(
            f"sequences of {length} tokens exceed the model's context of {limit}: choose at most that "
            "(sequence_length of calibration, context of eval)"
        )
