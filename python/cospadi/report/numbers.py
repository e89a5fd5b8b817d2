"""Numbers as readers want them: as many digits as mean something, one unit per column."""

from __future__ import annotations

import math

MISSING = "–"
THIN_SPACE = "\u2009"
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
LARGE = 1e6

BYTE_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))


def decimals_of(value: float, digits: int = 4) -> int:
    """Decimals that show about ``digits`` significant digits; at most two, none from 10^(digits-1) on."""
    if value == 0:
        return 2
    return min(2, max(0, digits - 1 - math.floor(math.log10(abs(value)))))


def quantity(value: float, decimals: int | None = None) -> str:
    """A positive measurement: ``24.19``, ``138.1``, ``1 382``, ``1.2×10⁶``.

    Parameters
    ----------
    value : float
        Finite.
    decimals : int, optional
        Chosen by `decimals_of` if left out.
    """
    if abs(value) >= LARGE:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPTS)}"
    places = decimals_of(value) if decimals is None else decimals
    return f"{value:,.{places}f}".replace(",", THIN_SPACE).replace("-", "−")


def percent(share: float) -> str:
    """A share as a number of percent with one decimal, without the sign: ``20.1``."""
    text = f"{100 * share:.1f}"
    return ("0.0" if text == "-0.0" else text).replace("-", "−")


def byte_unit(largest: float) -> tuple[str, float]:
    """Name and size of the decimal unit in which ``largest`` bytes is a number from 1 to 1000."""
    return next((unit for unit in BYTE_UNITS if largest >= unit[1]), BYTE_UNITS[-1])


def in_unit(n_bytes: float, unit: tuple[str, float]) -> str:
    """Bytes as a number of ``unit``; bytes themselves have no decimals."""
    value = n_bytes / unit[1]
    return quantity(value, 0 if unit[1] == 1.0 else 1 if value >= 10 else 2)


def size(n_bytes: float) -> str:
    """Bytes with their unit: ``212.3 MB``."""
    unit = byte_unit(n_bytes)
    return f"{in_unit(n_bytes, unit)}{THIN_SPACE}{unit[0]}"


def seconds(value: float) -> str:
    """Seconds as a number: whole from 10 on."""
    return quantity(value, 1 if value < 10 else 0)


def plural(count: int, noun: str) -> str:
    """``1 run``, ``3 runs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
