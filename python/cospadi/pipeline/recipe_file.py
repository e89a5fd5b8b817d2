"""Recipes from outside: YAML files, keywords and ``--set``, checked key by key."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cospadi.errors import InputError
from cospadi.learn.budget import VALUE_BITS
from cospadi.learn.widths import AUTO, removed_share
from cospadi.pipeline.presets import PRESETS
from cospadi.pipeline.recipe import BUDGETS, LEARNED_ONLY, RECIPE_VERSION, Override, Recipe


def recipe_from_mapping(data: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Build a recipe from plain data; unknown keys and wrong types are errors that name ``source``."""
    values = dict(data)
    preset = values.pop("preset", None)
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(
                f"{source}: preset: expected one of {', '.join(PRESETS)}, got {preset!r}"
            )
        values = {**PRESETS[preset], **values}
    _set_budget(values, data, source)
    if values.get("dictionary") is None and any(
        values.get(key) is not None for key in LEARNED_ONLY
    ):
        # a written recipe names its dictionary
        values["dictionary"] = "learned"
    version = values.pop("recipe_version", RECIPE_VERSION)
    if version != RECIPE_VERSION:
        raise InputError(f"{source}: recipe_version {version!r} is not {RECIPE_VERSION}")
    known = {f.name: f for f in dataclasses.fields(Recipe)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise InputError(f"{source}: unknown setting {key!r}{hint}")
    for key in ("targets", "ignore", "group_targets"):
        if key in values:
            values[key] = _string_tuple(values[key], f"{source}: {key}")
    if "overrides" in values:
        entries = values["overrides"] or ()
        if not isinstance(entries, (list, tuple)):
            raise InputError(f"{source}: overrides: expected a list of entries, got {entries!r}")
        values["overrides"] = tuple(_override(entry, source) for entry in entries)
    for key, value in values.items():
        values[key] = _coerce(key, value, known[key].type, source)
    try:
        return Recipe(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _set_budget(values: dict[str, Any], given: Mapping[str, Any], source: str) -> None:
    """Replace ``bits`` and a size in words by settings; such a budget leaves the type of coefficients open."""
    named = [key for key in BUDGETS if given.get(key) is not None]
    # a written recipe holds the ratio that its target size led to
    if len(named) > 1 and "recipe_version" not in given:
        raise InputError(
            f"{source}: give one of ratio, bits and target_size, got {' and '.join(named)}"
        )
    bits = values.pop("bits", None)
    if bits is not None:
        if (
            isinstance(bits, bool)
            or not isinstance(bits, (int, float))
            or not 0 < bits < VALUE_BITS
        ):
            raise InputError(f"{source}: bits: expected 0 to {VALUE_BITS} per weight, got {bits!r}")
        values["ratio"] = removed_share(bits)
    size = values.get("target_size")
    if isinstance(size, str):
        values["target_size"] = parse_size(size)
    if (bits is not None or size is not None) and values.get("coeffs_dtype") is None:
        values["coeffs_dtype"] = AUTO


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                continue  # refused below
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} is given twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def parse_size(text: str) -> int:
    """Bytes of ``120MB``, ``1.5 GB``, ``900 KiB`` or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?\s*", text.lower())
    if match is None or (match[3] and not match[2]):
        raise InputError(f"target_size: expected bytes such as 120MB or 1.5GiB, got {text!r}")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " kmg".index(match[2] or " "))


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Settings of a YAML recipe file, not yet checked."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {file}: cannot be read: {error}") from None
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where is not None else ""
        problem = getattr(error, "problem", None)
        detail = f": {problem}" if problem else ""
        raise InputError(f"recipe {file}{line}: not valid YAML{detail}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"recipe {file}: expected key: value lines at top level")
    return data


def parse_setting(text: str) -> tuple[str, Any]:
    """``key=value`` of the command line; the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {text!r}: expected key=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--set {text!r}: the value is not valid YAML") from None


def _string_tuple(value: object, what: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if items is None:
        return ()
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise InputError(f"{what}: expected a list of regular expressions, got {value!r}")
    return tuple(items)


def _override(data: object, source: str) -> Override:
    if isinstance(data, Override):
        return data
    if not isinstance(data, Mapping) or "match" not in data:
        raise InputError(f"{source}: overrides: each entry needs a 'match', got {data!r}")
    known = {f.name for f in dataclasses.fields(Override)}
    unknown = sorted(set(map(str, data)) - known)
    if unknown:
        raise InputError(f"{source}: overrides: unknown key {unknown[0]!r}")
    return Override(**data)


def _coerce(key: str, value: object, annotation: object, source: str) -> object:
    """Accept an int where a float is meant; refuse other wrong scalar types with a clear text."""
    kind = str(annotation)
    if kind in ("float", "float | None") and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind == "float" and not isinstance(value, float):
        raise InputError(f"{source}: {key}: expected a number, got {value!r}")
    return value
