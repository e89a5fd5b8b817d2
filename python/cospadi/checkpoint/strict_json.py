"""JSON from untrusted files: one object, bounded, no duplicate keys, only JSON's own numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from cospadi.errors import CheckpointError, brief

MAX_JSON_BYTES = 100_000_000
"""The limit that safetensors sets for its header; generous for a config."""

MAX_DEPTH = 32
"""Nesting that `check_plain` accepts; real configs need five levels."""


def parse_json_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object.

    Parameters
    ----------
    text : str or bytes
        UTF-8 text.
    where : str
        File name, for the message.

    Raises
    ------
    CheckpointError
        If the text is not UTF-8, not JSON, not an object, has a key twice or a number that is not
        finite.
    """
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_unique,
            parse_constant=_reject_constant,
            parse_float=_finite_float,
        )
    except (ValueError, RecursionError) as error:
        # JSONDecodeError, UnicodeDecodeError and the digits limit of int() are all ValueErrors.
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{where}: not valid JSON ({brief_text(reason)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {brief(value)}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; errors as for `parse_json_object`."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes exceed the limit of {MAX_JSON_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse_json_object(data, str(path))


def check_plain(value: object, where: str, depth: int = 0) -> None:
    """Check that a value has JSON types only, text keys, finite numbers and bounded nesting.

    Raises
    ------
    CheckpointError
        Naming the place of the first value that is not plain.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where}: nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: expected text keys, got {brief(key)}")
            check_plain(item, f"{where}.{brief_text(key)}" if depth < 4 else where, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_plain(item, where, depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{where}: expected a finite number, got {value}")
    elif value is not None and not isinstance(value, (str, int, bool)):
        raise CheckpointError(f"{where}: {type(value).__name__} is not a JSON type")


def brief_text(text: str) -> str:
    """Shorten untrusted text to one printable line."""
    shown = ascii(text)[1:-1]
    return shown if len(shown) <= 100 else shown[:97] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {brief_text(key)} occurs twice")
            seen.add(key)
    return result


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {brief_text(text)} is out of range")
    return value
