"""What a source folder says about its own origin and licence, for the model card; nothing is guessed."""

from __future__ import annotations

import re
from pathlib import Path

from cospadi.errors import InputError
from cospadi.model.files import read_json

_MAX_CARD_BYTES = 1_000_000

_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*$", re.DOTALL | re.MULTILINE)
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def stated_origin(folder: Path) -> dict[str, str]:
    """``license`` and ``base_model``, where the front matter of README.md or config.json states them plainly.

    The front matter is read line by line and not as YAML: it may come from strangers, and all that is wanted is a
    word per key. Whatever does not look like a licence or a repository's name is left out.
    """
    if not folder.is_dir():  # a GGUF file
        return {}
    front = _front_matter(folder / "README.md")
    try:
        config = read_json(folder / "config.json")
    except InputError:
        config = {}
    candidates = {
        "license": (_LICENSE, [_value(front, "license"), config.get("license")]),
        "base_model": (
            _REPOSITORY,
            [_value(front, "base_model"), config.get("base_model"), config.get("_name_or_path")],
        ),
    }
    found = {}
    for key, (pattern, values) in candidates.items():
        good = [value for value in values if isinstance(value, str) and pattern.fullmatch(value)]
        if good:
            found[key] = good[0]
    return found


def _front_matter(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_CARD_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    match = _FRONT.match(text)
    return match[1] if match else ""


def _value(front: str, key: str) -> str | None:
    """The text behind a key, or the only entry of the list below it."""
    match = re.search(rf"^{key}:[ \t]*(.*?)[ \t]*\r?$", front, re.MULTILINE)
    if match is None:
        return None
    value = match[1]
    if not value:
        entries = re.match(r"(?:\r?\n[ \t]*-[ \t]+[^\n]*)+", front[match.end() :])
        listed = re.findall(r"-[ \t]+(\S+)[ \t]*\r?$", entries[0], re.MULTILINE) if entries else []
        value = listed[0] if len(listed) == 1 else ""
    return value.strip("\"'") or None
