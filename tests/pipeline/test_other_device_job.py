"""The main job on a device that the model does not lie on; see tests/pretend_device.py."""

from __future__ import annotations

import json

import pytest
import torch

import cospadi
from cospadi.errors import CudaUnavailableError, InputError
from cospadi.pipeline import compress as compress_module
from cospadi.pipeline import device as device_module
from cospadi.pipeline.compress import compress
from cospadi.pipeline.device import checked_device
from pretend_device import DEVICE, pretended_device

FAST = {
    "samples": 8,
    "sequence_length": 48,
    "batch_size": 4,
    "first_penalty": 0.02,
    "penalty_growth": 1.6,
}
RECIPES = {
    "fast": {"ratio": 0.3},
    "learned": {"ratio": 0.3, "dictionary": "learned", "iterations": 2},
    "groups": {
        "ratio": 0.3,
        "dictionary": "learned",
        "iterations": 2,
        "group_size": 2,
        "grouping": "similarity",
    },
    "no text": {"ratio": 0.3, "calibration": "none"},
    "sequential": {"ratio": 0.3, "sequential": True},
    "fisher and loss": {
        "ratio": 0.3,
        "dictionary": "augmented",
        "output_metric": "fisher",
        "allocation": "loss",
        "backward_samples": 4,
    },
    "diagonal": {"ratio": 0.3, "output_metric": "diagonal", "backward_samples": 4},
    "integers": {"bits": 4.25, "output_metric": "fisher", "backward_samples": 4},
    "reconstruction": {"ratio": 0.3, "reconstruction": "blockwise", "reconstruction_epochs": 1},
    "gptq": {"method": "gptq", "coeffs_dtype": "int4"},
    "sparsegpt": {"method": "sparsegpt", "ratio": 0.3},
}


def errors(result):
    return {name: report["relative_error"] for name, report in result.reports.items()}


def differing_shares(here, there):
    """Linears whose shares of the budget differ: by two points of the grid at most, at equal predicted losses.

    Curves come from coarse fits, of which a last bit may change the end; shares are whole percents.
    """
    divisions = [[e for e in events if e["event"] == "allocated"] for events in (here, there)]
    assert len(divisions[0]) == len(divisions[1]) <= 1
    if not divisions[0]:
        return set()
    (one,), (other,) = divisions
    assert other["predicted_loss"] == pytest.approx(one["predicted_loss"], rel=0.02)
    assert other["predicted_uniform"] == pytest.approx(one["predicted_uniform"], rel=0.02)
    assert other["ratios"].keys() == one["ratios"].keys()
    for name, share in one["ratios"].items():
        assert other["ratios"][name] == pytest.approx(share, abs=0.0201), name
    return {name for name, share in one["ratios"].items() if other["ratios"][name] != share}


@pytest.mark.parametrize("name", RECIPES)
def test_the_job_is_that_of_the_cpu(name, tiny_model_dir, tmp_path, monkeypatch):
    model, settings = tiny_model_dir("llama"), {**FAST, **RECIPES[name]}
    here, there = [], []
    expected = compress(model, tmp_path / "cpu", listener=here.append, **settings)
    monkeypatch.setattr(compress_module, "checked_device", lambda device: DEVICE)
    with pretended_device() as mode:
        found = compress(
            model, tmp_path / "other", device="cuda", listener=there.append, **settings
        )
    assert mode.calls  # something was computed there
    assert not found.failed
    assert errors(found).keys() == errors(expected).keys()
    others = differing_shares(here, there)
    assert len(others) <= 0.5 * len(errors(found))
    for module, error in errors(found).items():
        if module in others:
            continue
        assert error == pytest.approx(errors(expected)[module], rel=0.15, abs=1e-4), module
    # what was written is an ordinary checkpoint
    loaded, _ = cospadi.load(tmp_path / "other", dtype=torch.float32)
    logits = loaded(input_ids=torch.arange(20)[None]).logits
    assert bool(torch.isfinite(logits).all())
    json.loads((tmp_path / "other" / "config.json").read_text())


def test_cuda_is_refused_where_there_is_none(monkeypatch, tiny_model_dir, tmp_path):
    monkeypatch.setattr(device_module.native, "has_cuda_kernels", lambda: False)
    with pytest.raises(CudaUnavailableError, match="has no CUDA kernels"):
        checked_device("cuda")
    monkeypatch.setattr(device_module.native, "has_cuda_kernels", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CudaUnavailableError, match="torch finds no GPU"):
        checked_device("cuda")
    with pytest.raises(InputError, match="expected cpu or cuda"):
        checked_device("tpu")
    with pytest.raises(InputError, match="products: expected one of float32, tf32x3, tf32"):
        compress(tiny_model_dir("llama"), tmp_path / "out", products="fp8")
