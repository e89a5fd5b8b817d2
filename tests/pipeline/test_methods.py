"""Every method and storage form from a dense folder to a loaded model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

import cospadi
from cospadi.checkpoint.reader import read_checkpoint
from cospadi.errors import InputError
from cospadi.learn.methods import METHODS
from cospadi.pipeline.compress import compress
from cospadi.pipeline.inspect import inspect_checkpoint
from cospadi.pipeline.open_model import export_model, open_model
from cospadi.pipeline.presets import PRESETS
from cospadi.pipeline.recipe import Override, Recipe
from cospadi.pipeline.recipe_file import recipe_from_mapping
from cospadi.pipeline.verify import verify_checkpoint, verify_errors

BASE = {"ratio": 0.3, "samples": 12, "sequence_length": 64}
FAST = {**BASE, "iterations": 2}


@pytest.fixture(scope="session")
def ids():
    return torch.randint(2, 380, (2, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def job(tiny_model_dir, tiny_text, tmp_path):
    """Compress a tiny model: (source, output, result)."""

    def run(family="llama", name="out", **settings):
        source, out = tiny_model_dir(family), tmp_path / name
        common = BASE if "dictionary" in settings else FAST
        settings = {**common, "calibration": str(tiny_text), **settings}
        return source, out, compress(source, out, **settings)

    return run


def assert_loads_like_its_export(out, ids, tmp_path):
    model, _ = cospadi.load(out, dtype=torch.float32)
    export_model(out, tmp_path / "dense", dtype="float32")
    dense, _ = open_model(tmp_path / "dense")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_compresses_loads_and_states_its_error(method, job, ids, tmp_path):
    source, out, result = job(method=method, measure_on_calibration=True)
    assert result.failed == ()
    assert verify_checkpoint(out) == 14
    assert verify_errors(out, source) < 1e-3
    assert_loads_like_its_export(out, ids, tmp_path)
    data = inspect_checkpoint(out)
    if METHODS[method].has_ratio:
        assert data["ratio"]["linears"]["stored"] >= 0.3
    for module in data["modules"].values():
        assert module["file_bytes"] == module["stored_bytes"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"dictionary": "identity"},
        {"dictionary": "augmented"},
        {"dictionary": "augmented", "coeffs_dtype": "int8", "dictionary_dtype": "int8"},
        {"dictionary": "augmented", "group_size": 2, "learned_share": 0.3},
    ],
    ids=str,
)
def test_identity_atoms_with_and_without_learned_ones(settings, family, job, ids, tmp_path):
    if family == "gpt2" and "group_size" in settings:
        settings = {**settings, "group_targets": [r".*c_attn"]}
    source, out, result = job(family, **settings)
    assert result.failed == ()
    assert result.ratio["stored"] >= 0.3
    for module in result.plan.modules:
        assert module.n_identity == module.d_in
        assert (module.n_atoms > 0) == (settings["dictionary"] == "augmented")
    assert verify_errors(out, source) < 1e-3
    assert_loads_like_its_export(out, ids, tmp_path)


def test_identity_atoms_need_the_method_that_codes_over_them():
    with pytest.raises(InputError, match="dictionary: wanda has its own"):
        Recipe(method="wanda", dictionary="augmented")


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_pruning_keeps_biases_and_transposed_layers(family, job, ids, tmp_path):
    _, out, result = job(family, method="wanda")
    assert result.failed == ()
    assert_loads_like_its_export(out, ids, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"coeffs_dtype": "bfloat14"},
        {"coeffs_dtype": "bfloat14", "coeffs_rounding": "truncate"},
        {"coeffs_dtype": "int8"},
        {"coeffs_dtype": "int8", "coeffs_group": 4},
        {"coeffs_dtype": "int4", "dictionary_dtype": "int8"},
        {"method": "svd-llm", "coeffs_dtype": "int8", "dictionary_dtype": "int8"},
        {"method": "wanda", "coeffs_dtype": "int4"},
        {"method": "rtn", "coeffs_dtype": "int4", "coeffs_group": 8},
        {"method": "gptq", "coeffs_dtype": "int4", "coeffs_group": 8},
    ],
    ids=str,
)
def test_packed_storage_has_the_stated_bytes_and_errors(settings, job, ids, tmp_path):
    source, out, result = job(measure_on_calibration=True, **settings)
    assert result.failed == ()
    assert verify_errors(out, source) < 1e-3
    assert_loads_like_its_export(out, ids, tmp_path)
    data = inspect_checkpoint(out)
    assert data["ratio"]["linears"]["file"] == pytest.approx(result.plan.ratio["stored"], abs=1e-12)


def test_refit_after_rounding_lowers_the_error(job):
    errors = {}
    for refit in (True, False):
        _, _, result = job(name=f"refit-{refit}", coeffs_dtype="int4", refit=refit)
        errors[refit] = sum(report["relative_error"] ** 2 for report in result.reports.values())
    assert errors[True] < errors[False]


@pytest.mark.parametrize("method", ["cospadi", "basis-sharing"])
def test_groups_share_one_dictionary_and_round_trip(method, job, ids, tmp_path):
    source, out, result = job(method=method, group_size=2)
    leaders = {module.name: module.leader for module in result.plan.modules}
    assert leaders["model.layers.1.self_attn.q_proj"] == "model.layers.0.self_attn.q_proj"
    assert leaders["model.layers.1.mlp.down_proj"] == "model.layers.1.mlp.down_proj"
    tensors = load_file(out / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.dictionary" in tensors
    assert "model.layers.1.self_attn.q_proj.dictionary" not in tensors
    assert verify_errors(out, source) < 1e-3
    assert_loads_like_its_export(out, ids, tmp_path)
    model, _ = cospadi.load(out)
    model.save_pretrained(tmp_path / "saved")
    for name, tensor in load_file(tmp_path / "saved/model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name
    data = inspect_checkpoint(out)
    assert (
        0.3 <= data["ratio"]["linears"]["file"] == pytest.approx(data["ratio"]["linears"]["stored"])
    )


def test_a_group_of_one_is_the_single_fit_to_the_bit(job):
    _, single, _ = job(name="single")
    # with three layers per group and patterns that match one projection of one layer, every group has one member
    _, grouped, _ = job(
        name="grouped", group_size=3, group_targets=(r"model\.layers\.0\.self_attn\.q_proj",)
    )
    expected = load_file(single / "model.safetensors")
    for name, tensor in load_file(grouped / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_exact_objective_is_not_above_the_averaged_one(job):
    _, _, result = job(group_size=2, group_objective="exact")
    checked = 0
    for report in result.reports.values():
        errors = report["group_errors"]
        if errors:
            checked += 1
            assert min(errors) <= errors[0]
    assert checked


@pytest.mark.parametrize("calibration", [True, False])
def test_similar_layers_are_found_and_share(calibration, job, tiny_text, ids, tmp_path):
    settings = {} if calibration else {"calibration": "none"}
    _, out, result = job(group_size=2, grouping="similarity", **settings)
    assert any(module.leader != module.name for module in result.plan.modules)
    assert_loads_like_its_export(out, ids, tmp_path)


def test_an_interrupted_grouped_run_resumes_to_the_same_bytes(
    job, tiny_model_dir, tiny_text, tmp_path
):
    _, undisturbed, _ = job(name="undisturbed", group_size=2)

    class Stop(BaseException):
        pass

    def dying(event):
        # after one member of the first group was stored, before the other
        if event["event"] == "module":
            raise Stop

    settings = {**FAST, "calibration": str(tiny_text), "group_size": 2}
    out = tmp_path / "resumed"
    with pytest.raises(Stop):
        compress(tiny_model_dir("llama"), out, listener=dying, **settings)
    compress(tiny_model_dir("llama"), out, **settings)
    expected = load_file(undisturbed / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("shrinkage", [0.5, None])
def test_sequential_calibration_compresses_and_resumes(
    shrinkage, job, ids, tiny_model_dir, tiny_text, tmp_path
):
    settings = {"sequential": True, "shrinkage": shrinkage}
    _, out, result = job(name="undisturbed", **settings)
    assert result.failed == ()
    assert_loads_like_its_export(out, ids, tmp_path)

    class Stop(BaseException):
        pass

    def dying(event):
        if event["event"] == "module" and event["index"] == 6:
            raise Stop

    again = tmp_path / "again"
    settings = {**FAST, "calibration": str(tiny_text), **settings}
    with pytest.raises(Stop):
        compress(tiny_model_dir("llama"), again, listener=dying, **settings)
    compress(tiny_model_dir("llama"), again, **settings)
    expected = load_file(out / "model.safetensors")
    for name, tensor in load_file(again / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_stored_grams_give_the_same_bytes(job, tiny_model_dir, tiny_text, tmp_path):
    settings = {**FAST, "calibration": str(tiny_text)}
    _, plain, _ = job(name="plain")
    events = []
    for name in ("first", "second"):
        compress(
            tiny_model_dir("llama"), tmp_path / name, gram_cache=tmp_path / "grams",
            listener=events.append, **settings,
        )  # fmt: skip
    expected = load_file(plain / "model.safetensors")
    for name in ("first", "second"):
        for key, tensor in load_file(tmp_path / name / "model.safetensors").items():
            assert torch.equal(tensor, expected[key]), (name, key)
    # the model ran over the text once only
    starts = [index for index, event in enumerate(events) if event["event"] == "start"]
    assert any(e["event"] == "calibration" for e in events[: starts[1]])
    assert not any(e["event"] == "calibration" for e in events[starts[1] :])


def test_data_free_mode_needs_no_text(tiny_model_dir, tmp_path, ids):
    result = compress(
        tiny_model_dir("llama"), tmp_path / "out", ratio=0.3, iterations=1, calibration="none"
    )
    report = json.loads((tmp_path / "out/cospadi_report.json").read_text())
    assert report["calibration"] is None
    for module in result.reports.values():
        assert module["relative_error"] == pytest.approx(module["weight_error"], rel=1e-6)


def test_preset_paper_is_the_papers_setting(job):
    recipe = recipe_from_mapping({"preset": "paper", "iterations": 2, "samples": 8})
    assert (recipe.power_iterations, recipe.block_size, recipe.sweeps) == (8, 1, 1)
    assert recipe.init == "columns" and not recipe.refit and recipe.samples == 8
    settings = dataclasses.asdict(recipe)
    for key in ("calibration", "samples", "sequence_length", "iterations", "ratio"):
        del settings[key]
    _, out, result = job(**settings)
    # Eq. 11: at K / s = 2 the bytes with 14-bit coefficients are those of the values, padding aside
    assert result.plan.ratio["stored"] == pytest.approx(result.plan.ratio["values"], abs=0.02)
    assert read_checkpoint(out).data.modules["model.layers.0.mlp.up_proj"].spec.is_packed


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_valid_recipes(name):
    assert recipe_from_mapping({"preset": name}) == Recipe(**PRESETS[name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "svd", "group_size": 2}, "shares no dictionaries"),
        ({"sequential": True, "group_size": 2}, "fitted together"),
        ({"sequential": True, "calibration": "none"}, "needs calibration text"),
        ({"method": "rtn", "coeffs_dtype": "bfloat16"}, "needs an integer type"),
        ({"coeffs_dtype": "int9"}, "expected one of"),
        ({"coeffs_group": 16}, "no scales"),
        ({"shrinkage": 1.5}, "0 to 1"),
        ({"preset": "quick"}, "preset: expected one of"),
        ({"group_size": 0}, "at least 1"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        recipe_from_mapping(settings)


def test_group_targets_that_match_nothing_are_an_error(job):
    with pytest.raises(InputError, match="group_targets"):
        job(group_size=2, group_targets=("nothing",))


def test_layers_with_other_settings_do_not_share(job):
    override = Override(match=r"model\.layers\.1\..*", ratio=0.5)
    _, _, result = job(group_size=2, overrides=(override,))
    assert all(module.leader == module.name for module in result.plan.modules)


@pytest.mark.parametrize("types", [{}, {"coeffs_dtype": "int8"}])
def test_chosen_dictionaries_fit_the_budget_and_load(types, job, ids, tmp_path):
    settings = {"dictionary": "auto", "ratio": 0.4, "penalty_growth": 1.5, **types}
    events = []
    source, out, result = job(name="auto", listener=events.append, **settings)
    assert result.failed == ()
    assert 0.4 <= result.ratio["stored"] < 0.5  # eight bits for all weights cannot use more
    assert_loads_like_its_export(out, ids, tmp_path)
    assert verify_errors(out, source) < 1e-3
    modules = inspect_checkpoint(out)["modules"]
    for event in events:
        if event["event"] == "module":
            module = modules[event["module"]]
            for key in ("n_identity", "n_atoms", "sparsity"):
                assert event[key] == module[key]
    # what it chose among is never better
    corner = {**settings, "dictionary": "identity"}
    _, _, identity = job(name="corner", **corner)
    for name, report in result.reports.items():
        assert report["relative_error"] <= identity.reports[name]["relative_error"] * 1.001, name
