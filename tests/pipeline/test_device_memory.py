"""What a plan says about a GPU's memory, against the tensors counted on a pretended device."""

from __future__ import annotations

import functools

import pytest
import torch

from cospadi.calibration import backward, blockwise_statistics, placement
from cospadi.errors import InputError
from cospadi.learn.fit import FitSettings
from cospadi.learn.methods import factor_size
from cospadi.model.discover import discover
from cospadi.model.source import source_shapes
from cospadi.pipeline import compress as compress_module
from cospadi.pipeline import gradient_memory, grams
from cospadi.pipeline.compress import compress
from cospadi.pipeline.device_memory import (
    LIBRARY_BYTES,
    OMP_WORKSPACE_BYTES,
    DeviceNeeds,
    device_fit_bytes,
    estimate_device,
)
from cospadi.pipeline.fit_task import FitTask, InputMetric, Statistics, TaskMember, run_task
from cospadi.pipeline.plan import make_plan, storage_widths
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.resources import resources
from pretend_device import DEVICE, pretended_device

RISE = {"first_penalty": 0.05, "penalty_growth": 2.0}
RECIPES = [
    RISE,
    {**RISE, "ratio": 0.5},
    {**RISE, "dictionary": "auto"},
    {"dictionary": "learned", "iterations": 1},
    {"method": "svd-llm"},
    {"method": "compot"},
    {"method": "rocket"},
    {"method": "sparsegpt"},
    {"method": "gptq", "coeffs_dtype": "int4"},
    {"method": "wanda"},
]


def task(d_in, d_out, members, recipe):
    types = recipe.types_at(recipe.ratio, d_in)
    size = factor_size(
        recipe.method,
        d_in,
        d_out * members,
        recipe.ratio,
        k_over_s=recipe.rho,
        convention=recipe.ratio_convention,
        widths=storage_widths(types),
        dictionary=recipe.atoms,
        learned_share=recipe.learned_share,
    )
    settings = FitSettings(recipe.method, size, types, recipe.learn_options())
    generator = torch.Generator().manual_seed(0)
    parts = []
    for index in range(members):
        x = torch.randn(2 * d_in, d_in, generator=generator)
        gram = (x.T @ x).double()
        metric = InputMetric("x", gram)
        weight = torch.randn(d_out, d_in, generator=generator)
        parts.append(TaskMember(f"x{index}", weight, None, Statistics(gram, metric)))
    return FitTask(tuple(parts), settings, 1.0)


@pytest.mark.parametrize(("d_in", "d_out"), [(64, 64), (48, 192), (192, 48)])
@pytest.mark.parametrize("settings", RECIPES)
def test_tensors_of_fits_stay_within_the_bound(d_in, d_out, settings):
    with pretended_device() as mode:
        run_task(task(d_in, d_out, 1, Recipe(**settings)), device=DEVICE)
    bound = device_fit_bytes(d_in, d_out)
    assert bound / 5 < mode.peak_bytes <= bound


@pytest.mark.parametrize("members", [2, 3])
@pytest.mark.parametrize(("d_in", "d_out"), [(64, 64), (192, 48)])
def test_tensors_of_groups_stay_within_the_bound(d_in, d_out, members):
    recipe = Recipe(dictionary="learned", iterations=1, group_size=members)
    with pretended_device() as mode:
        run_task(task(d_in, d_out, members, recipe), device=DEVICE)
    assert mode.peak_bytes <= device_fit_bytes(d_in, members * d_out, members)


def needs_of(source, recipe) -> DeviceNeeds | str:
    shapes = source_shapes(source).model
    targets, skipped = discover(shapes)
    return estimate_device(shapes, targets, make_plan(targets, skipped, recipe), recipe)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("metric", ["none", "diagonal", "fisher"])
def test_tensors_of_a_job_stay_within_the_plan(
    family, is_resident, metric, tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    source = tiny_model_dir(family)
    settings = {**RISE, "ratio": 0.3, "samples": 8, "sequence_length": 48, "batch_size": 4}
    settings |= {"output_metric": metric, "backward_samples": 4}
    for module in (backward, gradient_memory):
        monkeypatch.setattr(module, "HEAD_VALUES", 1 << 14)
        monkeypatch.setattr(module, "HEAD_TOKENS", 1)
    if not is_resident:
        one_block = functools.partial(placement.placed, free_bytes=1)
        monkeypatch.setattr(blockwise_statistics, "placed", one_block)
        monkeypatch.setattr(grams, "placed", one_block)
    monkeypatch.setattr(compress_module, "checked_device", lambda device: DEVICE)
    with pretended_device() as mode:
        compress(source, tmp_path / "out", device="cuda", calibration=str(tiny_text), **settings)
    needs = needs_of(source, Recipe(**settings))
    stages = needs.resident if is_resident else needs.by_block
    assert mode.peak_bytes <= max(stages.values()) - LIBRARY_BYTES
    assert mode.peak_bytes > (max(stages.values()) - LIBRARY_BYTES) / 4


def test_a_model_that_is_to_stay_needs_twice_its_size(tiny_model_dir):
    needs = needs_of(tiny_model_dir("llama"), Recipe(ratio=0.3, samples=2, sequence_length=32))
    assert needs.by_block_peak < needs.resident["gradients"] <= needs.resident_peak
    huge = DeviceNeeds({"fits": 5}, None, 100, 0)
    assert huge.resident_peak == 200 and huge.by_block_peak is None


def test_no_text_moves_no_model_and_exact_pursuit_has_a_workspace(tiny_model_dir):
    source = tiny_model_dir("llama")
    recipe = {"ratio": 0.3, "dictionary": "learned"}
    needs = needs_of(source, Recipe(**recipe, calibration="none"))
    assert needs.resident == needs.by_block and needs.hidden_bytes == 0
    exact = needs_of(source, Recipe(**recipe, calibration="none", solver="omp"))
    assert exact.resident_peak - needs.resident_peak == OMP_WORKSPACE_BYTES


@pytest.mark.parametrize("setting", [{"sequential": True}, {"reconstruction": "blockwise"}])
def test_passes_that_keep_more_are_not_guessed(setting, tiny_model_dir):
    found = needs_of(tiny_model_dir("llama"), Recipe(ratio=0.3, dictionary="augmented", **setting))
    assert found == f"{next(iter(setting))} {next(iter(setting.values()))}"


def test_the_plan_has_it_as_data(tiny_model_dir):
    source, recipe = tiny_model_dir("llama"), Recipe(ratio=0.3)
    shapes = source_shapes(source).model
    targets, skipped = discover(shapes)
    plan = make_plan(targets, skipped, recipe)
    found = resources(source, shapes, targets, plan, recipe, device="cuda")
    (way,) = found["ways"]
    torch.set_num_threads(1)  # on a GPU fits follow one another, as on a single core
    on_cpu = resources(source, shapes, targets, plan, recipe)["ways"][0]
    needs = needs_of(source, recipe)
    assert way["stages"]["fits"] == on_cpu["stages"]["fits"] + needs.hidden_bytes
    assert "hidden states pinned" in way["how"] and found["seconds"] is None
    assert found["device"]["by_block"]["peak_bytes"] == needs.by_block_peak
    assert found["device"]["resident"]["peak_bytes"] == needs.resident_peak


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "tpu"}, "device: expected cpu or cuda, got 'tpu'"),
        ({"device": "cuda", "workers": 2}, "max_memory, workers"),
        ({"device": "cuda", "max_memory": "2GB"}, "max_memory, workers"),
    ],
)
def test_what_does_not_go_with_a_gpu_is_refused(given, message, tiny_model_dir):
    source, recipe = tiny_model_dir("llama"), Recipe(ratio=0.3)
    shapes = source_shapes(source).model
    targets, skipped = discover(shapes)
    plan = make_plan(targets, skipped, recipe)
    with pytest.raises(InputError, match=message):
        resources(source, shapes, targets, plan, recipe, **given)
