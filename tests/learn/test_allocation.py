"""One budget over several weights."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from cospadi.errors import InputError
from cospadi.learn.allocation import LossCurve, allocate, even_grid


def exponential(level, rate, ratios=(0.1, 0.3, 0.5, 0.7)):
    return LossCurve(ratios, tuple(level * math.exp(rate * ratio) for ratio in ratios))


def test_curve_is_exact_at_its_points_and_exponential_between_and_beyond():
    curve = exponential(2e-4, 6.0)
    for ratio in (0.05, 0.1, 0.22, 0.5, 0.64, 0.9):
        assert curve.at(ratio) == pytest.approx(2e-4 * math.exp(6.0 * ratio))


def test_one_measurement_and_a_slope_make_a_curve():
    whole = exponential(2e-4, 6.0)
    single = LossCurve((0.4,), (whole.at(0.4),), 6.0)
    assert whole.mean_slope() == pytest.approx(6.0) == single.mean_slope()
    for ratio in (0.05, 0.4, 0.8):
        assert single.at(ratio) == pytest.approx(whole.at(ratio))


def test_equal_curves_get_equal_shares():
    shares = allocate([exponential(1e-3, 6.0)] * 4, [1.0] * 4, 0.4, [even_grid(0.1, 0.7)] * 4)
    assert max(shares) - min(shares) <= 0.0101
    assert sum(shares) / 4 == pytest.approx(0.4, abs=0.003)


def test_shares_differ_by_the_logarithm_of_the_loss_per_size():
    curves = [exponential(level, 6.0) for level in (1e-4, 1e-3)]
    low, high = allocate(curves, [1.0, 1.0], 0.4, [even_grid(0.0, 0.8)] * 2)
    assert low - high == pytest.approx(math.log(10) / 6.0, abs=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_near_the_best_of_all_choices_within_the_budget(seed):
    generator = random.Random(seed)
    curves = [
        exponential(10 ** generator.uniform(-5, -3), generator.uniform(4, 9)) for _ in range(3)
    ]
    sizes = [generator.choice([1.0, 2.0]) for _ in range(3)]
    shares = allocate(curves, sizes, 0.4, [even_grid(0.1, 0.7, 0.05)] * 3)

    def loss(choice):
        return sum(curve.at(share) for curve, share in zip(curves, choice, strict=True))

    def removed(choice):
        return sum(share * size for share, size in zip(choice, sizes, strict=True))

    grid = [0.1 + 0.05 * index for index in range(13)]
    assert removed(shares) >= 0.4 * sum(sizes) - 1e-9
    best = min(
        loss(choice)
        for choice in itertools.product(grid, repeat=3)
        if removed(choice) >= 0.4 * sum(sizes) - 1e-9
    )
    assert best <= loss(shares) * (1 + 1e-9)
    assert loss(shares) < 1.05 * best  # one step of one weight away
    for unit in range(3):
        one_less = [*shares]
        one_less[unit] -= 0.05
        assert one_less[unit] < 0.1 - 1e-9 or removed(one_less) < 0.4 * sum(sizes)


def test_bounds_hold_where_a_curve_wants_to_leave_them():
    curves = [exponential(1e-9, 1.0), exponential(1.0, 9.0)]
    shares = allocate(curves, [1.0, 1.0], 0.4, [even_grid(0.3, 0.5)] * 2)
    assert shares == pytest.approx([0.5, 0.3])


def test_what_a_coarse_step_removes_too_much_is_given_back():
    """Sizes far apart: the large weight's only step overshoots, and the small one gets the rest."""
    curves = [exponential(1e-3, 3.0), exponential(1e-3, 6.0)]
    grids = [[0.1, 0.6], even_grid(0.1, 0.6)]
    large, small = allocate(curves, [10.0, 1.0], 0.5, grids)
    assert large == 0.6
    assert small == 0.1
    large, small = allocate(curves, [10.0, 1.0], 0.58, grids)
    assert small == pytest.approx(0.38)


def test_every_weight_keeps_to_its_own_grid():
    curves = [exponential(10.0**-level, 7.0) for level in range(1, 6)]
    grids = [[0.1 * index, 0.37, 0.5 + 0.05 * index] for index in range(5)]
    shares = allocate(curves, [1.0, 2.0, 1.0, 2.0, 3.0], 0.4, grids)
    assert all(share in grid for share, grid in zip(shares, grids, strict=True))
    assert sum(s * n for s, n in zip(shares, (1, 2, 1, 2, 3), strict=True)) >= 0.4 * 9 - 1e-9


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LossCurve((), ()), "needs ratios"),
        (lambda: LossCurve((0.1,), (1.0,)), "needs a slope if it has one ratio"),
        (lambda: LossCurve((0.1, 0.2), (1.0, 2.0), 3.0), "and else none"),
        (lambda: LossCurve((0.3, 0.1), (1.0, 1.0)), "ascending"),
        (lambda: LossCurve((0.1, 0.3), (1.0, float("nan"))), "not finite"),
        (
            lambda: allocate([exponential(1, 1)], [1.0], 0.9, [[0.1, 0.5]]),
            "0.9000 lies outside what the sizes allow, 0.1000 to 0.5000",
        ),
        (lambda: allocate([exponential(1, 1)], [], 0.4, [[0.1]]), "1 curves and 1 grids for 0"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(InputError, match=match):
        make()
