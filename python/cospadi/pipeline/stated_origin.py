"""What a source folder says about its own origin and licence, for the model card; nothing is guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cospadi.errors import InputError
from cospadi.model.files import read_json
from cospadi.pipeline.strict_yaml import YamlError, parse_yaml

_MAX_CARD_BYTES = 1_000_000

_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def stated_origin(folder: Path) -> dict[str, str]:
    """``license`` and ``base_model``, where the front matter of README.md or config.json states them plainly.

    A list counts where it has one entry. Whatever does not look like a licence or a repository's name is left out.
    """
    if not folder.is_dir():  # a GGUF file
        return {}
    front = _front_matter(folder / "README.md")
    try:
        config = read_json(folder / "config.json")
    except InputError:
        config = {}
    candidates = {
        "license": (_LICENSE, [_only(front.get("license")), config.get("license")]),
        "base_model": (
            _REPOSITORY,
            [_only(front.get("base_model")), config.get("base_model"), config.get("_name_or_path")],
        ),
    }
    found = {}
    for key, (pattern, values) in candidates.items():
        good = [value for value in values if isinstance(value, str) and pattern.fullmatch(value)]
        if good:
            found[key] = good[0]
    return found


def _front_matter(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_CARD_BYTES).decode("utf-8", errors="replace")
        match = _FRONT.match(text)
        data, _ = parse_yaml(match[1] if match else "")
    except (OSError, YamlError):
        return {}
    return data if isinstance(data, dict) else {}


def _only(value: object) -> object:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
