"""How numbers are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.report import numbers

THIN = "\u2009"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.00"),
        (0.5, "0.50"),
        (24.19, "24.19"),
        (99.999, "100.00"),
        (138.05, "138.1"),
        (1382.4, f"1{THIN}382"),
        (987654.3, f"987{THIN}654"),
        (1.2345e6, "1.2×10⁶"),
        (3e17, "3.0×10¹⁷"),
        (-2.5, "−2.50"),
    ],
)
def test_quantity(value, shown):
    assert numbers.quantity(value) == shown


@given(st.floats(1, 1e300))
def test_quantity_is_right_to_half_a_unit_of_its_last_digit(value):
    shown = numbers.quantity(value).replace(THIN, "")
    mantissa, _, exponent = shown.partition("×10")
    power = int(exponent.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")) or 0)
    assert float(f"{mantissa}e{power}") == pytest.approx(value, rel=0.051)
    if value < numbers.LARGE:
        assert float(mantissa) == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (212_336_640, "212.3 MB"),
        (2.9e9, "2.90 GB"),
        (1.5e13, "15.0 TB"),
    ],
)
def test_size(n_bytes, shown):
    assert numbers.size(n_bytes) == shown.replace(" ", THIN)


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.2005, "20.1"), (-0.0001, "0.0"), (-0.031, "−3.1"), (1.0, "100.0")],
)
def test_percent(share, shown):
    assert numbers.percent(share) == shown


def test_seconds_and_plural():
    assert [numbers.seconds(v) for v in (0.25, 9.94, 41.6)] == ["0.2", "9.9", "42"]
    assert [numbers.plural(n, "run") for n in (0, 1, 2)] == ["0 runs", "1 run", "2 runs"]
