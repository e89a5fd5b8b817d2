"""Block-wise reconstruction within the main job: what it gains, reports, and continues after a crash."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import cospadi
from cospadi.calibration.blockwise import BlockwiseError
from cospadi.calibration.data import load_calibration
from cospadi.pipeline.compress import compress
from cospadi.pipeline.inspect import inspect_checkpoint
from cospadi.pipeline.open_model import open_model
from cospadi.pipeline.report import read_report
from cospadi.pipeline.verify import verify_checkpoint, verify_errors

SETTINGS = {
    "ratio": 0.4,
    "samples": 24,
    "sequence_length": 64,
    "penalty_growth": 1.5,
    "reconstruction": "blockwise",
    "reconstruction_rate": 0.01,
}


class Stop(BaseException):
    """Stands for a process that dies."""


@pytest.fixture(scope="module")
def job(tiny_model_dir, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("reconstructed") / "out"
    events = []
    source = tiny_model_dir("llama")
    settings = {**SETTINGS, "calibration": str(tiny_text)}
    result = compress(source, out, listener=events.append, **settings)
    return source, out, result, events


def divergence(source, out, text):
    """Kullback-Leibler divergence of the compressed model's predictions, on other windows of the text."""
    dense, tokenizer = open_model(source)
    ids = load_calibration(str(text), tokenizer, n_samples=8, sequence_length=64, seed=3).ids
    with torch.no_grad():
        wanted = dense(ids).logits.float().log_softmax(-1)
        found = cospadi.load(out, dtype=torch.float32)[0](ids).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_prediction_gets_better_at_the_same_bytes(job, tiny_text, tmp_path):
    source, out, result, _ = job
    plain = compress(
        source,
        tmp_path / "plain",
        **{**SETTINGS, "calibration": str(tiny_text), "reconstruction": "none"},
    )
    assert result.stored_bytes == plain.stored_bytes
    assert divergence(source, out, tiny_text) < 0.97 * divergence(
        source, tmp_path / "plain", tiny_text
    )


def test_report_states_errors_before_and_after(job):
    source, out, result, events = job
    report = read_report(out)
    blocks = report["reconstruction"]
    assert [block["block"] for block in blocks] == [0, 1]
    assert blocks == result.reconstruction
    for block in blocks:
        assert block["is_kept"] == (block["after"] < block["before"])
        for name in block["members"]:
            assert report["modules"][name]["fitted_error"] > 0
    assert {name for block in blocks for name in block["members"]} == set(result.reports)
    said = [event for event in events if event["event"] == "reconstructed"]
    assert [event["block"] for event in said] == [0, 1]
    assert any(event["event"] == "reconstruction" for event in events)
    assert verify_checkpoint(out) == 14
    assert verify_errors(out, source) < 1e-3
    assert inspect_checkpoint(out)["failed"] == []


@pytest.mark.parametrize("sequential", [False, True])
def test_killed_run_goes_on_to_the_same_bits(sequential, job, tiny_text, tmp_path):
    source, out, _, _ = job
    settings = {**SETTINGS, "calibration": str(tiny_text), "sequential": sequential}
    if sequential:
        settings["output_metric"] = "fisher"
        settings["backward_samples"] = 4
        out = tmp_path / "undisturbed"
        compress(source, out, **settings)

    def dying(event):
        if event["event"] == "reconstructed" and event["block"] == 0:
            raise Stop

    again, events = tmp_path / "again", []
    with pytest.raises(Stop):
        compress(source, again, listener=dying, **settings)
    result = compress(source, again, listener=events.append, **settings)
    (resumed,) = [event for event in events if event["event"] == "resume_reconstruction"]
    assert resumed["n_blocks"] == 1
    assert [e["block"] for e in events if e["event"] == "reconstructed"] == [1]
    assert [block["block"] for block in result.reconstruction] == [0, 1]
    expected = load_file(out / "model.safetensors")
    for name, tensor in load_file(again / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_groups_keep_one_dictionary(job, tiny_text, tmp_path):
    source, _, _, _ = job
    settings = {**SETTINGS, "calibration": str(tiny_text), "group_size": 2, "dictionary": "learned"}
    result = compress(source, tmp_path / "out", **settings, iterations=1)
    assert len(result.plan.groups) < len(result.reports)
    assert verify_errors(tmp_path / "out", source) < 1e-3


def test_model_without_block_chain_is_refused_before_the_fits(
    job, tiny_text, tmp_path, monkeypatch
):
    source, _, _, _ = job

    def refuse(self, ids):
        raise BlockwiseError("cannot be run block by block")

    monkeypatch.setattr("cospadi.calibration.blockwise.BlockwiseDecoder.prepare", refuse)
    events = []
    settings = {**SETTINGS, "calibration": str(tiny_text)}
    with pytest.raises(BlockwiseError, match="block by block"):
        compress(source, tmp_path / "out", listener=events.append, **settings)
    assert not any(event["event"] == "module" for event in events)
    assert not (tmp_path / "out.work").exists()
