"""Whole runs that are killed, cut off from the disk, or fed activations that overflow."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import cospadi
from cospadi.checkpoint.manifest import MANIFEST_FILE
from cospadi.errors import CospadiError
from cospadi.pipeline.compress import compress
from cospadi.pipeline.verify import verify_checkpoint

SETTINGS = {"ratio": 0.3, "samples": 16, "sequence_length": 64}
SLOW = {"dictionary": "learned", "iterations": 25, "tolerance": 0.0}


def command(source, out, text, settings):
    words = [sys.executable, "-m", "cospadi", "compress", source, "--out", out, "--threads", 1]
    words += ["--calibration", text]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    return [str(word) for word in words]


def manifest(folder) -> bytes:
    return (folder / MANIFEST_FILE).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tiny_model_dir, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    settings = {**SETTINGS, **SLOW, "calibration": str(tiny_text), "num_threads": 1}
    compress(tiny_model_dir("llama"), out, **settings)
    return manifest(out)


def wait_for(condition, process, seconds=120.0):
    deadline = time.monotonic() + seconds
    while process.poll() is None and not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.slow
def test_five_random_kills_and_the_manifest_is_that_of_the_undisturbed_run(
    undisturbed, tiny_model_dir, tiny_text, tmp_path
):
    """``bench/soak/kills.py`` does a hundred."""
    out, draw = tmp_path / "out", random.Random(0)
    modules = tmp_path / "out.work/modules"
    words = command(tiny_model_dir("llama"), out, tiny_text, {**SETTINGS, **SLOW})
    kills = 0
    for _ in range(5):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(list(modules.glob("*.json")))
        wait_for(lambda b=before: len(list(modules.glob("*.json"))) > b, process)
        time.sleep(draw.uniform(0.0, 0.04))  # a fit takes some 50 ms
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not out.exists() or manifest(out) == undisturbed
    if not out.exists():
        subprocess.run(words, check=True, capture_output=True)
    assert kills >= 3 and manifest(out) == undisturbed
    assert not any(p.name.startswith(".out.partial") for p in tmp_path.iterdir())


def test_sigterm_ends_cleanly_and_the_same_command_resumes(
    undisturbed, tiny_model_dir, tiny_text, tmp_path
):
    out = tmp_path / "out"
    words = command(tiny_model_dir("llama"), out, tiny_text, {**SETTINGS, **SLOW})
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: any((tmp_path / "out.work/modules").glob("*.json")), process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.strip() == "terminated; what is finished is kept, the same command resumes"
    assert not out.exists() and list((tmp_path / "out.work/modules").glob("*.json"))
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert "resuming:" in done.stdout and manifest(out) == undisturbed


def test_a_disk_that_fills_up_is_named_and_nothing_finished_is_lost(
    undisturbed, tiny_model_dir, tiny_text, tmp_path
):
    """No file may exceed 20 kB: factors fit, the checkpoint does not."""
    out = tmp_path / "out"
    words = command(tiny_model_dir("llama"), out, tiny_text, {**SETTINGS, **SLOW})

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(words, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "cannot be written" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"out.work", "out.log.jsonl"}
    assert list((tmp_path / "out.work/modules").glob("*.json"))
    subprocess.run(words, check=True, capture_output=True)
    assert manifest(out) == undisturbed


@pytest.mark.parametrize("damage", ["cut data", "cut record", "flipped", "swapped", "foreign run"])
def test_torn_results_are_fitted_again(damage, undisturbed, tiny_model_dir, tiny_text, tmp_path):
    class Stop(BaseException):
        pass

    def dying(event):
        if event["event"] == "module" and event["index"] == 4:
            raise Stop

    settings = {**SETTINGS, **SLOW, "calibration": str(tiny_text), "num_threads": 1}
    with pytest.raises(Stop):
        compress(tiny_model_dir("llama"), tmp_path / "out", listener=dying, **settings)
    first, second = sorted((tmp_path / "out.work/modules").glob("*.safetensors"))[:2]
    record = first.with_suffix(".json")
    if damage == "cut data":
        first.write_bytes(first.read_bytes()[:100])
    elif damage == "cut record":
        record.write_bytes(record.read_bytes()[:30])
    elif damage == "flipped":
        content = bytearray(first.read_bytes())
        content[-1] ^= 8
        first.write_bytes(content)
    elif damage == "swapped":
        shutil.copy(second, first)
    else:
        content = json.loads(record.read_text())
        record.write_text(json.dumps({**content, "fingerprint": "0" * 64}))
    result = compress(tiny_model_dir("llama"), tmp_path / "out", **settings)
    assert result.n_resumed == 3 and manifest(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("spill", [False, True])
def test_activations_that_overflow_leave_their_layers_dense(
    spill, damaged_dir, tiny_text, tmp_path, monkeypatch
):
    """Every input of the second block is infinite; what opening a model checks is left out."""
    path = damaged_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.input_layernorm.weight"].fill_(3e38)
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.setattr("cospadi.model.source._check_runs", lambda *_: None)
    settings = {**SETTINGS, "calibration": str(tiny_text), "spill": spill}
    events = []
    result = compress(damaged_dir, tmp_path / "two", **settings, listener=events.append)
    assert {name.split(".")[2] for name in result.failed} == {"1"}
    (pointer,) = [e["text"] for e in events if "what enters" in e.get("text", "")]
    assert pointer.startswith("what enters model.layers.1.") and "nor what enters 6 more" in pointer
    assert pointer.endswith("norms and embeddings were not looked at")
    # there are no gradients either: nobody asked for them by name, so the rest is fitted without
    (warning,) = [e["text"] for e in events if "no gradients" in e.get("text", "")]
    assert warning.startswith("errors of all outputs count alike, no gradients: ")
    assert "output_metric: none\n" in (tmp_path / "two" / "recipe.yaml").read_text()
    with pytest.raises(CospadiError, match=r"finite|other values|change between"):
        compress(damaged_dir, tmp_path / "asked", **settings, output_metric="diagonal")
    assert {name.split(".")[2] for name in result.reports} == {"0"}
    assert verify_checkpoint(tmp_path / "two") == 7
    for file in (tmp_path / "two").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert not tensor.is_floating_point() or not torch.isnan(tensor).any(), name


def test_a_matrix_of_enormous_weights_is_pointed_at(damaged_dir, tiny_text, tmp_path):
    path, victim = damaged_dir / "model.safetensors", "model.layers.0.self_attn.v_proj"
    tensors = load_file(path)
    tensors[f"{victim}.weight"].mul_(1e25)
    save_file(tensors, path, metadata={"format": "pt"})
    events = []
    settings = {**SETTINGS, "calibration": str(tiny_text), "listener": events.append}
    result = compress(damaged_dir, tmp_path / "out", **settings)
    assert "model.layers.0.self_attn.o_proj" in result.failed
    (pointer,) = [e["text"] for e in events if "what enters" in e.get("text", "")]
    assert f"The cause is likely {victim}, whose largest weight is" in pointer


def test_an_unexpected_error_of_one_fit_costs_one_layer(
    tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    import cospadi.pipeline.fit_task as fit_task

    original = fit_task.fit

    def failing(inputs, *arguments, **settings):
        if inputs[0].name.endswith("1.mlp.up_proj"):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return original(inputs, *arguments, **settings)

    monkeypatch.setattr(fit_task, "fit", failing)
    settings = {**SETTINGS, "calibration": str(tiny_text)}
    result = compress(tiny_model_dir("llama"), tmp_path / "out", **settings)
    assert result.failed == ("model.layers.1.mlp.up_proj",)
    (skipped,) = [item for item in result.dense if item.name in result.failed]
    assert skipped.reason == "LinAlgError: the algorithm failed to converge"
    model, _ = cospadi.load(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(2, 20)[None]).logits).all()


@pytest.mark.parametrize("damage", ["cut", "grown", "header", "gone", "shape"])
@pytest.mark.parametrize("spill", [False, True])
def test_corrupt_shards_are_one_line_before_any_work(
    damage, spill, damaged_dir, tiny_text, tmp_path
):
    path = damaged_dir / "model.safetensors"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "shape":
        tensors = load_file(path)
        tensors["model.norm.weight"] = torch.ones(7)
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path.write_bytes(
            {"cut": data[:-64], "grown": data + b"x", "header": b"\x00" * 8 + data[8:]}[damage]
        )
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(CospadiError) as caught:
        compress(damaged_dir, tmp_path / "out", calibration=str(tiny_text), spill=spill, **SETTINGS)
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == before
