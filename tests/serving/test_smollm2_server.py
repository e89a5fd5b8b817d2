"""A compressed SmolLM2, served by vLLM's OpenAI-compatible server, says what transformers says."""

from __future__ import annotations

import pytest
import torch

import cospadi
from cospadi.calibration.data import builtin_text

pytestmark = [pytest.mark.slow, pytest.mark.real_model]

N_TOKENS = 16


def prompts_of(tokenizer) -> list[list[int]]:
    """Fifty prompts of ten lengths from a text that was not used for calibration."""
    ids = tokenizer(builtin_text("evaluation")[:20_000]).input_ids
    prompts = [ids[60 * i : 60 * i + 5 + 3 * (i % 10)] for i in range(50)]
    assert len(prompts[-1]) == 32
    return prompts


def greedy_tokens(model, prompts, n_tokens) -> list[list[int]]:
    """Return the continuations by transformers; prompts of one length go together, without padding."""
    result: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        chosen = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[i] for i in chosen])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        result |= dict(zip(chosen, out[:, length:].tolist(), strict=True))
    return [result[i] for i in range(len(prompts))]


@pytest.mark.parametrize("kind", ["plain", "shared", "int8"])
def test_same_greedy_tokens(serve, compressed_smollm2, kind):
    folder = compressed_smollm2(kind)
    server = serve(
        folder, "--enforce-eager"
    )  # compiling takes minutes; test_tiny_engine.py does it
    model, tokenizer = cospadi.load(folder, dtype=torch.float32)
    prompts = prompts_of(tokenizer)
    expected = greedy_tokens(model, prompts, N_TOKENS)
    assert len({tuple(row) for row in expected}) > 40  # not one answer to everything
    assert server.wait().greedy(prompts, N_TOKENS) == expected
