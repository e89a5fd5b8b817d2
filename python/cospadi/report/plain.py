"""Values of plain data, checked: the wrong type or a number that is not finite is an error that names the place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from cospadi.errors import InputError

LARGEST = 2**63
"""Bound of counts: more bytes or parameters than any machine holds."""


def required(data: Mapping[str, Any], key: str, where: str) -> Any:  # noqa: ANN401
    """Value of a key that must be there."""
    if key not in data:
        raise InputError(f"{where}: key {key!r} is missing; pass the data as it was written")
    return data[key]


def mapping(value: Any, where: str) -> dict[str, Any]:  # noqa: ANN401
    """An object; empty for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected an object, got {brief(value)}")
    return {str(key): item for key, item in value.items()}


def sequence(value: Any, where: str) -> list[Any]:  # noqa: ANN401
    """A list."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: expected a list, got {brief(value)}")
    return list(value)


def text(value: Any, where: str) -> str:  # noqa: ANN401
    """Text."""
    if not isinstance(value, str):
        raise InputError(f"{where}: expected text, got {brief(value)}")
    return value


def names(value: Any, where: str) -> tuple[str, ...]:  # noqa: ANN401
    """A list of texts."""
    return tuple(text(name, f"{where}[{i}]") for i, name in enumerate(sequence(value, where)))


def number(value: Any, where: str) -> float | None:  # noqa: ANN401
    """A finite number, or None."""
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # false for NaN and infinities, and for integers of JSON that no float holds
    if not is_number or not abs(value) <= sys.float_info.max:
        raise InputError(f"{where}: expected a finite number, got {brief(value)}")
    return float(value)


def numbers(value: Any, where: str) -> dict[str, float]:  # noqa: ANN401
    """An object of finite numbers; keys without one are left out."""
    read = {key: number(item, f"{where}[{key!r}]") for key, item in mapping(value, where).items()}
    return {key: number for key, number in read.items() if number is not None}


def number_list(value: Any, where: str) -> tuple[float, ...]:  # noqa: ANN401
    """A list of finite numbers."""
    read = [number(item, f"{where}[{i}]") for i, item in enumerate(sequence(value, where))]
    if None in read:
        raise InputError(f"{where}[{read.index(None)}]: expected a finite number, got null")
    return tuple(item for item in read if item is not None)


def count(data: Mapping[str, Any], key: str, where: str) -> int | None:
    """The integer of a key, at least 0 and below `LARGEST`; None where the key is not there."""
    value = data.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
        raise InputError(f"{where}.{key}: expected an integer from 0, got {brief(value)}")
    return value


def brief(value: object) -> str:
    """A value in a message, shortened."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
