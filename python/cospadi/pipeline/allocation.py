"""The byte budget over the linears of a model, from what each linear's errors do to the model's prediction.

Every linear is fitted coarsely at a few ratios, and one backward pass measures what each of these changes would cost
(`cospadi.calibration.probe`). Loss over ratio is the linear's curve, and `cospadi.learn.allocation` divides the budget.
The work directory keeps changes and curves as they come.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cospadi.calibration.fisher import FisherStore
from cospadi.calibration.probe import measure_losses
from cospadi.errors import FitError
from cospadi.learn.allocation import HIGHEST, LOWEST, LossCurve, allocate, even_grid
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.methods import factor_size
from cospadi.learn.quantize import INTEGER_BITS
from cospadi.learn.whitening import WhiteningError, whiten_gram
from cospadi.learn.widths import AUTO, integer_ratios, kept_bits, removed_share
from cospadi.model.discover import TargetLinear, weight_of
from cospadi.pipeline.grams import GramSource
from cospadi.pipeline.plan import module_settings, storage_widths
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.sensitivity import fisher_metrics
from cospadi.pipeline.workdir import WorkDir

CURVE_OFFSETS = (-0.1, 0.2)
"""Ratios of the coarse fits, relative to the recipe's."""

CURVE_BITS = (-0.8, 0.0, 1.0)
"""The same for integers of the width that fits: bits per weight, relative to those of the recipe's ratio."""

BITS_BEYOND = 0.5
"""Bits per weight below the coarsest fit that a linear may get."""

COARSE_START, COARSE_GROWTH = 0.03, 1.6
"""First penalty and its growth in coarse fits, which take a fifth of the steps of a fine one."""

PROBE_BYTES = 4 << 30
"""Most bytes of changes (bfloat16) measured in one backward pass."""


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
                name: {"ratios": list(curve.ratios), "losses": list(curve.losses)}
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
    plain = module_settings("", dataclasses.replace(recipe, overrides=()))
    taking_part = [t for t in targets if module_settings(t.name, recipe) == plain]
    curves = _curves(grams, fisher, taking_part, work)
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


def curve_ratios(recipe: Recipe, d_in: int) -> tuple[float, ...]:
    """Ratios of the coarse fits of a linear, ascending."""
    if recipe.coeffs_dtype != AUTO:
        wanted = (min(max(recipe.ratio + o, LOWEST), HIGHEST) for o in CURVE_OFFSETS)
        return tuple(sorted({round(ratio, 4) for ratio in wanted}))
    allowed = integer_ratios(d_in)
    bits = [kept_bits(recipe.ratio) + offset for offset in CURVE_BITS]
    near = {min(allowed, key=lambda ratio: abs(kept_bits(ratio) - b)) for b in bits}
    if len(near) == 1:  # at the top everything is eight bits
        near.add(allowed[1])
    return tuple(sorted(near))


def _curves(
    grams: GramSource,
    fisher: FisherStore | None,
    targets: Sequence[TargetLinear],
    work: WorkDir,
) -> dict[str, LossCurve]:
    recipe, log = grams.recipe, grams.log
    curves: dict[str, LossCurve] = {}
    for target in targets:
        record = work.load_record("curves", target.name)
        if record is not None:
            curves[target.name] = LossCurve(tuple(record["ratios"]), tuple(record["losses"]))
    pending = [target for target in targets if target.name not in curves]
    fitted = _coarse_fits(grams, fisher, pending, work)
    ratios = {target.name: curve_ratios(recipe, target.d_in) for target in pending}
    for part in _by_bytes([target for target in pending if target.name in fitted], ratios):
        changes = {t.name: _changes(work, t.name, len(ratios[t.name])) for t in part}
        losses = measure_losses(
            grams.source.model,
            changes,
            grams.calibration.ids[: recipe.backward_samples],
            seed=recipe.seed,
            progress=lambda done, total: log.progress("backward", done=done, total=total),
        )
        for name, values in losses.items():
            curves[name] = LossCurve(ratios[name], tuple(values))
            work.store_record("curves", name, {"ratios": ratios[name], "losses": values})
    return curves


def _by_bytes(
    targets: Sequence[TargetLinear], ratios: Mapping[str, Sequence[float]]
) -> list[list[TargetLinear]]:
    """Runs of targets whose changes fit in one pass."""
    parts: list[list[TargetLinear]] = []
    held = 0
    for target in targets:
        size = 2 * len(ratios[target.name]) * target.d_in * target.d_out
        if not parts or held + size > PROBE_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(target)
        held += size
    return parts


def _coarse_fits(
    grams: GramSource,
    fisher: FisherStore | None,
    targets: Sequence[TargetLinear],
    work: WorkDir,
) -> set[str]:
    """Fit what has no stored changes yet; names of the targets that have them in the end."""
    fitted = {
        t.name
        for t in targets
        if _has_changes(work, t.name, len(curve_ratios(grams.recipe, t.d_in)))
    }
    pending = {target.name: target for target in targets if target.name not in fitted}
    for finished in grams.collect(list(pending.values())):
        while finished.grams:
            item = finished.grams.pop(next(iter(finished.grams)))
            try:
                whitening = whiten_gram(item.gram, item.members[0])
            except WhiteningError:
                continue  # the fit says so, and keeps them dense
            for name in item.members:
                metric, output = whitening, None
                if fisher is not None:
                    metric, output = fisher_metrics(fisher, pending[name], item.gram, whitening)
                weight, _ = weight_of(grams.source.model, pending[name])
                given = FitInput(name, weight, None, item.gram, metric, output=output)
                factors = _coarse_factors(given, grams.recipe)
                if factors is None:
                    tried = curve_ratios(grams.recipe, weight.shape[1])
                    grams.log.emit(
                        "warning",
                        text=f"{name}: no coarse fit at {tried}; it takes no part in the allocation and keeps ratio "
                        f"{grams.recipe.ratio}",
                    )
                    continue
                for index, change in enumerate(factors):
                    work.store_tensor("changes", f"{name}.{index}", change)
                fitted.add(name)
                grams.log.progress("coarse", module=name, done=len(fitted), total=len(targets))
    return fitted


def _coarse_factors(given: FitInput, recipe: Recipe) -> list[Tensor] | None:
    """Changes of the weight (bfloat16) by coarse fits; None where a ratio leaves nothing, or a fit fails."""
    options = dataclasses.replace(
        recipe.learn_options(),
        first_penalty=max(COARSE_START, recipe.first_penalty),
        penalty_growth=max(COARSE_GROWTH, recipe.penalty_growth),
    )
    changes = []
    d_out, d_in = given.weight.shape
    for ratio in curve_ratios(recipe, d_in):
        types = recipe.types_at(ratio, d_in)
        size = factor_size(
            recipe.method,
            d_in,
            d_out,
            ratio,
            convention=recipe.ratio_convention,
            widths=storage_widths(types),
            dictionary=recipe.atoms,
            learned_share=recipe.learned_share,
        )
        if size.sparsity < 1:
            return None
        # integers are not worth a look without the feedback that comes with refits
        with_refit = types.coeffs in INTEGER_BITS
        settings = FitSettings(recipe.method, size, types, options, refit=with_refit)
        try:
            ((factor, _),) = fit([given], settings)
        except FitError:
            return None
        changes.append((given.weight - factor.dense_weight()).bfloat16())
    return changes


def _has_changes(work: WorkDir, name: str, count: int) -> bool:
    return all(work.load_tensor("changes", f"{name}.{index}") is not None for index in range(count))


def _changes(work: WorkDir, name: str, count: int) -> Sequence[Tensor]:
    found = [work.load_tensor("changes", f"{name}.{index}") for index in range(count)]
    return [change for change in found if change is not None]
