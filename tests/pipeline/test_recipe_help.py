"""What is told about settings: complete, true, and usable as a file."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from cospadi.learn.options import LearnOptions
from cospadi.pipeline.presets import PRESETS
from cospadi.pipeline.recipe import Override, Recipe
from cospadi.pipeline.recipe_file import recipe_from_mapping
from cospadi.pipeline.recipe_help import (
    EXAMPLE_OVERRIDES,
    ONLY_IN_FILES,
    choices,
    meanings,
    schema,
    settings,
    starting_file,
)

NAMES = [f.name for f in dataclasses.fields(Recipe)]


def test_every_setting_has_a_meaning():
    told = settings()
    assert list(told) == NAMES
    for name, meaning in told.items():
        assert meaning.endswith(".") and not meaning.startswith("See ") and "`" not in meaning, name
    assert set(meanings(LearnOptions)) == {f.name for f in dataclasses.fields(LearnOptions)}
    assert told["k_over_s"].startswith("Atoms per coefficient of a column; null: 2.5 where")
    assert told["power_iterations"] == "Of ksvd: power iterations per atom (the paper: 8)."


@pytest.mark.parametrize("name", sorted(set(choices()) - {"preset"}))
def test_choices_are_those_that_the_recipe_accepts(name):
    with pytest.raises(ValueError, match=f"{name}: expected one of (.*), got 'nonsense'") as caught:
        recipe_from_mapping({name: "nonsense"})
    listed = str(caught.value).partition("one of ")[2].partition(", got")[0].split(", ")
    assert set(choices()[name]) - {"auto"} == set(listed) - {"auto"}


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_new_file_means_what_its_preset_means(preset):
    wanted = recipe_from_mapping({"preset": preset})
    assert recipe_from_mapping(yaml.safe_load(starting_file(preset))) == wanted


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_every_line_of_a_new_file_may_be_uncommented(preset):
    text = starting_file(preset)
    wanted = recipe_from_mapping({"preset": preset})
    shown = dict(wanted.to_mapping(), preset=preset or "fast", bits=None)
    for name in [*ONLY_IN_FILES, *NAMES]:
        lines = text.splitlines()
        (at,) = [i for i, x in enumerate(lines) if x.removeprefix("# ").startswith(f"{name}:")]
        while at < len(lines) and lines[at]:  # the values of a list are on lines of their own
            lines[at] = lines[at].removeprefix("# ")
            at += 1
        data = yaml.safe_load("\n".join(lines))
        depends = ("dictionary", "output_metric", "backward_samples")
        if name not in depends or data[name] is not None:
            assert data[name] == shown[name], name
        recipe_from_mapping(data)


def test_the_example_of_overrides_works():
    recipe = recipe_from_mapping({"overrides": yaml.safe_load(EXAMPLE_OVERRIDES)})
    assert recipe.overrides == (Override(r".*\.down_proj", ratio=0.1),)
    assert EXAMPLE_OVERRIDES in starting_file()


def accepts(entry, value):
    """Whether a schema entry of the kind that is used here takes a value."""
    if "const" in entry:
        return value == entry["const"]
    if "enum" in entry:
        return value in entry["enum"]
    kinds = {"number": (int, float), "integer": int, "boolean": bool, "string": str, "array": list}
    named = entry["type"] if isinstance(entry["type"], list) else [entry["type"]]
    if value is None or isinstance(value, bool):
        return ("null" if value is None else "boolean") in named
    return any(isinstance(value, kinds[kind]) for kind in named if kind != "null")


def test_the_schema_accepts_what_recipes_accept():
    properties = schema()["properties"]
    assert set(properties) == {*NAMES, *ONLY_IN_FILES, "recipe_version"}
    for data in (Recipe().to_mapping(), *PRESETS.values(), {"bits": 4, "preset": "best"}):
        for name, value in data.items():
            assert accepts(properties[name], value), (name, value)
    for name, value in {"ratio": "big", "method": "magic", "samples": True, "refit": 1}.items():
        assert not accepts(properties[name], value), name
    inner = properties["overrides"]["items"]
    assert set(inner["properties"]) == {f.name for f in dataclasses.fields(Override)}
    assert inner["required"] == ["match"] and not inner["additionalProperties"]
