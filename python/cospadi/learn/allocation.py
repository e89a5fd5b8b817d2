"""One byte budget over many weights: each gets the size at which a further byte buys as much everywhere.

The loss of a model is taken as the sum of its weights' losses (`cospadi.calibration.probe` measures each in nats per
token). Then the best sizes under a budget have equal slopes of loss against bits, which on curves of discrete sizes is
a walk along their lower convex hulls by falling slope (Lagrange multipliers: Everett 1963; Shoham and Gersho 1988).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cospadi.errors import InputError

LOWEST, HIGHEST = 0.05, 0.9
"""Bounds of any weight's removed share."""

FLOOR = 1e-12
"""Losses below this (nats per token) count as this much: curves are interpolated in their logarithm."""


@dataclass(frozen=True)
class LossCurve:
    """Measured losses of one weight by removed share.

    Attributes
    ----------
    ratios : tuple of float
        Ascending removed shares, at least two.
    losses : tuple of float
        Loss at each, nats per token.
    """

    ratios: tuple[float, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.ratios, self.ratios[1:], strict=False))
        if len(self.ratios) < 2 or len(self.ratios) != len(self.losses) or not ascending:
            raise InputError("a loss curve needs two or more ratios, ascending, with a loss each")
        if not all(math.isfinite(loss) and loss >= 0.0 for loss in self.losses):
            raise InputError(f"a loss curve has losses that are not finite: {self.losses}")

    def at(self, ratio: float) -> float:
        """Loss at a ratio: its logarithm is interpolated linearly, and extrapolated by the nearest piece."""
        logs = [math.log(max(loss, FLOOR)) for loss in self.losses]
        piece = sum(ratio > inner for inner in self.ratios[1:-1])
        left, right = self.ratios[piece], self.ratios[piece + 1]
        share = (ratio - left) / (right - left)
        return math.exp((1.0 - share) * logs[piece] + share * logs[piece + 1])


def allocate(
    curves: Sequence[LossCurve],
    sizes: Sequence[float],
    ratio: float,
    *,
    lowest: float,
    highest: float,
    step: float = 0.01,
) -> list[float]:
    """Removed share of every weight that minimises the summed loss at a removed share of all.

    Parameters
    ----------
    curves : sequence of LossCurve
        One per weight.
    sizes : sequence of float
        Dense size of each weight, any unit.
    ratio : float
        Wanted removed share of the summed sizes.
    lowest, highest : float
        Bounds of a single weight's share; ``lowest <= ratio <= highest``.
    step : float
        Of the shares tried.

    Returns
    -------
    list of float
        Their mean by size is `ratio` or at most one step of one weight above it.

    Raises
    ------
    InputError
        Bounds that do not hold the ratio, or curves and sizes of different number.
    """
    if not lowest <= ratio <= highest:
        raise InputError(
            f"allocation: the ratio {ratio} lies outside the bounds {lowest} to {highest}"
        )
    if len(curves) != len(sizes):
        raise InputError(f"allocation: {len(curves)} curves for {len(sizes)} weights")
    count = max(1, round((highest - lowest) / step))
    grid = [lowest + (highest - lowest) * index / count for index in range(count + 1)]
    moves: list[tuple[float, int]] = []
    for unit, (curve, size) in enumerate(zip(curves, sizes, strict=True)):
        hull = _lower_hull([(share, curve.at(share)) for share in grid])
        for before, after in itertools.pairwise(hull):
            slope = (after[1] - before[1]) / ((after[0] - before[0]) * size)
            moves += [(slope, unit)] * round((after[0] - before[0]) / (grid[1] - grid[0]))
    # remove where it costs least, one grid step at a time, until enough is removed
    chosen = [0] * len(sizes)
    missing = (ratio - lowest) * sum(sizes)
    for _, unit in sorted(moves):
        if missing <= 1e-9 * sum(sizes):
            break
        chosen[unit] += 1
        missing -= (grid[1] - grid[0]) * sizes[unit]
    return [grid[index] for index in chosen]


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points on the lower convex hull of points with ascending first coordinates."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) >= 2:
            (x1, y1), (x2, y2) = hull[-2], hull[-1]
            if (y2 - y1) * (point[0] - x1) >= (point[1] - y1) * (x2 - x1):
                hull.pop()
            else:
                break
        hull.append(point)
    return hull
