"""What every setting of a recipe is for, taken from the recipe itself: its fields, their types, its docstring."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, get_args, get_type_hints

import yaml

from cospadi import __version__
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.learn.budget import VALUE_BITS
from cospadi.learn.methods import METHODS
from cospadi.learn.options import LearnOptions
from cospadi.learn.quantize import COEFFS_TYPES, DICTIONARY_TYPES
from cospadi.learn.widths import AUTO
from cospadi.pipeline.presets import PRESETS
from cospadi.pipeline.recipe import RECIPE_VERSION, Override, Recipe
from cospadi.pipeline.recipe_file import recipe_from_mapping

ONLY_IN_FILES = {
    "preset": "Settings to start from.",
    "bits": f"Bits per weight of the compressed linears, up to {VALUE_BITS}, in place of a ratio.",
}
"""Keys that a file may have and a recipe has not: they stand for other settings."""

EXAMPLE_OVERRIDES = r"[{match: '.*\.down_proj', ratio: 0.1}]"

_CHOSEN = ("dictionary", "k_over_s", "output_metric", "backward_samples")
"""Settings whose default depends on others."""

_JSON_TYPES = {float: "number", int: "integer", bool: "boolean", str: "string"}

_WIDTH = 100


def meanings(owner: type) -> dict[str, str]:
    """First sentence about every attribute, from the docstring of a class."""
    lines = inspect.cleandoc(owner.__doc__ or "").partition("Attributes\n----------\n")[2]
    found: dict[str, str] = {}
    # an entry is a line of names, which may go on in the next, and indented lines about them
    for names, text in re.findall(r"^((?:\S.*\n)+)((?:(?:[ ].*)?(?:\n|\Z))*)", lines, re.MULTILINE):
        sentence = re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]
        for name in re.split(r",\s*", names.partition(" :")[0].strip()):
            found[name] = re.sub(r"\bNone\b", "null", sentence.replace("`", ""))  # as in YAML
    return found


def settings() -> dict[str, str]:
    """Meaning of every setting by name, in the order of the recipe."""
    own, learners = meanings(Recipe), meanings(LearnOptions)
    return {
        f.name: learners[f.name] if own[f.name].startswith("See ") else own[f.name]
        for f in dataclasses.fields(Recipe)
    }


def choices() -> dict[str, tuple[str, ...]]:
    """Names that a setting may have, for those with a closed list."""
    hints = get_type_hints(Recipe)
    found = {name: _literals(hint) for name, hint in hints.items()}
    found |= {
        "method": tuple(METHODS),
        "storage_dtype": tuple(STORAGE_DTYPES),
        "coeffs_dtype": (*COEFFS_TYPES, AUTO),
        "dictionary_dtype": tuple(DICTIONARY_TYPES),
        "preset": tuple(PRESETS),
    }
    return {name: names for name, names in found.items() if names}


def _literals(hint: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Names of a ``Literal``, also beside None."""
    arguments = get_args(hint)
    if arguments and all(isinstance(item, str) for item in arguments):
        return arguments
    return next((names for item in arguments if (names := _literals(item))), ())


def starting_file(preset: str | None = None) -> str:
    """YAML with every setting and its value, all of them commented out but the preset and the ratio.

    A setting that stays commented out keeps the value shown, so the file means what the preset means.
    """
    recipe = recipe_from_mapping({} if preset is None else {"preset": preset})
    values = recipe.to_mapping()
    lines = [
        f"# A recipe of cospadi {__version__}: cospadi compress MODEL --out OUT --recipe THIS_FILE",
        "# Lines that stay commented out keep the value shown; `cospadi recipe show` prints what a file comes to.",
    ]
    known = choices()
    for name, meaning in {**ONLY_IN_FILES, **settings()}.items():
        names = f" One of {', '.join(known[name])}." if name in known else ""
        if name == "overrides":
            names = f" Such as {EXAMPLE_OVERRIDES}"
        lines += ["", *_comment(meaning + names)]
        value = {"preset": preset or "fast", "bits": None}.get(name, values.get(name))
        if name in _CHOSEN and (preset is None or name not in PRESETS[preset]):
            value = None
        text = yaml.safe_dump({name: value}, sort_keys=False, width=_WIDTH).rstrip()
        active = name == "ratio" or (name == "preset" and preset is not None)
        lines += text.splitlines() if active else [f"# {line}" for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def _comment(text: str) -> list[str]:
    """Lines of a comment."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > _WIDTH - 2:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [f"# {line}" for line in lines]


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, for editors.

    It has the names, types and choices. What goes together is checked by `cospadi recipe validate`.
    """
    known, told, defaults = choices(), settings(), Recipe().to_mapping()
    properties: dict[str, Any] = {
        "recipe_version": {"const": RECIPE_VERSION},
        "preset": {"description": ONLY_IN_FILES["preset"], "enum": [*known["preset"], None]},
        "bits": {"description": ONLY_IN_FILES["bits"], "type": ["number", "null"]},
    }
    hints = get_type_hints(Recipe)
    for name, meaning in told.items():
        entry = {"description": meaning, "default": defaults[name], **_json_type(hints[name])}
        if name in known:
            is_optional = type(None) in get_args(hints[name])
            entry.pop("type", None)
            entry["enum"] = [*known[name], None] if is_optional else list(known[name])
        properties[name] = entry
    for name in _CHOSEN:
        properties[name]["default"] = None
    properties["target_size"]["type"] = ["integer", "string", "null"]
    properties["overrides"] |= {
        "type": ["array", "null"],
        "items": {
            "type": "object",
            "required": ["match"],
            "additionalProperties": False,
            "properties": {k: _json_type(hint) for k, hint in get_type_hints(Override).items()},
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Recipe of cospadi {__version__}",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _json_type(hint: Any) -> dict[str, Any]:  # noqa: ANN401
    if hint == tuple[str, ...]:
        return {"type": ["array", "string", "null"], "items": {"type": "string"}}
    if hint in _JSON_TYPES:
        return {"type": _JSON_TYPES[hint]}
    names = [_JSON_TYPES[item] for item in get_args(hint) if item in _JSON_TYPES]
    return {"type": [*names, "null"]} if names else {}
