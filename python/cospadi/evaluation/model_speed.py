"""Tokens per second of a compressed model and of its dense self, in one process, in turn."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cospadi.checkpoint.load import load
from cospadi.errors import InputError
from cospadi.evaluation.timing import Timing, summarise
from cospadi.model.layers import compressed_modules
from cospadi.native.support import torch_threads


@dataclass(frozen=True)
class ModelSpeed:
    """One of the two models.

    Attributes
    ----------
    variant : str
        "compressed" or "dense".
    linear_bytes : int
        Of the linears that are compressed in the former; dense ones have two bytes per weight.
    prefill : Timing
        Seconds for a whole prompt.
    decode : Timing
        Seconds for one token behind it.
    prompt_tokens : int
        Length of the prompt.
    """

    variant: str
    linear_bytes: int
    prefill: Timing
    decode: Timing
    prompt_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, by the median."""
        return 1.0 / self.decode.median

    @property
    def prompt_tokens_per_second(self) -> float:
        """Tokens of the prompt per second, by the median."""
        return self.prompt_tokens / self.prefill.median

    def as_json(self) -> dict[str, Any]:
        """Return the fields and the rates."""
        return asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
        }


def measure_models(
    path: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    repeats: int = 5,
    threads: int = 1,
) -> tuple[ModelSpeed, ModelSpeed]:
    """Time prefill and greedy decoding, batch 1, bfloat16, of a checkpoint and of the dense model it stands for.

    Parameters
    ----------
    path : str or Path
        Compressed checkpoint.
    prompt_tokens, new_tokens : int
        Lengths; the tokens of the prompt are random.
    repeats : int
        Rounds; the two models take turns.
    threads : int
        Threads of both.

    Returns
    -------
    (compressed, dense)

    Raises
    ------
    InputError
        Lengths below 1, or beyond the model's context.
    CheckpointError
        The checkpoint cannot be loaded.

    Notes
    -----
    Times are of the wall clock: much of a token's time is not spent in linears.
    """
    if prompt_tokens < 1 or new_tokens < 1 or repeats < 1:
        raise InputError("prompt, new tokens and repeats: expected at least 1 of each")
    compressed, _ = load(path, dtype=torch.bfloat16)
    context = getattr(compressed.config, "max_position_embeddings", None)
    if isinstance(context, int) and prompt_tokens + new_tokens > context:
        raise InputError(
            f"{prompt_tokens} tokens and {new_tokens} new ones exceed the model's context of {context}"
        )
    specs = [layer.spec for layer in compressed_modules(compressed).values()]
    linear_bytes = {
        "compressed": sum(spec.stored_bytes for spec in specs),
        "dense": sum(2 * spec.d_in * spec.d_out for spec in specs),
    }
    dense, _ = load(path, dtype=torch.bfloat16)
    models = {"compressed": compressed, "dense": dense.dequantize(torch.bfloat16)}
    generator = torch.Generator().manual_seed(0)
    vocabulary = compressed.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator)
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode(), torch_threads(threads):
        for round_number in range(repeats + 1):  # the first one warms up
            for name, model in models.items():
                first, steps = _generate(model.eval(), ids, new_tokens)
                if round_number > 0:
                    prefill[name].append(first)
                    decode[name] += steps
    both = [
        ModelSpeed(
            name,
            linear_bytes[name],
            summarise(prefill[name], "wall"),
            summarise(decode[name], "wall"),
            prompt_tokens,
        )
        for name in models
    ]
    return both[0], both[1]


def _generate(
    model: Any,  # noqa: ANN401
    ids: torch.Tensor,
    new_tokens: int,
) -> tuple[float, list[float]]:
    """Return the seconds of the prompt and of every token behind it."""
    start = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prompt_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(new_tokens):
        start = time.perf_counter()
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return prompt_seconds, seconds
