"""Perplexity against the obvious computation, its protocol, and its errors."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cospadi.calibration.data import builtin_text
from cospadi.calibration.ids import ids_sha256
from cospadi.errors import CospadiError, InputError
from cospadi.evaluation.perplexity import evaluate_perplexity, tokenize_text
from tiny_models import CONTEXT, VOCABULARY, make_model


def token_ids(n, seed=0):
    return torch.randint(2, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def window_nll(model, window):
    """Mean loss of one window by transformers' own loss."""
    with torch.no_grad():
        return model(input_ids=window[None], labels=window[None]).loss.item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_equals_the_models_own_loss_on_each_window(family):
    model = make_model(family)
    ids = token_ids(5 * 40 + 17)
    result = evaluate_perplexity(model, ids, context=40)
    losses = [window_nll(model, ids[i * 40 : (i + 1) * 40]) for i in range(5)]
    assert result.window_nll == pytest.approx(losses, rel=1e-6)
    assert result.nll_per_token == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert (result.windows, result.context, result.tokens) == (5, 40, 5 * 39)
    assert result.ids_sha256 == ids_sha256(ids)
    assert result.dtype == "float32"
    assert result.versions["torch"] == torch.__version__


def test_loss_in_pieces_equals_the_whole(monkeypatch):
    model = make_model("llama")
    ids = token_ids(CONTEXT)
    whole = evaluate_perplexity(model, ids, context=CONTEXT).nll_per_token
    monkeypatch.setattr("cospadi.evaluation.perplexity._LOSS_ROWS", 13)
    assert evaluate_perplexity(model, ids, context=CONTEXT).nll_per_token == pytest.approx(
        whole, rel=1e-7
    )


class LargeVocabulary(nn.Module):
    """Returns fixed logits over 49152 tokens, one of which stands out."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.logits = nn.Parameter(torch.randn(1, 64, 49152, generator=generator) * 3)
        self.logits.data[..., 0] += 10

    def forward(self, input_ids, use_cache):  # noqa: D102
        return SimpleNamespace(logits=self.logits)


def test_loss_is_as_exact_as_fp32_logits_allow():
    # F.cross_entropy in fp32 is off by 1e-6 to 5e-5 here
    model = LargeVocabulary()
    ids = torch.randint(49152, (64,), generator=torch.Generator().manual_seed(1))
    wanted = nn.functional.cross_entropy(model.logits[0, :-1].double(), ids[1:]).item()
    found = evaluate_perplexity(model, ids, context=64).nll_per_token
    assert found == pytest.approx(wanted, abs=2e-7)


def test_windows_and_batches():
    model = make_model("llama")
    ids = token_ids(7 * 16 + 3)
    progress = []
    part = evaluate_perplexity(
        model, ids, context=16, windows=5, batch_size=2, progress=lambda *a: progress.append(a)
    )
    assert progress == [(2, 5), (4, 5), (5, 5)]
    everything = evaluate_perplexity(model, ids, context=16)
    assert everything.windows == 7
    assert part.window_nll == pytest.approx(everything.window_nll[:5], rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    model = make_model("llama")
    model.lm_head.weight.data.zero_()
    result = evaluate_perplexity(model, token_ids(64), context=32)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_mode_is_restored_and_dropout_is_off():
    model = make_model("gpt2").train()
    results = {evaluate_perplexity(model, token_ids(64), context=32).perplexity for _ in range(2)}
    assert len(results) == 1
    assert model.training


def test_result_is_plain_json():
    result = evaluate_perplexity(make_model("llama"), token_ids(64), context=32)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    for key in ("perplexity", "nll_per_token", "windows", "tokens", "context", "ids_sha256"):
        assert data[key] == getattr(result, key)
    assert len(data["window_nll"]) == 2


def test_half_precision_loss_is_computed_in_fp32():
    model = make_model("llama").bfloat16()
    ids = token_ids(CONTEXT)
    result = evaluate_perplexity(model, ids, context=CONTEXT)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    wanted = nn.functional.cross_entropy(logits, ids[1:]).item()
    assert result.nll_per_token == pytest.approx(wanted, rel=1e-6)
    assert result.dtype == "bfloat16"


def test_non_finite_window_is_named():
    model = make_model("llama")
    calls = []

    def poison(_module, _args, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else output

    model.lm_head.register_forward_hook(poison)
    with pytest.raises(CospadiError, match="window 2 is nan") as caught:
        evaluate_perplexity(model, token_ids(100), context=20)
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("ids", "arguments", "match"),
    [
        (token_ids(15), {"context": 16}, "15 tokens do not fill one window of 16"),
        (token_ids(40), {"context": 16, "windows": 3}, "make 2 windows of 16, 3 were asked"),
        (token_ids(40), {"context": 1}, "context must be"),
        (token_ids(40), {"context": 16, "windows": 0}, "windows must be"),
        (token_ids(40), {"context": 16, "batch_size": 0}, "batch_size must be"),
        (token_ids(40)[None], {"context": 16}, "one dimension"),
        (token_ids(400), {"context": CONTEXT + 1}, "exceed the model's context"),
        (torch.full((40,), VOCABULARY), {"context": 16}, "vocabulary"),
    ],
)
def test_bad_input(ids, arguments, match):
    with pytest.raises(InputError, match=match):
        evaluate_perplexity(make_model("llama"), ids, **arguments)


def test_sources_of_text(tmp_path, tiny_tokenizer, tiny_tokenizer_bos):
    def encoded(text):
        return tiny_tokenizer(text)["input_ids"]

    plain = tmp_path / "a.txt"
    plain.write_bytes(b"one\r\n\n two \n")
    assert tokenize_text(tiny_tokenizer, plain).tolist() == encoded("one\r\n\n two \n")
    assert tokenize_text(tiny_tokenizer, str(plain)).dtype == torch.int64
    with_bos = tokenize_text(tiny_tokenizer_bos, plain).tolist()
    assert with_bos == [0, *encoded("one\r\n\n two \n")]

    rows = tmp_path / "a.raw"
    rows.write_text(" \n = T = \n x \n")
    assert tokenize_text(tiny_tokenizer, rows).tolist() == encoded("\n\n = T = \n\n\n x \n")

    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "first"}\n{"text": ""}\n{"text": "second"}\n')
    assert tokenize_text(tiny_tokenizer, lines).tolist() == encoded("first\n\nsecond")

    ids = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    save_file({"calibration": ids + 1, "test": ids}, tmp_path / "ids.safetensors")
    found = tokenize_text(tiny_tokenizer, tmp_path / "ids.safetensors")
    assert found.tolist() == list(range(12))

    assert tokenize_text(tiny_tokenizer, "some words").tolist() == encoded("some words")
    builtin = tokenize_text(tiny_tokenizer, "builtin")
    assert builtin.tolist() == encoded(builtin_text("evaluation"))


def test_range_of_documents(tmp_path, tiny_tokenizer):
    def encoded(text):
        return tiny_tokenizer(text)["input_ids"]

    lines = tmp_path / "some documents.jsonl"
    lines.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(5)))
    found = tokenize_text(tiny_tokenizer, f"{lines}[1:3]").tolist()
    assert found == encoded("text 1\n\ntext 2")
    held_back = tokenize_text(tiny_tokenizer, f"{lines}[3:]").tolist()
    assert held_back == encoded("text 3\n\ntext 4")
    with pytest.raises(InputError, match="holds 5 documents"):
        tokenize_text(tiny_tokenizer, f"{lines}[3:9]")
    with pytest.raises(InputError, match="does not exist"):
        tokenize_text(tiny_tokenizer, f"{tmp_path}/no such documents.jsonl[3:9]")
    # brackets at the end of a text do not make it a path
    assert tokenize_text(tiny_tokenizer, "an array [1:3]").tolist() == encoded("an array [1:3]")


def test_only_token_ids_need_no_tokenizer(tmp_path):
    save_file({"evaluation": token_ids(9)}, tmp_path / "ids.safetensors")
    assert torch.equal(tokenize_text(None, tmp_path / "ids.safetensors"), token_ids(9))
    with pytest.raises(InputError, match="text needs a tokenizer"):
        tokenize_text(None, "some words")


def test_missing_text(tiny_tokenizer, tmp_path):
    for source in ("no.txt", "/no/such/file of text.txt", tmp_path / "no", "no.safetensors"):
        with pytest.raises(InputError, match="does not exist"):
            tokenize_text(tiny_tokenizer, source)
