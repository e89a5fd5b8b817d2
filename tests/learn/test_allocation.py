"""One budget over several weights."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from cospadi.errors import InputError
from cospadi.learn.allocation import LossCurve, allocate


def exponential(level, rate, ratios=(0.1, 0.3, 0.5, 0.7)):
    return LossCurve(ratios, tuple(level * math.exp(rate * ratio) for ratio in ratios))


def test_curve_is_exact_at_its_points_and_exponential_between_and_beyond():
    curve = exponential(2e-4, 6.0)
    for ratio in (0.05, 0.1, 0.22, 0.5, 0.64, 0.9):
        assert curve.at(ratio) == pytest.approx(2e-4 * math.exp(6.0 * ratio))


def test_equal_curves_get_equal_shares():
    shares = allocate([exponential(1e-3, 6.0)] * 4, [1.0] * 4, 0.4, lowest=0.1, highest=0.7)
    assert max(shares) - min(shares) <= 0.0101
    assert sum(shares) / 4 == pytest.approx(0.4, abs=0.003)


def test_shares_differ_by_the_logarithm_of_the_loss_per_size():
    curves = [exponential(level, 6.0) for level in (1e-4, 1e-3)]
    low, high = allocate(curves, [1.0, 1.0], 0.4, lowest=0.0, highest=0.8)
    assert low - high == pytest.approx(math.log(10) / 6.0, abs=0.02)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_grid_point_within_the_budget_is_better(seed):
    generator = random.Random(seed)
    curves = [
        exponential(10 ** generator.uniform(-5, -3), generator.uniform(4, 9)) for _ in range(3)
    ]
    sizes = [generator.choice([1.0, 2.0]) for _ in range(3)]
    shares = allocate(curves, sizes, 0.4, lowest=0.1, highest=0.7, step=0.05)

    def loss(choice):
        return sum(curve.at(share) for curve, share in zip(curves, choice, strict=True))

    def removed(choice):
        return sum(share * size for share, size in zip(choice, sizes, strict=True))

    grid = [0.1 + 0.05 * index for index in range(13)]
    assert removed(shares) >= 0.4 * sum(sizes) - 1e-9
    # the same number of bytes or fewer removed from a better choice would contradict the hull walk
    best = min(
        loss(choice)
        for choice in itertools.product(grid, repeat=3)
        if removed(choice) >= removed(shares) - 1e-9
    )
    assert loss(shares) == pytest.approx(best, rel=1e-9)


def test_bounds_hold_where_a_curve_wants_to_leave_them():
    curves = [exponential(1e-9, 1.0), exponential(1.0, 9.0)]
    assert allocate(curves, [1.0, 1.0], 0.4, lowest=0.3, highest=0.5) == pytest.approx([0.5, 0.3])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LossCurve((0.1,), (1.0,)), "two or more"),
        (lambda: LossCurve((0.3, 0.1), (1.0, 1.0)), "ascending"),
        (lambda: LossCurve((0.1, 0.3), (1.0, float("nan"))), "not finite"),
        (lambda: allocate([], [], 0.9, lowest=0.1, highest=0.5), "outside the bounds"),
        (
            lambda: allocate([exponential(1, 1)], [], 0.4, lowest=0.1, highest=0.5),
            "1 curves for 0",
        ),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(InputError, match=match):
        make()
