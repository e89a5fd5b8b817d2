"""Greedy generation with the speed of decoding."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cospadi.calibration.ids import check_ids
from cospadi.errors import CospadiError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: str,
    max_new_tokens: int,
) -> tuple[str, float]:
    """Continue a prompt greedily, batch 1, with a key-value cache.

    Parameters
    ----------
    model, tokenizer
        Causal language model and its tokenizer.
    prompt
        Text to continue; no chat template is applied.
    max_new_tokens
        Tokens to generate at most; an end-of-sequence token ends earlier and is not part of the text.

    Returns
    -------
    text, tokens_per_second
        The continuation without the prompt, and the number of decode steps per second. The first token comes from
        the prefill, which is not timed; with no decode step the speed is 0.0.

    Raises
    ------
    InputError
        There is no tokenizer, the prompt is empty, or prompt and new tokens exceed the model's context.
    CospadiError
        The model gives non-finite logits.
    """
    if tokenizer is None:
        raise InputError("generation needs a tokenizer, the model came without one")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    device = next(model.parameters()).device
    prompt_ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    if not prompt_ids:
        raise InputError("the prompt is empty: it gives no token")
    ids = torch.tensor([prompt_ids], dtype=torch.int64, device=device)
    check_ids(model, ids, length=len(prompt_ids) + max_new_tokens)
    ends = _end_tokens(model, tokenizer)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            new_ids, steps, seconds = _decode(model, ids, max_new_tokens, ends)
    finally:
        model.train(was_training)
    text = str(tokenizer.decode(new_ids, skip_special_tokens=True))
    return text, steps / seconds if steps else 0.0


def _decode(
    model: PreTrainedModel, ids: Tensor, max_new_tokens: int, ends: set[int]
) -> tuple[list[int], int, float]:
    """Return the new tokens, the number of decode steps and their duration in seconds."""
    output: Any = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    new_ids: list[int] = []
    steps = 0
    started = time.perf_counter()
    while True:
        token = _best(output.logits[0, -1], len(new_ids))
        if token in ends:
            break
        new_ids.append(token)
        if len(new_ids) == max_new_tokens:
            break
        step_input = torch.tensor([[token]], dtype=torch.int64, device=ids.device)
        output = model(input_ids=step_input, past_key_values=output.past_key_values, use_cache=True)
        steps += 1
    return new_ids, steps, time.perf_counter() - started


def _best(logits: Tensor, position: int) -> int:
    value, token = logits.max(dim=-1)
    if not torch.isfinite(value):
        raise CospadiError(f"the model gives non-finite logits at new token {position}")
    return int(token)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends: set[int] = set()
    for owner in (getattr(model, "generation_config", None), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        if isinstance(value, int):
            ends.add(value)
        elif isinstance(value, (list, tuple)):
            ends.update(int(v) for v in value)
    return ends
