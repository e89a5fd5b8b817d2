"""Recipes from outside: YAML files, keywords and ``--set``, checked key by key."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from cospadi.errors import InputError
from cospadi.learn.budget import VALUE_BITS
from cospadi.learn.widths import AUTO, removed_share
from cospadi.pipeline.presets import PRESETS
from cospadi.pipeline.recipe import (
    BUDGETS,
    LEARNED_ONLY,
    RECIPE_VERSION,
    Override,
    Recipe,
    SettingError,
    not_learned,
)
from cospadi.pipeline.strict_yaml import YamlError, parse_yaml

KeyPath = tuple[str | int, ...]

Lines = Mapping[KeyPath, int]
"""Line of a file, from 1, by the path of a key (`SettingError.path`)."""

_OF_BUDGET = (*BUDGETS, "coeffs_dtype")
"""Settings that another budget may have set."""


@dataclasses.dataclass(frozen=True)
class RecipeFile:
    """Settings of a file, not yet checked, and where they stand."""

    data: dict[str, Any]
    lines: dict[KeyPath, int]


def read_recipe(path: str | Path) -> Recipe:
    """The recipe of a YAML file; errors name the line."""
    file = read_recipe_file(path)
    return recipe_from_mapping(file.data, source=str(path), lines=file.lines)


def recipe_over_file(path: str | Path, chosen: Mapping[str, Any]) -> Recipe:
    """The recipe of a YAML file with settings over it; a budget among them replaces the file's, in whatever unit.

    Errors name the line of what stands in the file.
    """
    file = read_recipe_file(path)
    try:
        _check_one_budget(chosen)
    except SettingError as error:
        raise SettingError(f"settings: {error}", *error.path) from None
    has_budget = any(key in chosen for key in BUDGETS)
    kept = {k: v for k, v in file.data.items() if not (has_budget and k in BUDGETS)}
    lines = {place: line for place, line in file.lines.items() if place[0] not in chosen}
    return recipe_from_mapping(kept | dict(chosen), source=str(path), lines=lines)


def recipe_from_mapping(
    data: Mapping[str, Any], *, source: str = "recipe", lines: Lines | None = None
) -> Recipe:
    """Build a recipe from plain data.

    Parameters
    ----------
    data : mapping
        Settings; beside those of `Recipe` also ``preset`` and ``bits``.
    source : str
        Where they come from, for errors.
    lines : mapping, optional
        Where in the source each setting stands, for errors.

    Raises
    ------
    InputError
        An unknown key, a wrong type or value, settings that do not go together; the message names source, line and key.
    """
    try:
        return _build(data)
    except InputError as error:
        path = _path_of(error)
        line = _line_of(path, lines or {})
        where = source if line is None else f"{source} line {line}"
        raise SettingError(f"{where}: {error}", *path) from None


def _build(data: Mapping[str, Any]) -> Recipe:
    values = dict(data)
    preset = values.pop("preset", None)
    if preset is not None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        values = {**PRESETS[preset], **values}
    _set_budget(values, data)
    is_auto = values.get("coeffs_dtype") == AUTO
    if is_auto and data.get("dictionary") is None:
        # the dictionary of a preset is for other types; one that was asked for is checked by the recipe
        values.pop("dictionary", None)
    asked = [key for key in LEARNED_ONLY if values.get(key) is not None]
    if asked and values.get("dictionary") is None:
        # a written recipe names its dictionary
        if is_auto:
            raise not_learned(asked[0], "identity", AUTO)
        values["dictionary"] = "learned"
    version = values.pop("recipe_version", RECIPE_VERSION)
    if version != RECIPE_VERSION:
        raise InputError(f"recipe_version: {version!r} is not {RECIPE_VERSION}")
    hints = get_type_hints(Recipe)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(hints)}"
            raise SettingError(f"unknown setting {key!r}{hint}", str(key))
        if key in ("targets", "ignore", "group_targets"):
            values[key] = _string_tuple(value, key)
        elif key == "overrides":
            entries = value or ()
            if not isinstance(entries, (list, tuple)):
                raise InputError(f"overrides: expected a list of entries, got {entries!r}")
            values[key] = tuple(_override(entry, i) for i, entry in enumerate(entries))
        else:
            values[key] = _checked(key, value, hints[key])
    return Recipe(**values)


def _path_of(error: InputError) -> KeyPath:
    """Where the setting of an error stands; messages begin with the setting's name."""
    if isinstance(error, SettingError):
        return error.path
    return tuple(re.split(r"[:,]", str(error), maxsplit=1)[0].split("."))


def _line_of(path: KeyPath, lines: Lines) -> int | None:
    """Line of a setting, of what it is a part of, or of what stands for it in the file."""
    candidates: list[KeyPath] = [path[:n] for n in range(len(path), 0, -1)]
    if path[:1] == ("overrides",) and not any(isinstance(part, int) for part in path):
        # a key that no override may have here
        candidates = [p for p in lines if p[:1] == path[:1] and p[-1:] == path[-1:]] + candidates
    if path[0] in _OF_BUDGET:
        candidates += [(name,) for name in BUDGETS]
    candidates.append(("preset",))
    return next((lines[p] for p in candidates if p in lines), None)


def _set_budget(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Replace ``bits`` and a size in words by settings; such a budget leaves the type of coefficients open."""
    _check_one_budget(given)
    bits = values.pop("bits", None)
    if bits is not None:
        if (
            isinstance(bits, bool)
            or not isinstance(bits, (int, float))
            or not 0 < bits < VALUE_BITS
        ):
            raise InputError(f"bits: expected 0 to {VALUE_BITS} per weight, got {bits!r}")
        values["ratio"] = removed_share(bits)
    size = values.get("target_size")
    if isinstance(size, str):
        values["target_size"] = parse_size(size)
    if (bits is not None or size is not None) and values.get("coeffs_dtype") is None:
        values["coeffs_dtype"] = AUTO


def _check_one_budget(given: Mapping[str, Any]) -> None:
    """Refuse two budgets, of which one would be ignored."""
    named = [key for key in given if key in BUDGETS and given[key] is not None]
    if "recipe_version" in given and "bits" not in named:
        return  # a written recipe holds the ratio that its target size led to
    if len(named) > 1:
        listed = " and ".join(key for key in BUDGETS if key in named)
        raise SettingError(f"give one of ratio, bits and target_size, got {listed}", named[-1])


MAX_RECIPE_BYTES = 1_000_000


def parse_size(text: str | int, setting: str = "target_size") -> int:
    """Bytes of ``120MB``, ``1.5 GB``, ``900 KiB`` or a plain number."""
    match = re.fullmatch(
        r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?\s*", str(text).lower(), re.ASCII
    )
    if match is None or (match[3] and not match[2]):
        raise InputError(f"{setting}: expected bytes such as 120MB or 1.5GiB, got {text!r:.80}")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " kmgt".index(match[2] or " "))


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Settings of a YAML recipe file, not yet checked."""
    return read_recipe_file(path).data


def read_recipe_file(path: str | Path) -> RecipeFile:
    """Settings of a YAML recipe file, not yet checked, with their lines."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_RECIPE_BYTES:
            raise InputError(f"recipe {file}: more than {MAX_RECIPE_BYTES} bytes")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {file}: cannot be read: {error}") from None
    try:
        data, node = parse_yaml(text)
    except YamlError as error:
        line = "" if error.line is None else f" line {error.line}"
        raise InputError(f"recipe {file}{line}: {error}") from None
    lines = _lines(node)
    if data is None:
        return RecipeFile({}, {})
    if not isinstance(data, dict):
        raise InputError(f"recipe {file}: expected key: value lines at top level")
    return RecipeFile(data, lines)


def _lines(node: yaml.Node | None, path: KeyPath = ()) -> dict[KeyPath, int]:
    """Line of every key, and of every entry of a list, to the depth that recipes have."""
    found: dict[KeyPath, int] = {}
    parts: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        parts = [(str(key.value), key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        parts = [(i, item, item) for i, item in enumerate(node.value)]
    for name, marked, value in parts:
        here = (*path, name)
        found[here] = marked.start_mark.line + 1
        if len(path) < 2:
            found |= _lines(value, here)
    return found


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` of the command line; the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {text!r}: expected key=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--set {text!r}: the value is not valid YAML") from None


def _string_tuple(value: object, name: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if items is None:
        return ()
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise InputError(f"{name}: expected a list of regular expressions, got {value!r}")
    return tuple(items)


def _override(data: object, place: int) -> Override:
    if isinstance(data, Override):
        return data
    if not isinstance(data, Mapping) or "match" not in data:
        raise SettingError(
            f"overrides: each entry needs a 'match', got {data!r}", "overrides", place
        )
    known = {f.name for f in dataclasses.fields(Override)}
    for key in map(str, data):
        if key not in known:
            raise SettingError(f"overrides: unknown key {key!r}", "overrides", place, key)
    return Override(**data)


_EXPECTED = {float: "a number", str: "a name"}


def _checked(key: str, value: object, hint: Any) -> object:  # noqa: ANN401
    """Accept an int where a float is meant; refuse other wrong scalar types with a clear text."""
    kinds = get_args(hint) or (hint,)
    if value is None and type(None) in kinds:
        return None
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # names out of a list, and integers with bounds, are checked by the recipe
    expected = next((kind for kind in (float, str) if kind in kinds), None)
    if expected is not None and not isinstance(value, expected):
        raise InputError(f"{key}: expected {_EXPECTED[expected]}, got {value!r}")
    return value
