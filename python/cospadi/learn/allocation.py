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
    """Losses of one weight by removed share; their logarithm is linear in between and beyond.

    Attributes
    ----------
    ratios : tuple of float
        Ascending removed shares at which the loss was measured.
    losses : tuple of float
        Loss at each, nats per token.
    slope : float or None
        Of the logarithm over the removed share, for a single ratio.
    """

    ratios: tuple[float, ...]
    losses: tuple[float, ...]
    slope: float | None = None

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.ratios, self.ratios[1:], strict=False))
        if not self.ratios or len(self.ratios) != len(self.losses) or not ascending:
            raise InputError("a loss curve needs ratios, ascending, with a loss each")
        if (len(self.ratios) == 1) != (self.slope is not None):
            raise InputError("a loss curve needs a slope if it has one ratio, and else none")
        if not all(math.isfinite(loss) and loss >= 0.0 for loss in self.losses):
            raise InputError(f"a loss curve has losses that are not finite: {self.losses}")

    def at(self, ratio: float) -> float:
        """Loss at a ratio; beyond the measured ones by the nearest piece."""
        logs = [math.log(max(loss, FLOOR)) for loss in self.losses]
        if self.slope is not None:
            return math.exp(logs[0] + self.slope * (ratio - self.ratios[0]))
        piece = sum(ratio > inner for inner in self.ratios[1:-1])
        left, right = self.ratios[piece], self.ratios[piece + 1]
        share = (ratio - left) / (right - left)
        return math.exp((1.0 - share) * logs[piece] + share * logs[piece + 1])

    def mean_slope(self) -> float:
        """Slope of the logarithm from the first ratio to the last."""
        if self.slope is not None:
            return self.slope
        ratio = max(self.losses[-1], FLOOR) / max(self.losses[0], FLOOR)
        return math.log(ratio) / (self.ratios[-1] - self.ratios[0])


def even_grid(lowest: float, highest: float, step: float = 0.01) -> list[float]:
    """Removed shares from lowest to highest, about ``step`` apart."""
    count = max(1, round((highest - lowest) / step))
    return [lowest + (highest - lowest) * index / count for index in range(count + 1)]


def allocate(
    curves: Sequence[LossCurve],
    sizes: Sequence[float],
    ratio: float,
    grids: Sequence[Sequence[float]],
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
    grids : sequence of sequences of float
        Shares that each weight may have, ascending.

    Returns
    -------
    list of float
        From the grids. Their mean by size is at least `ratio`; nothing less can be removed from any one weight.

    Raises
    ------
    InputError
        Grids that do not reach the ratio, or curves, sizes and grids of different number.
    """
    if not len(curves) == len(sizes) == len(grids):
        raise InputError(
            f"allocation: {len(curves)} curves and {len(grids)} grids for {len(sizes)} weights"
        )
    total = sum(sizes)
    reach = [
        sum(grid[end] * size for grid, size in zip(grids, sizes, strict=True)) / total
        for end in (0, -1)
    ]
    if not reach[0] - 1e-9 <= ratio <= reach[1] + 1e-9:
        raise InputError(
            f"allocation: the ratio {ratio:.4f} lies outside what the sizes allow, {reach[0]:.4f} to {reach[1]:.4f}"
        )
    hulls = [
        _lower_hull([(share, curve.at(share)) for share in grid])
        for curve, grid in zip(curves, grids, strict=True)
    ]
    moves: list[tuple[float, int, int]] = []
    for unit, (hull, size) in enumerate(zip(hulls, sizes, strict=True)):
        for index, (before, after) in enumerate(itertools.pairwise(hull), start=1):
            moves.append(((after[1] - before[1]) / ((after[0] - before[0]) * size), unit, index))
    # remove where it costs least until enough is removed
    chosen = [0] * len(sizes)
    missing = (ratio - reach[0]) * total
    tolerance = 1e-9 * total
    for _, unit, index in sorted(moves):
        if missing <= tolerance:
            break
        chosen[unit] = index
        missing -= (hulls[unit][index][0] - hulls[unit][index - 1][0]) * sizes[unit]
    shares = [hull[index][0] for hull, index in zip(hulls, chosen, strict=True)]
    return _give_back(shares, curves, sizes, grids, -missing + tolerance)


def _give_back(
    shares: list[float],
    curves: Sequence[LossCurve],
    sizes: Sequence[float],
    grids: Sequence[Sequence[float]],
    left: float,
) -> list[float]:
    """Spend what the last step removed too much, where it saves most, one weight at a time."""
    while True:
        best: tuple[float, int, float] | None = None
        for unit, (curve, size, grid) in enumerate(zip(curves, sizes, grids, strict=True)):
            for share in grid:
                if share < shares[unit] and (shares[unit] - share) * size <= left:
                    saved = curve.at(shares[unit]) - curve.at(share)
                    if best is None or saved > best[0]:
                        best = (saved, unit, share)
        if best is None or best[0] <= 0.0:
            return shares
        left -= (shares[best[1]] - best[2]) * sizes[best[1]]
        shares[best[1]] = best[2]


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
