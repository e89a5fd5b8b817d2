"""Runs within a bound: the streamed run gives the manifest of the loaded one, or the smallest figure is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import cospadi
from cospadi.checkpoint.manifest import MANIFEST_FILE
from cospadi.errors import InputError
from cospadi.model.discover import discover
from cospadi.model.source import source_shapes
from cospadi.pipeline.compress import compress, plan_run
from cospadi.pipeline.memory import estimate, fit_bytes, must_load, possible_layouts
from cospadi.pipeline.plan import make_plan
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.recipe_file import parse_size
from cospadi.pipeline.verify import verify_checkpoint, verify_errors

FAST = {"ratio": 0.3, "samples": 6, "sequence_length": 64}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("qwen2", {"method": "svd-llm"}),
        ("gpt2", {"bits": 4, "ratio": None}),
        ("llama", {"calibration": "none", "storage_dtype": "float32"}),
    ],
)
def test_a_streamed_run_gives_the_manifest_of_a_loaded_one(
    family, settings, tiny_model_dir, tiny_text, tmp_path
):
    source = tiny_model_dir(family)
    given = {**FAST, "calibration": str(tiny_text), **settings}
    given = {key: value for key, value in given.items() if value is not None}
    compress(source, tmp_path / "loaded", **given)
    events = []
    compress(source, tmp_path / "streamed", spill=True, listener=events.append, **given)
    (memory,) = [e for e in events if e["event"] == "memory"]
    assert memory["is_streamed"] and memory["is_spilled"]
    loaded, streamed = (
        json.loads((tmp_path / name / MANIFEST_FILE).read_text())["files"]
        for name in ("loaded", "streamed")
    )
    assert streamed == loaded
    assert verify_errors(tmp_path / "streamed", source) < 1e-3


def test_shards_are_those_of_a_loaded_run(tiny_model_dir, tiny_text, tmp_path, monkeypatch):
    import cospadi.checkpoint.stream_writer as stream
    import cospadi.checkpoint.writer as writer

    for module, name in ((writer, "write_checkpoint"), (stream, "write_streamed")):
        original = getattr(module, name)
        monkeypatch.setattr(
            f"cospadi.pipeline.finalize.{name}",
            lambda *a, original=original, **k: original(*a, max_shard_size=60_000, **k),
        )
    for name in ("loaded", "streamed"):
        given = {**FAST, "calibration": str(tiny_text), "spill": name == "streamed"}
        compress(tiny_model_dir("llama"), tmp_path / name, **given)
    assert len(list((tmp_path / "streamed").glob("model-*.safetensors"))) > 3
    manifests = [(tmp_path / n / MANIFEST_FILE).read_text() for n in ("loaded", "streamed")]
    assert manifests[0] == manifests[1]
    model, _ = cospadi.load(tmp_path / "streamed", dtype=torch.float32)
    assert torch.isfinite(model(torch.arange(2, 20)[None]).logits).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"output_metric": "diagonal"},
        {"output_metric": "fisher", "allocation": "loss"},
        {"output_metric": "fisher", "sequence_length": 16, "backward_samples": 70, "samples": 80},
    ],
)
def test_gradients_of_a_streamed_model_give_the_same_manifest(
    settings, tiny_model_dir, tiny_text, tmp_path
):
    given = {**FAST, "calibration": str(tiny_text), "backward_samples": 3, **settings}
    for name in ("loaded", "streamed"):
        compress(tiny_model_dir("llama"), tmp_path / name, spill=name == "streamed", **given)
    assert (tmp_path / "loaded" / MANIFEST_FILE).read_bytes() == (
        tmp_path / "streamed" / MANIFEST_FILE
    ).read_bytes()


def test_a_sharded_source_is_streamed(tiny_model_dir, tiny_text, tmp_path):
    from cospadi.model.source import open_source

    folder = tmp_path / "sharded"
    source = open_source(tiny_model_dir("llama"))
    source.model.save_pretrained(folder, max_shard_size="60KB")
    source.tokenizer.save_pretrained(folder)
    for name in ("loaded", "streamed"):
        given = {**FAST, "calibration": str(tiny_text), "spill": name == "streamed"}
        compress(folder, tmp_path / name, **given)
    assert (tmp_path / "loaded" / MANIFEST_FILE).read_bytes() == (
        tmp_path / "streamed" / MANIFEST_FILE
    ).read_bytes()


def test_a_streamed_run_resumes_and_works_with_workers(tiny_model_dir, tiny_text, tmp_path):
    class Stop(BaseException):
        pass

    def dying(event):
        if event["event"] == "module" and event["index"] == 5:
            raise Stop

    given = {**FAST, "calibration": str(tiny_text), "spill": True, "num_threads": 1}
    source = tiny_model_dir("llama")
    compress(source, tmp_path / "whole", **given)
    with pytest.raises(Stop):
        compress(source, tmp_path / "out", listener=dying, **given)
    result = compress(source, tmp_path / "out", workers=1, **given)
    assert result.n_resumed == 5
    assert (tmp_path / "whole" / MANIFEST_FILE).read_bytes() == (
        tmp_path / "out" / MANIFEST_FILE
    ).read_bytes()


def test_a_dead_layer_of_a_streamed_model_stays_dense(damaged_dir, tiny_text, tmp_path):
    path = damaged_dir / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.input_layernorm.weight"].zero_()
    save_file(tensors, path, metadata={"format": "pt"})
    given = {**FAST, "calibration": str(tiny_text)}
    result = compress(damaged_dir, tmp_path / "out", spill=True, **given)
    assert len(result.failed) == 4 and verify_checkpoint(tmp_path / "out") == 10


def test_a_bound_that_cannot_be_kept_names_the_least(tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match=r"100 MB do not suffice, the least is (\d+) MB"):
        compress(tiny_model_dir("llama"), tmp_path / "out", max_memory="100MB", **FAST)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError) as caught:
        plan_run(tiny_model_dir("llama"), Recipe(**FAST), max_memory="100MB")
    least = int(str(caught.value).split("the least is ")[1].split(" MB")[0])
    assert plan_run(tiny_model_dir("llama"), Recipe(**FAST), max_memory=(least + 30) * 10**6)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sequential": True}, "sequential True"),
        ({"reconstruction": "blockwise"}, "reconstruction blockwise"),
        ({"group_size": 2, "dictionary": "learned"}, "group_size 2"),
    ],
)
def test_what_needs_the_whole_model_says_so(settings, reason, tiny_model_dir, tmp_path):
    assert must_load(Recipe(**settings), []) == reason
    with pytest.raises(InputError, match=f"{reason} needs the whole model"):
        compress(tiny_model_dir("llama"), tmp_path / "out", spill=True, **FAST, **settings)


def test_no_bound_and_a_small_model_need_no_plan(tiny_model_dir):
    assert plan_run(tiny_model_dir("llama"), Recipe(**FAST)) is None


@pytest.mark.parametrize("text", ["", "1e3MB", "-4MB", "MB", "4 XB", "9" * 400, "1" * 19, "٣MB"])
def test_sizes_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="max_memory: expected bytes"):
        parse_size(text, "max_memory")
    assert parse_size("1.5TiB") == 3 * 2**39


MEASURE = """
import sys, torch
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.methods import factor_size
from cospadi.learn.whitening import whiten_gram
from cospadi.native.heap import bound_heap
from cospadi.pipeline.plan import storage_widths
from cospadi.pipeline.recipe import Recipe

def status(key):
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1])

bound_heap()
torch.set_num_threads(1)
d_in, d_out = int(sys.argv[1]), int(sys.argv[2])
recipe = Recipe(**eval(sys.argv[3]))
types = recipe.types_at(0.3, d_in)
size = factor_size(recipe.method, d_in, d_out, 0.3, k_over_s=recipe.rho, convention="stored",
                   widths=storage_widths(types), dictionary=recipe.atoms, learned_share=0.2)
settings = FitSettings(recipe.method, size, types, recipe.learn_options())
before = status("RssAnon")
x = torch.randn(2 * d_in, d_in)
gram = (x.T @ x).double()
del x
weight = torch.randn(d_out, d_in)
open("/proc/self/clear_refs", "w").write("5")
fit([FitInput("x", weight, None, gram, whiten_gram(gram, "x"))], settings)
# less the pages of libraries' code: how many of them a fault maps is the system's affair
print(status("VmHWM") - status("RssFile") - before)
"""


@pytest.mark.parametrize(("d_in", "d_out"), [(384, 384), (256, 1024), (1024, 256)])
@pytest.mark.parametrize("settings", [{}, {"dictionary": "learned", "iterations": 1}])
def test_fits_stay_within_the_estimate(d_in, d_out, settings):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(d_in), str(d_out), repr(settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= fit_bytes(d_in, d_out)


GRADIENTS = """
import sys, torch
from pathlib import Path
from cospadi.calibration.fisher import FisherStore
from cospadi.model.discover import discover
from cospadi.model.source import open_source
from cospadi.model.streamed import open_streamed
from cospadi.native.heap import bound_heap
from cospadi.pipeline.memory import estimate, possible_layouts
from cospadi.pipeline.plan import make_plan
from cospadi.pipeline.recipe import Recipe

def status(key):
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1])

bound_heap()
torch.set_num_threads(1)
folder, is_streamed, metric = Path(sys.argv[1]), sys.argv[2] == "streamed", sys.argv[3]
source = open_streamed(folder) if is_streamed else open_source(folder)
targets, skipped = discover(source.model)
recipe = Recipe(output_metric=metric, backward_samples=2, samples=2, sequence_length=1024)
plan = make_plan(targets, skipped, recipe)
layout = next(
    found
    for found in possible_layouts(targets, recipe, spill=is_streamed, is_streamable=is_streamed)
    if found.is_streamed == is_streamed
)
needs = estimate(source.model, targets, plan, recipe, layout)
ids = torch.randint(2, source.model.config.vocab_size, (2, 1024))
before = status("RssAnon")
open("/proc/self/clear_refs", "w").write("5")
model = source if is_streamed else source.model
store = FisherStore(folder, model, ids, weights="w", seed=1, is_diagonal=metric == "diagonal", spill=folder)
store.prepare(targets)
names = [name for name in needs.stages if name.startswith("gradients")]
weights = 0 if is_streamed else sum(4 * p.numel() for p in source.model.parameters())
print(status("VmHWM") - status("RssFile") - before, max(needs.stages[n] for n in names) - weights)
"""


@pytest.mark.parametrize("metric", ["diagonal", "fisher"])
@pytest.mark.parametrize("way", ["loaded", "streamed"])
def test_gradients_stay_within_the_estimate(way, metric, tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    config = LlamaConfig.from_pretrained(folder)
    config.update(
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3, "head_dim": 32}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 1024}
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    done = subprocess.run(
        [sys.executable, "-c", GRADIENTS, str(folder), way, metric],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, bound = map(int, done.stdout.split())
    assert bound / 6 < peak <= bound


def test_a_streamed_model_never_lies_in_memory_as_a_whole(tiny_model_dir, tmp_path):
    from cospadi.model.streamed import open_streamed

    source = open_streamed(shutil.copytree(tiny_model_dir("llama"), tmp_path / "model"))
    first = source.model.get_submodule("model.layers.0")
    with source.resident("model.layers.1"):
        assert all(p.is_meta for p in first.parameters())
        held = [p for p in source.model.parameters() if not p.is_meta]
        other = source.model.get_submodule("model.layers.1")
        assert {id(p) for p in held} == {id(p) for p in other.parameters()}
    assert all(p.is_meta for p in source.model.parameters())


def test_workers_are_counted_until_the_result_is_written(tiny_model_dir):
    shapes = source_shapes(tiny_model_dir("llama")).model
    targets, skipped = discover(shapes)
    recipe = Recipe(ratio=0.3, samples=8, sequence_length=64)
    plan = make_plan(targets, skipped, recipe)
    (layout, *_) = possible_layouts(targets, recipe, spill=False, is_streamable=True)
    alone, three = (estimate(shapes, targets, plan, recipe, layout, n) for n in (0, 3))
    more = {stage: three.stages[stage] - alone.stages[stage] for stage in alone.stages}
    assert more.pop("writing") == 0
    fit = max(fit_bytes(m.d_in, m.d_out) for m in plan.modules)
    # the coordinator of workers has no fit of its own
    assert more["calibration"] >= 3 * fit and all(value > 0 for value in more.values())
