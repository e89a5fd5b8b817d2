"""The byte budget over the linears of a model, and fits that look at the prediction, end to end on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

import cospadi
from cospadi.checkpoint.manifest import MANIFEST_FILE
from cospadi.model.discover import TargetLinear
from cospadi.pipeline import loss_curves
from cospadi.pipeline.compress import compress
from cospadi.pipeline.inspect import inspect_checkpoint
from cospadi.pipeline.verify import verify_errors

SETTINGS = {
    "ratio": 0.35,
    "samples": 8,
    "sequence_length": 64,
    "dictionary": "augmented",
    "backward_samples": 4,
    "output_metric": "fisher",
    "allocation": "loss",
    "penalty_growth": 1.5,
}


class Stop(BaseException):
    """Stands for a process that dies."""


@pytest.fixture(scope="module")
def job(tiny_model_dir, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("allocated") / "out"
    events = []
    source = tiny_model_dir("llama")
    result = compress(source, out, calibration=str(tiny_text), listener=events.append, **SETTINGS)
    return source, out, result, events


def event_of(events, kind):
    (found,) = [event for event in events if event["event"] == kind]
    return found


def test_budget_is_kept_and_not_uniform(job):
    _, _, result, events = job
    allocated = event_of(events, "allocated")
    assert set(allocated["ratios"]) == set(result.reports)
    assert len(set(allocated["ratios"].values())) > 1
    assert allocated["predicted_loss"] < allocated["predicted_uniform"]
    assert 0.35 <= result.ratio["stored"] < 0.40


def test_report_says_what_each_got_and_why(job):
    _, out, _, events = job
    report = json.loads((out / "cospadi_report.json").read_text())["allocation"]
    allocated = event_of(events, "allocated")
    assert report == {key: allocated[key] for key in report}
    assert set(report) == {
        "ratios",
        "losses",
        "even_losses",
        "curves",
        "predicted_loss",
        "predicted_uniform",
    }
    assert sum(report["losses"].values()) == pytest.approx(report["predicted_loss"])
    assert sum(report["even_losses"].values()) == pytest.approx(report["predicted_uniform"])
    inspected = inspect_checkpoint(out)["modules"]
    assert {name: module["loss"] for name, module in inspected.items()} == report["losses"]
    assert {name: m["even_loss"] for name, m in inspected.items()} == report["even_losses"]


def test_shares_reach_no_further_than_asked(tiny_model_dir, tiny_text, tmp_path):
    events = []
    settings = SETTINGS | {"allocation_reach": 0.05, "output_metric": "none"}
    compress(
        tiny_model_dir("llama"),
        tmp_path / "out",
        calibration=str(tiny_text),
        listener=events.append,
        **settings,
    )
    shares = event_of(events, "allocated")["ratios"].values()
    assert min(shares) >= 0.3 - 1e-9
    assert max(shares) <= 0.4 + 1e-9


def test_result_verifies_and_loads(job):
    source, out, _, _ = job
    verify_errors(out, source)
    model, _ = cospadi.load(out, dtype=torch.float32)
    logits = model(torch.arange(2, 30)[None]).logits
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize(("kind", "count"), [("coarse", 3), ("allocated", 1), ("module", 2)])
def test_interrupted_anywhere_the_result_is_the_same(kind, count, job, tiny_text, tmp_path):
    source, undisturbed, _, _ = job
    seen = []

    def dying(event):
        if event["event"] == kind:
            seen.append(event)
            if len(seen) == count:
                raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress(source, out, calibration=str(tiny_text), listener=dying, **SETTINGS)
    again = []
    compress(source, out, calibration=str(tiny_text), listener=again.append, **SETTINGS)
    if kind == "coarse":
        done = {event["module"] for event in seen}
        assert not done & {event["module"] for event in again if event["event"] == "coarse"}
    else:
        assert not [event for event in again if event["event"] == "coarse"]
    hashes = [
        json.loads((folder / MANIFEST_FILE).read_text())["files"]["model.safetensors"]["sha256"]
        for folder in (undisturbed, out)
    ]
    assert hashes[0] == hashes[1]


def test_overrides_keep_their_own_ratio(tiny_model_dir, tiny_text, tmp_path):
    from cospadi.pipeline.recipe import Override, Recipe

    events = []
    recipe = Recipe(
        **SETTINGS, calibration=str(tiny_text), overrides=(Override(r".*q_proj", ratio=0.5),)
    )
    result = compress(tiny_model_dir("llama"), tmp_path / "out", recipe, listener=events.append)
    ratios = event_of(events, "allocated")["ratios"]
    assert not [name for name in ratios if name.endswith("q_proj")]
    removed = [
        1.0 - module.spec.stored_bits / module.spec.dense_bits
        for module in result.plan.modules
        if module.name.endswith("q_proj")
    ]
    assert min(removed) >= 0.5


@pytest.mark.parametrize("metric", ["none", "diagonal", "fisher"])
@pytest.mark.parametrize("bits", [2.5, 5.0])
def test_widths_are_divided_by_loss(bits, metric, tiny_model_dir, tiny_text, tmp_path):
    events = []
    settings = {key: SETTINGS[key] for key in ("samples", "sequence_length", "backward_samples")}
    result = compress(
        tiny_model_dir("llama"),
        tmp_path / "out",
        calibration=str(tiny_text),
        listener=events.append,
        bits=bits,
        allocation="loss",
        output_metric=metric,
        **settings,
    )
    allocated = event_of(events, "allocated")
    assert allocated["predicted_loss"] <= allocated["predicted_uniform"] * (1 + 1e-9)
    weights = sum(module.d_in * module.d_out for module in result.plan.modules)
    assert bits - 0.3 < 8 * result.stored_bytes / weights <= bits + 1e-6
    verify_errors(tmp_path / "out", tiny_model_dir("llama"))
    model, _ = cospadi.load(tmp_path / "out", dtype=torch.float32)
    assert bool(torch.isfinite(model(torch.arange(2, 30)[None]).logits).all())


def target(block, projection="q_proj"):
    name = f"model.layers.{block}.self_attn.{projection}"
    return TargetLinear(name, "linear", 64, 64, False, name, block, f"self_attn.{projection}")


@pytest.mark.parametrize(
    ("n_blocks", "chosen"), [(2, [0, 1]), (6, list(range(6))), (30, [5, 15, 25])]
)
def test_slopes_come_from_a_few_blocks(n_blocks, chosen):
    targets = [target(block) for block in range(n_blocks)]
    assert loss_curves.slope_targets(targets) == {targets[block].name for block in chosen}


@pytest.mark.parametrize("settings", [{"ratio": 0.35}, {"bits": 4.5}], ids=str)
def test_one_coarse_fit_is_enough_with_the_slope_of_others(
    settings, tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    def first_block(targets):
        return {t.name for t in targets if t.block == 0}

    monkeypatch.setattr(loss_curves, "slope_targets", first_block)
    events = []
    common = {key: value for key, value in SETTINGS.items() if key not in ("ratio", "dictionary")}
    result = compress(
        tiny_model_dir("llama"),
        tmp_path / "out",
        calibration=str(tiny_text),
        listener=events.append,
        **common,
        **settings,
    )
    curves = event_of(events, "allocated")["curves"]
    assert set(curves) == set(result.reports)
    for name, curve in curves.items():
        assert (len(curve["ratios"]) > 1) == ("layers.0." in name)
        same = [c for n, c in curves.items() if n.rpartition(".")[2] == name.rpartition(".")[2]]
        if len(curve["ratios"]) == 1:
            assert curve["slope"] == pytest.approx(same[0]["slope"])
    warnings = [event["text"] for event in events if event["event"] == "warning"]
    assert all("per input dimension" in text for text in warnings), warnings  # the text is short
