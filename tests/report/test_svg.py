"""Scales, ticks, label placement and marks of the figures."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from cospadi.report import svg

HEIGHTS = st.lists(st.floats(-500, 1500, allow_nan=False), min_size=1, max_size=25)


@given(HEIGHTS)
def test_separated_labels_keep_order_gap_and_bounds(positions):
    moved = np.array(svg.separate(positions, 15.0, 10.0, 400.0))
    order = np.argsort(positions, kind="stable")
    assert np.all(np.diff(moved[order]) >= 15.0 - 1e-9)
    assert moved.min() >= 10.0 - 1e-9 and moved.max() <= 400.0 + 1e-9


@given(HEIGHTS)
def test_separation_is_the_bounded_optimum_of_scikit_learn(positions):
    gap, low, high = 15.0, 10.0, 400.0
    moved = np.array(svg.separate(positions, gap, low, high))
    order = np.argsort(positions, kind="stable")
    steps = gap * np.arange(len(positions))
    solver = IsotonicRegression(y_min=low, y_max=high - steps[-1])
    expected = solver.fit_transform(steps, np.array(positions)[order] - steps) + steps
    np.testing.assert_allclose(moved[order], expected, atol=1e-6)


def test_labels_with_room_stay_where_they_are():
    assert svg.separate([90.0, 30.0, 60.0], 15.0, 0.0, 100.0) == [90.0, 30.0, 60.0]


def test_too_many_labels_start_at_the_top_and_pass_the_bottom():
    assert svg.separate([5.0, 5.0, 5.0], 10.0, 0.0, 12.0) == [0.0, 10.0, 20.0]


# narrower intervals so far from zero hold few floating-point numbers
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 10))
@example(low=879609.9999999999, width=1e-3, count=7)
def test_linear_ticks_are_equidistant_round_and_few(low, width, count):
    high = low + width
    ticks = svg.linear_ticks(low, high, count)
    assert len(ticks) <= count + 1
    assert all(low <= tick <= high for tick in ticks)
    steps = np.diff(ticks)
    if len(steps):
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6, atol=1e-9 * abs(high))
        mantissa = 10 ** (math.log10(steps.mean()) % 1)
        assert min(abs(mantissa / m - 1) for m in (1, 2, 5, 10)) < 1e-3


@given(st.floats(1e-3, 1e6), st.floats(1.05, 1e9))
def test_log_ticks_are_increasing_inside_and_few(low, factor):
    ticks = svg.log_ticks(low, low * factor)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert ticks[0] >= low * (1 - 1e-6) and ticks[-1] <= low * factor * (1 + 1e-6)


def test_log_ticks_are_the_numbers_a_reader_expects():
    assert svg.log_ticks(20, 800) == [20, 30, 50, 100, 200, 300, 500]
    assert svg.log_ticks(1, 1e6) == [10.0**e for e in range(7)]


def test_scales_map_ends_to_ends_and_middles_to_middles():
    linear, log = svg.Scale((10, 30), (0, 100)), svg.Scale((10, 1000), (300, 0), is_log=True)
    assert [linear(v) for v in (10, 20, 30)] == [0, 50, 100]
    np.testing.assert_allclose([log(v) for v in (10, 100, 1000)], [300, 150, 0], atol=1e-9)


def test_colours_get_steadily_lighter():
    """The order of values can be seen without seeing hues."""

    def luminance(colour):
        r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    values = [luminance(svg.viridis(i / 50)) for i in range(51)]
    assert all(a < b for a, b in pairwise(values))
    assert svg.viridis(-1) == svg.viridis(0) == "#440154"
    assert svg.viridis(2) == svg.viridis(1) == "#fde725"


def test_42_series_have_42_marks_and_neighbours_share_nothing():
    marks = [
        (svg.marker(i, 0, 0).get("class"), svg.marker(i, 0, 0).get("d"))
        for i in range(svg.N_COLOURS * len(svg.SHAPES))
    ]
    assert len(set(marks)) == len(marks) == 42
    for (colour, shape), (next_colour, next_shape) in pairwise(marks):
        assert colour != next_colour and shape != next_shape


@pytest.mark.parametrize("width", [10, 60, 130, 400])
def test_shortened_labels_fit_and_keep_both_ends(width):
    label = "cospadi group_size=2 coeffs_dtype=int8"
    short = svg.shorten(label, width)
    assert len(short) <= max(3, width / svg.CHARACTER_WIDTH)
    if short != label:
        head, tail = short.split("…")
        assert label.startswith(head) and label.endswith(tail)
