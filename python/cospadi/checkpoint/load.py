"""Loading a compressed checkpoint as a transformers model, without trusting what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cospadi.checkpoint.hazards import check_hazards
from cospadi.checkpoint.reader import CompressedCheckpoint, read_checkpoint
from cospadi.checkpoint.strict_json import brief_text
from cospadi.errors import CheckpointError, CospadiError, CudaUnavailableError, InputError, brief
from cospadi.model.files import vocabulary_file


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Load a compressed model and its tokenizer from a folder.

    Parameters
    ----------
    path : str or Path
        A folder written by ``cospadi compress``.
    dtype : torch.dtype, optional
        bfloat16, float16 or float32; by default the type that config.json names.
    device : torch.device or str
        Where the model goes.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode; its compressed layers compute with the native kernel.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        None if the folder has no tokenizer files.

    Raises
    ------
    CheckpointError
        If the folder is not a complete, consistent compressed checkpoint.
    InputError
        If `dtype` is none of the three or `device` is no device name.
    CudaUnavailableError
        If `device` is a CUDA device and torch finds none.
    """
    target = _checked_device(device)
    checkpoint = read_checkpoint(path)
    check_hazards(checkpoint)
    # Late: this module must not cost transformers' import time, and registers the method there.
    import cospadi.hf  # noqa: F401

    model = _load_model(checkpoint, dtype)
    return model.to(target), _load_tokenizer(checkpoint.path)


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: torch knows no device {brief(device)}") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise CudaUnavailableError("device: torch finds no CUDA device here; use device='cpu'")
    return target


def _load_model(checkpoint: CompressedCheckpoint, dtype: torch.dtype | None) -> Any:  # noqa: ANN401
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype="auto" if dtype is None else dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except CheckpointError as error:
        # Layers know their names, not where they lie.
        if str(checkpoint.path) in str(error):
            raise
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    except CospadiError:
        raise
    # An inconsistent config.json fails in model code with any exception whatever.
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.path}: transformers cannot build the model of config.json "
            f"({type(error).__name__}: {brief_text(_first_line(error))})"
        ) from error
    for key, problem in (
        ("missing_keys", "missing, it would be random"),
        ("mismatched_keys", "of another shape than the model needs"),
        ("unexpected_keys", "without a place in the model of config.json"),
    ):
        for name in sorted(map(str, info.get(key) or ())):
            raise CheckpointError(f"{checkpoint.path}: tensor {brief_text(name)} is {problem}")
    return model


def _load_tokenizer(folder: Path) -> Any:  # noqa: ANN401
    if vocabulary_file(folder) is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load the tokenizer "
            f"({type(error).__name__}: {brief_text(_first_line(error))})"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
