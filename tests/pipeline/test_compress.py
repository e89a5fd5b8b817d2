"""The main job on tiny models of several families, from folder to folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cospadi
from cospadi.calibration.data import load_calibration
from cospadi.calibration.statistics import collect_grams
from cospadi.checkpoint.manifest import MANIFEST_FILE
from cospadi.checkpoint.reader import read_checkpoint
from cospadi.errors import CudaUnavailableError, InputError, VerificationError
from cospadi.learn.whitening import whiten_gram
from cospadi.model.discover import discover, weight_of
from cospadi.model.source import open_source
from cospadi.pipeline.compress import compress
from cospadi.pipeline.inspect import inspect_checkpoint
from cospadi.pipeline.open_model import export_model, open_model
from cospadi.pipeline.recipe import Override, Recipe
from cospadi.pipeline.verify import verify_checkpoint, verify_errors

FAST = {"ratio": 0.3, "samples": 12, "sequence_length": 64, "iterations": 2}


@pytest.fixture(scope="session")
def small_job(tiny_model_dir, tiny_text, tmp_path_factory):
    """Compress a tiny family once per session: (source, output, result)."""
    done: dict[str, tuple[Path, Path, object]] = {}

    def job(family: str):
        if family not in done:
            out = tmp_path_factory.mktemp("compressed") / family
            source = tiny_model_dir(family)
            done[family] = (source, out, compress(source, out, calibration=str(tiny_text), **FAST))
        return done[family]

    return job


@pytest.fixture(scope="session")
def ids():
    return torch.randint(2, 380, (2, 33), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_result_loads_and_computes_what_its_dense_export_computes(family, small_job, ids, tmp_path):
    _, out, result = small_job(family)
    assert result.failed == ()
    model, tokenizer = cospadi.load(out, dtype=torch.float32)
    assert tokenizer is not None
    export_model(out, tmp_path / "dense", dtype="float32")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    dense, _ = open_model(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_stated_errors_are_recomputed_from_the_files(family, small_job):
    source, out, _ = small_job(family)
    assert verify_checkpoint(out) > 0
    assert verify_errors(out, source) < 1e-3


def test_report_inspect_and_plan_agree(small_job):
    _, out, result = small_job("llama")
    data = inspect_checkpoint(out)
    assert set(data["modules"]) == {module.name for module in result.plan.modules}
    for name, module in data["modules"].items():
        assert module["relative_error"] == result.reports[name]["relative_error"]
        # the empty tensor in the dense weight's place has no bytes
        assert module["file_bytes"] == module["stored_bytes"]
    linears = data["ratio"]["linears"]
    assert linears["stored"] == pytest.approx(result.plan.ratio["stored"])
    assert linears["values"] == pytest.approx(result.plan.ratio["values"])
    assert 0.3 <= linears["stored"] < linears["values"]
    assert data["ratio"]["model"]["stored"] < linears["stored"]
    assert data["bytes"]["model"]["file"] == sum(
        f.stat().st_size for f in out.glob("*.safetensors")
    )


def test_recipe_in_the_output_reproduces_it(small_job, tmp_path):
    from cospadi.pipeline.recipe_file import load_recipe, recipe_from_mapping

    source, out, _ = small_job("llama")
    recipe = recipe_from_mapping(load_recipe(out / "recipe.yaml"))
    compress(source, tmp_path / "again", recipe)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "again/model.safetensors")[name]), name


def test_low_rank_error_is_the_dropped_singular_values(tiny_model_dir, tiny_text, tmp_path):
    source = tiny_model_dir("llama")
    settings = {"ratio": 0.3, "samples": 12, "sequence_length": 64}
    result = compress(
        source,
        tmp_path / "out",
        method="svd-llm",
        storage_dtype="float32",
        calibration=str(tiny_text),
        **settings,
    )
    opened = open_source(source)
    targets, _ = discover(opened.model)
    calibration = load_calibration(
        str(tiny_text), opened.tokenizer, n_samples=12, sequence_length=64, seed=42
    )
    for finished in collect_grams(opened.model, targets, calibration.ids, batch_size=4):
        for statistics in finished.grams.values():
            whitening = whiten_gram(statistics.gram, "x")
            for name in statistics.members:
                weight, _ = weight_of(opened.model, next(t for t in targets if t.name == name))
                values = torch.linalg.svdvals(whitening.whiten(weight))
                rank = next(m.n_atoms for m in result.plan.modules if m.name == name)
                expected = float((values[rank:].square().sum() / values.square().sum()).sqrt())
                assert result.reports[name]["relative_error"] == pytest.approx(expected, rel=1e-5)


class Stop(BaseException):
    """Stands for a process that dies."""


@pytest.mark.parametrize("stop_after", [1, 5])
def test_interrupted_run_resumes_to_the_same_bytes(stop_after, small_job, tiny_text, tmp_path):
    source, undisturbed, _ = small_job("llama")
    seen = []

    def dying(event):
        if event["event"] == "module":
            seen.append(event["module"])
            if len(seen) == stop_after:
                raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress(source, out, calibration=str(tiny_text), listener=dying, **FAST)
    assert not out.exists()
    fitted = []
    compress(
        source, out, calibration=str(tiny_text), **FAST,
        listener=lambda e: fitted.append(e) if e["event"] == "module" and not e["resumed"] else None,
    )  # fmt: skip
    assert not {event["module"] for event in fitted} & set(seen)
    assert not out.with_name("out.work").exists()
    hashes = [
        json.loads((d / MANIFEST_FILE).read_text())["files"]["model.safetensors"]["sha256"]
        for d in (undisturbed, out)
    ]
    assert hashes[0] == hashes[1]


def test_resuming_under_other_settings_is_refused(tiny_model_dir, tiny_text, tmp_path):
    def dying(event):
        if event["event"] == "module":
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        compress(tiny_model_dir("llama"), out, calibration=str(tiny_text), listener=dying, **FAST)
    with pytest.raises(InputError, match=r"ratio: 0\.3 there, 0\.4 now"):
        compress(
            tiny_model_dir("llama"), out, calibration=str(tiny_text), **(FAST | {"ratio": 0.4})
        )


def test_a_layer_that_cannot_be_fitted_stays_dense_and_is_reported(
    damaged_dir, tiny_text, tmp_path
):
    path = damaged_dir / "model.safetensors"
    tensors = load_file(path)
    # a dead norm: the inputs of q, k, v, and so of o, are zero in block 1
    tensors["model.layers.1.input_layernorm.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    result = compress(damaged_dir, tmp_path / "out", calibration=str(tiny_text), **FAST)
    names = [f"model.layers.1.self_attn.{p}_proj" for p in "kqvo"]
    assert sorted(result.failed) == sorted(names)
    assert inspect_checkpoint(tmp_path / "out")["failed"] == list(result.failed)
    model, _ = cospadi.load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(
        model.get_submodule(names[0]).weight, tensors[f"{names[0]}.weight"], rtol=0.01, atol=1e-3
    )


def test_targets_ignore_and_overrides(tiny_model_dir, tiny_text, tmp_path):
    recipe = Recipe(
        **FAST,
        calibration=str(tiny_text),
        targets=(r".*mlp\..*",),
        ignore=(r".*layers\.0\.mlp\.gate_proj",),
        overrides=(
            Override(r".*down_proj", ratio=0.5),
            Override(r".*layers\.1\.mlp\.up_proj", dense=True),
        ),
    )
    result = compress(tiny_model_dir("llama"), tmp_path / "out", recipe)
    compressed = {m.name: m for m in result.plan.modules}
    assert set(compressed) == {
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert compressed["model.layers.0.mlp.down_proj"].spec.stored_ratio >= 0.5
    assert {item.name for item in result.dense} >= {"model.layers.1.mlp.up_proj"}


def test_fused_experts_are_reported_not_silent(tiny_model_dir, tiny_text, tmp_path):
    events = []
    compress(
        tiny_model_dir("mixtral"),
        tmp_path / "out",
        calibration=str(tiny_text),
        listener=events.append,
        **FAST,
    )
    dense = {event["module"] for event in events if event["event"] == "dense"}
    assert any("experts" in name for name in dense), dense
    model, _ = cospadi.load(tmp_path / "out", dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(2, 20)[None]).logits).all()


def test_grams_that_do_not_fit_take_more_passes_to_the_same_result(small_job, tiny_text, tmp_path):
    source, undisturbed, _ = small_job("llama")
    events = []
    settings = FAST | {"max_gram_gb": 400_000 / 2**30}
    compress(
        source, tmp_path / "out", calibration=str(tiny_text), listener=events.append, **settings
    )
    assert max(e["n_passes"] for e in events if e["event"] == "calibrated") > 1
    once, often = (inspect_checkpoint(d)["modules"] for d in (undisturbed, tmp_path / "out"))
    for name in once:
        assert often[name]["relative_error"] == pytest.approx(
            once[name]["relative_error"], rel=1e-3
        )


def test_occupied_output_is_refused_before_any_work(tiny_model_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/keep.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        compress(tiny_model_dir("llama"), tmp_path / "out")
    assert (tmp_path / "out/keep.txt").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_cuda_says_what_is_missing(tiny_model_dir, tmp_path):
    with pytest.raises(CudaUnavailableError, match="device cuda"):
        compress(tiny_model_dir("llama"), tmp_path / "out", device="cuda")


def test_verify_finds_a_flipped_bit_and_a_wrong_claim(small_job, tmp_path):
    import shutil

    source, out, _ = small_job("llama")
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    with pytest.raises(VerificationError, match=r"model\.safetensors"):
        verify_checkpoint(copy)
    shutil.rmtree(copy)
    copy = Path(shutil.copytree(out, copy))
    report = json.loads((copy / "cospadi_report.json").read_text())
    name = next(iter(report["modules"]))
    report["modules"][name]["relative_error"] *= 0.9
    (copy / "cospadi_report.json").write_text(json.dumps(report))
    with pytest.raises(VerificationError, match=name):
        verify_errors(copy, source)


def test_checkpoint_holds_every_other_tensor_of_the_model(small_job):
    source, out, _ = small_job("llama")
    original = load_file(source / "model.safetensors")
    checkpoint = read_checkpoint(out)
    replaced = {f"{name}.weight" for name in checkpoint.data.modules}
    for name, tensor in original.items():
        if name not in replaced:
            assert torch.equal(checkpoint.tensor(name), tensor.bfloat16()), name


def test_refused_input_does_not_block_the_corrected_command(tiny_model_dir, tiny_text, tmp_path):
    source, out = tiny_model_dir("llama"), tmp_path / "out"
    settings = {**FAST, "calibration": str(tiny_text)}
    with pytest.raises(InputError, match=r"context of .* see --sequence-length"):
        compress(source, out, **{**settings, "sequence_length": 4096, "samples": 2})
    assert list(tmp_path.iterdir()) == []
    events = []

    def failing(event):
        events.append(event["event"])
        if event["event"] == "calibrated":
            raise InputError("refused after the work directory was made")

    with pytest.raises(InputError, match="refused"):
        compress(source, out, listener=failing, **settings)
    assert list(tmp_path.iterdir()) == []
    compress(source, out, **{**settings, "samples": 8})


def test_unfinished_runs_with_results_name_the_setting_and_not_the_hash(
    tiny_model_dir, tiny_text, tmp_path
):
    source, out = tiny_model_dir("llama"), tmp_path / "out"
    settings = {**FAST, "calibration": str(tiny_text)}

    def dying(event):
        if event["event"] == "module":
            raise Stop

    with pytest.raises(Stop):
        compress(source, out, listener=dying, **settings)
    with pytest.raises(InputError, match=r"other settings \(samples: 12 there, 8 now\)"):
        compress(source, out, **{**settings, "samples": 8})


def test_two_processes_cannot_write_one_output(tiny_model_dir, tiny_text, tmp_path):
    source, out = tiny_model_dir("llama"), tmp_path / "out"
    settings = {**FAST, "calibration": str(tiny_text)}
    refused = []

    def second(event):
        if event["event"] == "start":
            with pytest.raises(InputError, match="another process"):
                compress(source, out, **settings)
            refused.append(True)

    compress(source, out, listener=second, **settings)
    assert refused and out.is_dir()


def test_links_and_empty_names_are_refused_before_any_work(tiny_model_dir, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for out, message in ((tmp_path / "link", "is a link"), ("", "is empty")):
        with pytest.raises(InputError, match=message):
            compress(tiny_model_dir("llama"), out)


def test_wide_storage_is_paid_for_and_stated(tiny_model_dir, tiny_text, tmp_path):
    settings = {**FAST, "calibration": str(tiny_text), "storage_dtype": "float32"}
    result = compress(tiny_model_dir("llama"), tmp_path / "out", **settings)
    data = inspect_checkpoint(tmp_path / "out")
    assert result.ratio["stored"] == pytest.approx(data["ratio"]["linears"]["file"])
    assert result.ratio["stored"] >= 0.3
    assert result.stored_bytes == data["bytes"]["linears"]["file"]


def test_another_type_of_the_source_is_noted(tiny_model_dir, tiny_text, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir("llama"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    notes = []
    compress(
        source, tmp_path / "out", calibration=str(tiny_text), **FAST,
        listener=lambda e: notes.append(e["text"]) if e["event"] == "note" else None,
    )  # fmt: skip
    assert len(notes) == 1 and "float32" in notes[0] and "bfloat16" in notes[0]


def test_unknown_settings_are_named(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match="unknown setting 'ratios'"):
        compress(tiny_model_dir("llama"), tmp_path / "out", ratios=0.3)
