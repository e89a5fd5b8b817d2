"""The byte budget over the linears of a model, from what each linear's errors do to the model's prediction."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from cospadi.calibration.fisher import FisherStore
from cospadi.learn.allocation import HIGHEST, LOWEST, LossCurve, allocate, even_grid
from cospadi.learn.widths import AUTO, integer_ratios, kept_bits, removed_share
from cospadi.model.discover import TargetLinear
from cospadi.pipeline.grams import GramSource
from cospadi.pipeline.loss_curves import CURVE_BITS, loss_curves
from cospadi.pipeline.plan import without_override
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.workdir import WorkDir

BITS_BEYOND = 0.5
"""Bits per weight below the coarsest fit that a linear may get."""


@dataclasses.dataclass(frozen=True)
class Allocation:
    """How the budget was divided, and why.

    Attributes
    ----------
    ratio : float
        The recipe's.
    ratios : dict
        Removed share by module name.
    curves : dict
        Measured loss over removed share by module name, nats per token.
    predicted_loss, predicted_uniform : float
        Sums of the curves at these shares, and at the recipe's ratio everywhere.
    """

    ratio: float
    ratios: dict[str, float]
    curves: dict[str, LossCurve]
    predicted_loss: float
    predicted_uniform: float

    def to_mapping(self) -> dict[str, Any]:
        """Plain data for the report and the log."""
        return {
            "ratios": {name: round(share, 4) for name, share in self.ratios.items()},
            "losses": {n: self.curves[n].at(share) for n, share in self.ratios.items()},
            "even_losses": {name: curve.at(self.ratio) for name, curve in self.curves.items()},
            "curves": {
                name: {
                    "ratios": list(curve.ratios),
                    "losses": list(curve.losses),
                    "slope": curve.mean_slope(),
                }
                for name, curve in self.curves.items()
            },
            "predicted_loss": self.predicted_loss,
            "predicted_uniform": self.predicted_uniform,
        }


def allocate_ratios(
    grams: GramSource,
    fisher: FisherStore | None,
    targets: Sequence[TargetLinear],
    work: WorkDir,
) -> Allocation | None:
    """Removed share of every target for the recipe's ratio, by measured loss.

    Parameters
    ----------
    grams : GramSource
        Activations; needs a folder, so that the fits need not collect them again.
    fisher : FisherStore or None
        Prepared for all targets, where the fits use an output metric.
    targets : sequence of TargetLinear
        All targets; those that an override sets apart keep the override's ratio and do not take part.
    work : WorkDir
        Keeps changes and curves.

    Returns
    -------
    Allocation or None
        None if no target takes part.
    """
    start = time.perf_counter()
    recipe = grams.recipe
    taking_part = without_override(targets, recipe)
    curves = loss_curves(grams, fisher, taking_part, work)
    taking_part = [t for t in taking_part if t.name in curves]
    if not taking_part:
        return None
    shares = allocate(
        [curves[t.name] for t in taking_part],
        [float(t.d_in * t.d_out) for t in taking_part],
        recipe.ratio,
        [allowed_ratios(recipe, t.d_in) for t in taking_part],
    )
    ratios = {target.name: share for target, share in zip(taking_part, shares, strict=True)}
    allocation = Allocation(
        recipe.ratio,
        ratios,
        {name: curves[name] for name in ratios},
        predicted_loss=sum(curves[name].at(share) for name, share in ratios.items()),
        predicted_uniform=sum(curves[name].at(recipe.ratio) for name in ratios),
    )
    seconds = round(time.perf_counter() - start, 2)
    grams.log.emit("allocated", **allocation.to_mapping(), seconds=seconds)
    return allocation


def allowed_ratios(recipe: Recipe, d_in: int) -> list[float]:
    """Removed shares that a linear with ``d_in`` inputs may get, ascending."""
    lowest = max(LOWEST, recipe.ratio - recipe.allocation_reach)
    if recipe.coeffs_dtype != AUTO:
        return even_grid(lowest, min(HIGHEST, recipe.ratio + recipe.allocation_reach))
    # curves of integers are steep: none is followed further than this beyond where it was measured
    fewest = removed_share(min(CURVE_BITS) - BITS_BEYOND + kept_bits(recipe.ratio))
    return [ratio for ratio in integer_ratios(d_in) if lowest <= ratio <= fewest]
