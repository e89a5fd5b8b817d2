"""What a run says about its calibration text: tokens per input dimension, and inputs that stay at zero."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cospadi.learn.whitening import DEAD_SHARE, count_dead_inputs
from cospadi.pipeline.compress import compress
from cospadi.pipeline.coverage import Coverage, coverage_warnings

DEAD = "model.layers.1.self_attn.q_proj"
SAME_INPUT = tuple(DEAD.replace("q_proj", f"{kind}_proj") for kind in "qkv")


@pytest.fixture(scope="module")
def model_with_dead_inputs(tiny_model_dir, tmp_path_factory):
    """A tiny Llama whose second block's attention never sees inputs 3 and 7."""
    folder = tmp_path_factory.mktemp("dead") / "model"
    shutil.copytree(tiny_model_dir("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][[3, 7]] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(model, text, out, *, stop_after=None, **settings):
    """Compress; the events, and the report's modules."""
    events = []

    def listener(event):
        events.append(event)
        if event["event"] == "module" and event["index"] == stop_after:
            raise KeyboardInterrupt

    given = {"ratio": 0.3, "samples": 16, "sequence_length": 64, "calibration": str(text)}
    compress(model, out, listener=listener, **{**given, **settings})
    return events, json.loads((out / "cospadi_report.json").read_text())["modules"]


def page_text(out):
    """The words of the page, without markup."""
    page = (out / "report.html").read_text(encoding="utf-8")
    return " ".join(re.sub(r"<[^>]*>", " ", page.replace("<wbr>", "")).split())


def warnings_of(events):
    return [item["text"] for item in events if item["event"] == "warning"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_gram_gb": 2e-4}, {"sequential": True}, {"spill": True}, {"workers": 1}],
    ids=["plain", "several passes", "sequential", "streamed", "worker"],
)
def test_dead_inputs_are_warned_of_and_stated(
    model_with_dead_inputs, tiny_text, tmp_path, settings
):
    events, modules = run(model_with_dead_inputs, tiny_text, tmp_path / "out", **settings)
    assert {name for name, found in modules.items() if found["n_dead_inputs"]} == set(SAME_INPUT)
    assert all(modules[name]["n_dead_inputs"] == 2 for name in SAME_INPUT)
    assert {found["n_tokens"] for found in modules.values()} == {16 * 64}
    (event,) = [item for item in events if item["event"] == "coverage"]
    assert event["dead_inputs"] == {DEAD: 2} and event["tokens_per_input"] == {}
    (warning,) = warnings_of(events)
    assert f"2 of 64 inputs of {DEAD} stay at zero on this text (and 2 more linears)" in warning
    page = page_text(tmp_path / "out")
    assert "Input channels that stay at zero : in 3 linears" in page and f"{DEAD} (2)" in page


def test_little_text_is_warned_of_and_stated(tiny_model_dir, tiny_text, tmp_path):
    settings = {"samples": 3, "sequence_length": 50}
    events, modules = run(tiny_model_dir("llama"), tiny_text, tmp_path / "out", **settings)
    (warning,) = warnings_of(events)
    widest = max(modules, key=lambda name: modules[name]["d_in"])
    d_in = modules[widest]["d_in"]
    assert f"150 tokens for the {d_in} inputs of {widest}, {150 / d_in:.1f} per input" in warning
    page = page_text(tmp_path / "out")
    assert "Fewer than 4 tokens per input dimension : 14 linears" in page
    assert f"fewest: {widest}" in page and "No input channel stays at zero." in page


def test_a_resumed_run_still_knows_what_it_saw(model_with_dead_inputs, tiny_text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(model_with_dead_inputs, tiny_text, out, stop_after=13)
    _, modules = run(model_with_dead_inputs, tiny_text, out)
    assert modules[DEAD]["n_dead_inputs"] == 2 and len(modules) == 14
    assert {found["n_tokens"] for found in modules.values()} == {16 * 64}


def test_without_a_text_nothing_is_claimed(tiny_model_dir, tmp_path):
    events, modules = run(tiny_model_dir("llama"), "none", tmp_path / "out")
    assert not [item for item in events if item["event"] == "coverage"]
    assert all(found["n_tokens"] is None for found in modules.values())
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert not re.search("Coverage of the calibration|tokens per input", page)


def test_an_input_is_dead_below_a_share_of_the_mean_energy():
    energy = torch.tensor([1.0, 2.0, 0.0, 1e-14, 1e-9], dtype=torch.float64)
    assert count_dead_inputs(energy.diag()) == 2
    assert count_dead_inputs((1e-30 * energy).diag()) == 2
    above = torch.tensor([1.0, 1.1 * DEAD_SHARE / 2], dtype=torch.float64)
    assert count_dead_inputs(above.diag()) == 0
    assert count_dead_inputs(torch.full((3, 3), torch.nan, dtype=torch.float64)) == 0


def test_warnings_begin_with_the_worst_and_count_linears():
    seen = [
        Coverage(("a", "b"), 100, 399, 0),
        Coverage(("c",), 100, 50, 1),
        Coverage(("d",), 100, 400, 9),
    ]
    few, dead = coverage_warnings(seen)
    assert "50 tokens for the 100 inputs of c, 0.5 per input dimension (and 2 more linears)" in few
    assert "9 of 100 inputs of d stay at zero on this text (and 1 more linears)" in dead
    assert list(coverage_warnings([Coverage(("d",), 100, 400, 0)])) == []
