"""Recipes: three routes to the same settings, and clear refusals."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from cospadi.errors import InputError
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.recipe_file import (
    load_recipe,
    parse_setting,
    read_recipe,
    recipe_from_mapping,
)


def test_recipe_survives_yaml():
    recipe = Recipe(ratio=0.35, method="svd-llm", targets=(r".*q_proj",), seed=7)
    assert recipe_from_mapping(yaml.safe_load(recipe.to_yaml())).to_yaml() == recipe.to_yaml()


def test_overrides_survive_yaml():
    data = {
        "overrides": [{"match": ".*down_proj", "ratio": 0.1}, {"match": ".*q_proj", "dense": True}]
    }
    recipe = recipe_from_mapping(data)
    assert recipe.overrides[1].dense is True
    assert recipe_from_mapping(yaml.safe_load(recipe.to_yaml())).to_yaml() == recipe.to_yaml()


def test_an_integer_is_accepted_where_a_number_is_meant():
    assert recipe_from_mapping({"k_over_s": 3}).k_over_s == 3.0


BAD_SETTINGS = [
    ({"ratoi": 0.3}, "did you mean ratio"),
    ({"ratio": 1.0}, "ratio"),
    ({"ratio": "big"}, "ratio: expected a number"),
    ({"method": "magic"}, "method: expected one of"),
    ({"samples": 0}, "samples"),
    ({"samples": 2.5}, "samples"),
    ({"seed": -1}, "seed"),
    ({"targets": 3}, "targets"),
    ({"targets": ["("]}, "not a regular expression"),
    ({"overrides": [{"ratio": 0.1}]}, "match"),
    ({"overrides": [{"match": "x", "rank": 3}]}, "unknown key 'rank'"),
    ({"overrides": 5}, "overrides: expected a list"),
    ({"overrides": [{"match": "x", "k_over_s": "x"}]}, "'x': k_over_s: expected a number"),
    ({"overrides": [{"match": "x", "k_over_s": 0.5}]}, "k_over_s: .* at least 1"),
    ({"overrides": [{"match": "x", "ratio": True}]}, "'x': ratio: expected a number"),
    ({"overrides": [{"match": "x", "dense": "no"}]}, "dense: expected true or false"),
    ({"overrides": [{"match": "x", "dense": True, "ratio": 0.3}]}, "stays dense has no ratio"),
    ({"overrides": [{"match": "x"}]}, "sets nothing"),
    ({"max_gram_gb": -1}, "max_gram_gb: expected more than 0"),
    ({"storage_dtype": "int8"}, "storage_dtype"),
    (
        {"output_metric": "fisher", "dictionary": "learned"},
        "output_metric: fisher needs identity atoms",
    ),
    ({"reconstruction": "all"}, "reconstruction: expected one of none, blockwise"),
    ({"reconstruction": "blockwise", "bits": 4}, "reconstruction: moves floating-point"),
    (
        {"reconstruction": "blockwise", "dictionary_dtype": "int8"},
        "reconstruction: moves floating-point values only, and int8",
    ),
    (
        {"reconstruction": "blockwise", "coeffs_dtype": "bfloat14"},
        "reconstruction: moves floating-point values only, and bfloat14",
    ),
    ({"reconstruction": "blockwise", "calibration": "none"}, "reconstruction: needs calibrat"),
    ({"reconstruction": "blockwise", "samples": 1}, "reconstruction: needs two samples"),
    ({"reconstruction_rate": 1.5, "reconstruction": "blockwise"}, "reconstruction_rate"),
    ({"reconstruction_epochs": 0}, "reconstruction_epochs"),
    ({"allocation": "loss", "iterations": 3}, "allocation: loss needs identity atoms"),
    (
        {"allocation": "loss", "dictionary": "identity", "calibration": "none"},
        "allocation: loss needs calibration text",
    ),
    (
        {"allocation": "loss", "dictionary": "augmented", "group_size": 2},
        "allocation: loss works without groups",
    ),
    (
        {"allocation": "loss", "dictionary": "augmented", "ratio": 0.95},
        r"ratio: allocation by loss works from 0\.05 to 0\.9",
    ),
    ({"allocation_reach": 0.0}, "allocation_reach"),
    (
        {"dictionary": "augmented", "solver": "omp"},
        "solver: belongs to learned dictionaries, not to augmented ones",
    ),
    (
        {"dictionary": "identity", "overrides": [{"match": "x", "k_over_s": 3.0}]},
        "overrides.k_over_s: belongs to learned dictionaries",
    ),
    ({"bits": 4, "iterations": 20}, "iterations: belongs to learned dictionaries"),
    ({"bits": 4, "iterations": 8}, "iterations: .* give --ratio and --coeffs-dtype with"),
    ({"bits": 4, "dictionary": "augmented"}, "dictionary: augmented does not go with .* auto"),
    ({"target_size": "9MB", "dictionary": "learned"}, "dictionary: learned .* leave --dictionary"),
    ({"coeffs_dtype": "auto", "dictionary": "auto"}, "dictionary: auto .* --ratio with --coeffs"),
    ({"bits": 4, "preset": "best", "dictionary": "augmented"}, "dictionary: augmented does not"),
    ({"bits": 4, "dictionary": "none"}, "dictionary: expected one of"),
    ({"backward_samples": 0}, "backward_samples"),
    ({"recipe_version": 99}, "recipe_version"),
    ({"calibration": ""}, "calibration"),
    ({"shrinkage": "much"}, "shrinkage: expected a number"),
    ({"max_gram_gb": "8"}, "max_gram_gb: expected a number"),
    ({"coeffs_dtype": 8}, "coeffs_dtype: expected a name"),
    ({"coeffs_dtype": "int9"}, "coeffs_dtype: expected one of"),
    ({"dictionary_dtype": "int4"}, "dictionary_dtype: expected one of"),
    ({"coeffs_rounding": "up"}, "coeffs_rounding: expected one of"),
    ({"coeffs_group": -1}, "coeffs_group: expected 0 or a positive"),
    ({"overrides": [{"match": "x", "ratio": 1.5}]}, "'x': ratio: expected a removed share"),
    ({"overrides": [{"match": "("}]}, "overrides.match: '[(]' is not a regular expression"),
    ({"preset": ["best"]}, "preset: expected one of"),
    ({"preset": "best", "method": "svd-llm"}, "dictionary: svd-llm has its own"),
]


@pytest.mark.parametrize(("data", "message"), BAD_SETTINGS)
def test_bad_settings_are_named(data, message):
    with pytest.raises(InputError, match=message):
        recipe_from_mapping(data, source="my.yaml")


def test_command_line_settings_are_yaml_values():
    assert parse_setting("ratio=0.3") == ("ratio", 0.3)
    assert parse_setting("targets=[a, b]") == ("targets", ["a", "b"])
    for text in ("ratio", "=3", "ratio=[1"):
        with pytest.raises(InputError, match="--set"):
            parse_setting(text)


def test_a_key_given_twice_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("ratio: 0.2\nsamples: 8\nratio: 0.3\n")
    with pytest.raises(InputError, match=r"line 3: not valid YAML: key 'ratio' is given twice"):
        load_recipe(file)


def test_broken_recipe_file_names_the_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("ratio: 0.2\nmethod: [cospadi\n")
    with pytest.raises(InputError, match="line"):
        load_recipe(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")
    path.write_text("- a\n- b\n")
    with pytest.raises(InputError, match="key: value"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("data", "ratio", "coeffs"),
    [
        ({"bits": 4}, 0.75, "auto"),
        ({"bits": 3.25, "preset": "best"}, 1 - 3.25 / 16, "auto"),
        ({"bits": 8, "coeffs_dtype": "bfloat16", "dictionary": "identity"}, 0.5, "bfloat16"),
        ({"target_size": "120MB"}, 0.2, "auto"),
        ({"bits": 4, "dictionary": "identity"}, 0.75, "auto"),
    ],
)
def test_budgets_in_bits_and_bytes(data, ratio, coeffs):
    recipe = recipe_from_mapping(data)
    assert recipe.ratio == pytest.approx(ratio)
    assert recipe.coeffs_dtype == coeffs
    assert recipe.atoms == "identity"
    assert recipe_from_mapping(recipe.to_mapping()).to_mapping() == recipe.to_mapping()


def test_what_a_recipe_object_asks_for_is_not_ignored():
    with pytest.raises(InputError, match="dictionary: augmented does not go with coeffs_dtype"):
        Recipe(dictionary="augmented", coeffs_dtype="auto")
    written = recipe_from_mapping({"bits": 3.25, "preset": "best"}).to_mapping()
    assert written["dictionary"] == "identity"
    with pytest.raises(InputError, match="dictionary: learned does not go with coeffs_dtype"):
        dataclasses.replace(recipe_from_mapping(written), dictionary="learned")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("120MB", 120_000_000),
        ("1.5 GiB", 3 << 29),
        ("900kb", 900_000),
        ("12345", 12345),
        ("7b", 7),
        (2**20, 2**20),
    ],
)
def test_sizes_in_words(text, size):
    assert recipe_from_mapping({"target_size": text}).target_size == size


BAD_BUDGETS = [
    ({"bits": 4, "ratio": 0.5}, "one of ratio, bits and target_size, got ratio and bits"),
    (
        {"bits": 4, "ratio": 0.5, "recipe_version": 1},
        "one of ratio, bits and target_size, got ratio and bits",
    ),
    ({"bits": 0}, "bits: expected 0 to 16 per weight, got 0"),
    ({"bits": "four"}, "bits: expected 0 to 16"),
    ({"bits": 1.0}, "ratio: coeffs_dtype auto keeps at least 1.4 bits"),
    ({"target_size": "12 apples"}, "target_size: expected bytes such as 120MB"),
    ({"target_size": 0}, "target_size: expected a number of bytes, got 0"),
    ({"bits": 4, "method": "gptq"}, "auto works with method cospadi, got gptq"),
    ({"bits": 4, "group_size": 2}, "auto works with group_size 1, got 2"),
    ({"bits": 4, "coeffs_group": 64}, "auto works with coeffs_group 0, got 64"),
    ({"bits": 4, "ratio_convention": "nominal"}, "auto works with ratio_convention stored"),
]


@pytest.mark.parametrize(("data", "message"), BAD_BUDGETS)
def test_bad_budgets_are_named(data, message):
    with pytest.raises(InputError, match=message):
        recipe_from_mapping(data)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({}, "augmented"),
        ({"preset": "best"}, "augmented"),
        ({"preset": "paper"}, "learned"),
        ({"iterations": 8}, "learned"),  # the default value, but somebody asked for it
        ({"solver": "omp"}, "learned"),
        ({"overrides": [{"match": "x", "k_over_s": 3.0}]}, "learned"),
        ({"method": "svd-llm"}, "learned"),
        ({"coeffs_dtype": "int8"}, "identity"),
        ({"coeffs_dtype": "int8", "dictionary_dtype": "int8"}, "augmented"),
        ({"coeffs_dtype": "int8", "group_size": 2}, "augmented"),
        ({"coeffs_dtype": "bfloat14"}, "augmented"),
    ],
)
def test_atoms_where_nothing_is_said_about_them(data, kind):
    recipe = recipe_from_mapping(data)
    assert recipe.atoms == recipe.to_mapping()["dictionary"] == kind
    assert recipe_from_mapping(recipe.to_mapping()).to_mapping() == recipe.to_mapping()


@pytest.mark.parametrize(
    ("data", "written"),
    [
        ({"dictionary": "learned"}, 2.5),
        ({"dictionary": "auto"}, 2.5),
        ({"dictionary": "learned", "ratio_convention": "nominal"}, 2.0),
        ({"preset": "paper"}, 2.0),
        ({"preset": "paper", "ratio_convention": "stored"}, 2.0),
        ({"method": "compot"}, 2.0),
        ({"k_over_s": 3.0}, 3.0),
        ({}, None),  # augmented dictionaries have no K / s
        ({"dictionary": "identity"}, None),
    ],
)
def test_atoms_per_coefficient_where_nothing_is_said_about_them(data, written):
    recipe = recipe_from_mapping(data)
    assert recipe.to_mapping()["k_over_s"] == written
    assert recipe_from_mapping(recipe.to_mapping()).rho == recipe.rho


# ---- Lines of files --------------------------------------------------------------


def refused(path, text):
    """Line and message of the error that a file gives."""
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    found = re.match(rf"{re.escape(str(path))}(?: line (\d+))?: (.*)", str(caught.value), re.DOTALL)
    assert found is not None, caught.value
    return found[1] and int(found[1]), found[2]


@pytest.mark.parametrize(("data", "message"), BAD_SETTINGS + BAD_BUDGETS)
def test_every_error_names_the_line_of_its_setting(data, message, tmp_path):
    text = "# a comment\n\nrefit: true\n" + yaml.safe_dump(data, sort_keys=False)
    line, found = refused(tmp_path / "r.yaml", text)
    assert re.search(message, found)
    named = text.splitlines()[line - 1]
    key = re.match(r"(?:unknown setting \W?)?(\w+)", found)[1]
    if key in data and key != "overrides":
        assert named.startswith((f"{key}:", "- "))  # a list has a line for every entry
    else:
        assert any(named.lstrip("- ").startswith(name) for name in _keys(data))


def _keys(data):
    """Keys of settings and of overrides."""
    yield from data
    entries = data.get("overrides")
    for entry in entries if isinstance(entries, list) else ():
        yield from entry


OVERRIDES = r"""
ratio: 0.3

overrides:
  - match: '.*\.down_proj'
    ratio: 0.2
  - match: '.*\.up_proj'
    # why
    ratio: RATIO
  - {match: 'MATCH', KEY: true}
"""


@pytest.mark.parametrize(
    ("changes", "line", "message"),
    [
        ({"RATIO": "1.5"}, 9, "overrides, '.*up_proj': ratio: expected a removed share"),
        ({"RATIO": "big"}, 9, "ratio: expected a number, got 'big'"),
        ({"KEY": "dens"}, 10, "overrides: unknown key 'dens'"),
        ({"MATCH": "("}, 10, "overrides.match: .* not a regular expression"),
        ({"KEY": "dense: true, ratio"}, 10, "ratio: expected a number, got True"),
        ({"RATIO": "0.2\n    rank: 8"}, 10, "unknown key 'rank'"),
        ({"match: 'x', ": ""}, 10, "each entry needs a 'match'"),
    ],
)
def test_errors_in_overrides_have_lines_of_their_own(changes, line, message, tmp_path):
    text = OVERRIDES
    for old, new in {"RATIO": "0.2", "MATCH": "x", "KEY": "dense", **changes}.items():
        text = text.replace(old, new)
    found, shown = refused(tmp_path / "r.yaml", text)
    assert found == line and re.search(message, shown)


def test_a_setting_of_overrides_that_does_not_fit_the_rest_has_its_line(tmp_path):
    text = "dictionary: identity\noverrides:\n  - match: x\n    k_over_s: 3.0\n"
    line, message = refused(tmp_path / "r.yaml", text)
    assert line == 4 and message.startswith("overrides.k_over_s: belongs to learned")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("samples: 8\nbits: 1.0\n", 2, "ratio: coeffs_dtype auto keeps"),
        ("bits: 4\nmethod: gptq\n", 1, "coeffs_dtype: auto works with method"),
        ("samples: 8\npreset: best\ncalibration: none\n", 2, "output_metric: fisher needs"),
        ("ratio: 0.2\nbits: 4\n", 2, "give one of ratio, bits and target_size"),
        ("ratio: 0.2\nratoi: 0.3\nsamples: x\n", 2, "unknown setting 'ratoi'; did you mean"),
        ("3: 4\n", 1, "unknown setting 3"),
    ],
)
def test_what_another_setting_stands_for_is_found(text, line, message, tmp_path):
    found, shown = refused(tmp_path / "r.yaml", text)
    assert found == line and shown.startswith(message)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 8),
        ({"output_metric": "diagonal"}, 8),
        ({"output_metric": "fisher"}, 32),
        ({"allocation": "loss"}, 32),
        ({"output_metric": "diagonal", "backward_samples": 3}, 3),
    ],
)
def test_windows_that_run_backwards_follow_what_they_are_for(settings, expected):
    recipe = Recipe(**settings)
    assert recipe.backward_windows == recipe.to_mapping()["backward_samples"] == expected
    assert recipe_from_mapping(recipe.to_mapping()).to_mapping() == recipe.to_mapping()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "diagonal"),
        ({"preset": "best"}, "fisher"),
        ({"preset": "paper"}, "none"),
        ({"dictionary": "identity"}, "diagonal"),
        ({"dictionary": "auto"}, "diagonal"),
        ({"dictionary": "learned"}, "none"),
        ({"group_size": 2}, "diagonal"),
        ({"bits": 4}, "diagonal"),
        ({"calibration": "none"}, "none"),
        ({"method": "sparsegpt"}, "none"),
        ({"output_metric": "none"}, "none"),
    ],
)
def test_metric_where_nothing_is_said_about_it(settings, expected):
    recipe = recipe_from_mapping(settings)
    assert recipe.metric == recipe.to_mapping()["output_metric"] == expected
    assert recipe.uses_gradients == (expected != "none" or recipe.allocation == "loss")


def test_what_is_chosen_follows_settings_that_change():
    recipe = dataclasses.replace(Recipe(), dictionary="learned")
    assert (recipe.atoms, recipe.metric) == ("learned", "none")
    recipe = dataclasses.replace(Recipe(), method="svd-llm")
    assert (recipe.atoms, recipe.metric) == ("learned", "none")
