"""Greedy generation against transformers' own."""

from __future__ import annotations

import pytest
import torch

from cospadi.errors import CospadiError, InputError
from cospadi.evaluation.generation import generate_text
from tiny_models import CONTEXT, make_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_equals_greedy_generate(family, tiny_tokenizer):
    model = make_model(family)
    text, speed = generate_text(model, tiny_tokenizer, "The value of", 20)
    encoded = tiny_tokenizer("The value of", return_tensors="pt")
    wanted = model.generate(**encoded, max_new_tokens=20, do_sample=False)
    new_ids = wanted[0, encoded["input_ids"].shape[1] :]
    assert text == tiny_tokenizer.decode(new_ids, skip_special_tokens=True)
    assert speed > 0


def test_stops_at_the_end_token(tiny_tokenizer):
    model = make_model("llama")
    model.lm_head.weight.data.zero_()  # all logits equal: the first token wins
    calls = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    text, speed = generate_text(model, tiny_tokenizer, "a", 5)
    assert len(calls) == 5
    calls.clear()
    model.generation_config.eos_token_id = [0, 7]
    text, speed = generate_text(model, tiny_tokenizer, "a", 5)
    assert (text, speed, len(calls)) == ("", 0.0, 1)


def test_one_token_needs_no_decode_step(tiny_tokenizer):
    _, speed = generate_text(make_model("llama"), tiny_tokenizer, "a", 1)
    assert speed == 0.0


def test_errors(tiny_tokenizer):
    model = make_model("llama")
    with pytest.raises(InputError, match="needs a tokenizer"):
        generate_text(model, None, "text", 3)
    with pytest.raises(InputError, match="prompt is empty"):
        generate_text(model, tiny_tokenizer, "", 5)
    with pytest.raises(InputError, match="max_new_tokens"):
        generate_text(model, tiny_tokenizer, "a", 0)
    with pytest.raises(InputError, match="context"):
        generate_text(model, tiny_tokenizer, "a", CONTEXT)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(CospadiError, match="non-finite logits at new token 0"):
        generate_text(model, tiny_tokenizer, "a", 5)
