"""What each linear would cost the model's prediction at other sizes, measured.

A linear is fitted coarsely, and one backward pass measures what the change of its weight would cost
(`cospadi.calibration.probe`). How steeply a loss grows with the removed share differs little between linears (its
logarithm: 6.8 with a standard deviation of 0.6 per removed share in bfloat16, 21 and 1.9 for integers; all linears of
SmolLM2-135M at 0.4 and 3.25 bits), so only those of a few blocks are fitted at several sizes and give their slope to
the others of their projection: dividing the budget by one point and the projection's mean slope cost 0.1 to 1.3 % of
the predicted loss there. The work directory keeps changes and losses as they come.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from statistics import mean
from typing import TypedDict

import torch
from torch import Tensor

from cospadi.calibration.fisher import FisherStore
from cospadi.calibration.probe import PROBE_BYTES, measure_losses
from cospadi.calibration.statistics import ActivationGram
from cospadi.errors import FitError
from cospadi.learn.allocation import HIGHEST, LOWEST, LossCurve
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.learner import IterationStats
from cospadi.learn.methods import factor_size
from cospadi.learn.quantize import INTEGER_BITS
from cospadi.learn.whitening import WhiteningError, whiten_gram
from cospadi.learn.widths import AUTO, integer_ratios, kept_bits
from cospadi.model.discover import TargetLinear
from cospadi.model.streamed import StreamedSource
from cospadi.native.support import torch_threads
from cospadi.pipeline.costs import COARSE_GROWTH, COARSE_START, SLOPE_BLOCKS
from cospadi.pipeline.fit_task import CPU, fits_one_thread
from cospadi.pipeline.grams import GramSource
from cospadi.pipeline.plan import storage_widths
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.sensitivity import fisher_metrics
from cospadi.pipeline.side_by_side import SideBySide
from cospadi.pipeline.workdir import WorkDir

CURVE_OFFSETS = (-0.1, 0.0, 0.2)
"""Ratios of coarse fits in the blocks that give the slopes, relative to the recipe's; 0 is that of all others."""

CURVE_BITS = (-0.8, 0.0, 1.0)
"""The same for integers of the width that fits: bits per weight, relative to those of the recipe's ratio."""

KEPT_CHANGES = 16
"""Linears whose changes are kept while a block of a streamed model runs; others are read again for every batch."""


def loss_curves(
    grams: GramSource,
    fisher: FisherStore | None,
    targets: Sequence[TargetLinear],
    work: WorkDir,
) -> dict[str, LossCurve]:
    """Curve of every target that can be fitted coarsely, by name.

    Parameters
    ----------
    grams : GramSource
        Activations; needs a folder, so that the fits need not collect them again.
    fisher : FisherStore or None
        Prepared for all targets, where the fits use an output metric.
    targets : sequence of TargetLinear
        Those that take part.
    work : WorkDir
        Keeps changes and losses.
    """
    recipe, log = grams.recipe, grams.log
    steep = slope_targets(targets)
    ratios = {
        t.name: curve_ratios(recipe, t.d_in) if t.name in steep else (base_ratio(recipe, t.d_in),)
        for t in targets
    }
    measured: dict[str, list[float]] = {}
    for target in targets:
        record = work.load_record("curves", target.name)
        if record is not None:
            measured[target.name] = record["losses"]
    pending = [target for target in targets if target.name not in measured]
    fitted = _coarse_fits(grams, fisher, pending, work, ratios)
    ready = [target for target in pending if target.name in fitted]
    # through a streamed model once for all, since a block needs the changes of its own linears only
    is_streamed = isinstance(grams.source, StreamedSource)
    for part in [ready] if is_streamed and ready else _by_bytes(ready, ratios):
        counts = {t.name: len(ratios[t.name]) for t in part}
        changes = _StoredChanges(work, counts, n_kept=KEPT_CHANGES if is_streamed else None)
        with grams.running_model() as model:
            losses = measure_losses(
                model,
                changes,
                grams.calibration.ids[: recipe.backward_windows],
                seed=recipe.seed,
                folder=grams.work,
                progress=lambda done, total: log.progress("backward", done=done, total=total),
            )
        for name, values in losses.items():
            measured[name] = values
            work.store_record("curves", name, {"losses": values})
    curves = _with_slopes([t for t in targets if t.name in measured], ratios, measured)
    for name in measured.keys() - curves.keys():
        log.emit("warning", text=f"{name}: no slope is known; it keeps ratio {recipe.ratio}")
    return curves


def slope_targets(targets: Sequence[TargetLinear]) -> set[str]:
    """Names of the linears that are fitted at several ratios."""
    blocks = sorted({target.block for target in targets if target.block is not None})
    chosen = set(blocks)
    if len(blocks) > 2 * SLOPE_BLOCKS:
        places = range(1, 2 * SLOPE_BLOCKS, 2)
        chosen = {blocks[len(blocks) * place // (2 * SLOPE_BLOCKS)] for place in places}
    return {t.name for t in targets if t.block is None or t.block in chosen}


def curve_ratios(recipe: Recipe, d_in: int) -> tuple[float, ...]:
    """Ratios of the coarse fits of a linear that gives a slope: ascending, two or more."""
    if recipe.coeffs_dtype != AUTO:
        wanted = (min(max(recipe.ratio + o, LOWEST), HIGHEST) for o in CURVE_OFFSETS)
        return tuple(sorted({round(ratio, 4) for ratio in wanted}))
    near = {_nearest(kept_bits(recipe.ratio) + offset, d_in) for offset in CURVE_BITS}
    if len(near) == 1:  # at the top everything is eight bits
        near.add(integer_ratios(d_in)[1])
    return tuple(sorted(near))


def base_ratio(recipe: Recipe, d_in: int) -> float:
    """Ratio of the coarse fit of every other linear."""
    if recipe.coeffs_dtype != AUTO:
        return round(min(max(recipe.ratio, LOWEST), HIGHEST), 4)
    return _nearest(kept_bits(recipe.ratio), d_in)


def _nearest(bits: float, d_in: int) -> float:
    return min(integer_ratios(d_in), key=lambda ratio: abs(kept_bits(ratio) - bits))


def _with_slopes(
    targets: Sequence[TargetLinear],
    ratios: Mapping[str, tuple[float, ...]],
    measured: Mapping[str, Sequence[float]],
) -> dict[str, LossCurve]:
    """Curves; what was measured at one ratio takes the mean slope of its projection, or of all."""
    curves: dict[str, LossCurve] = {}
    slopes: dict[str, list[float]] = defaultdict(list)
    for target in targets:
        if len(ratios[target.name]) > 1:
            curve = LossCurve(ratios[target.name], tuple(measured[target.name]))
            curves[target.name] = curve
            slopes[target.projection].append(curve.mean_slope())
    everywhere = [slope for found in slopes.values() for slope in found]
    for target in targets:
        if target.name not in curves and everywhere:
            slope = mean(slopes.get(target.projection) or everywhere)
            curves[target.name] = LossCurve(
                ratios[target.name], tuple(measured[target.name]), slope
            )
    return {target.name: curves[target.name] for target in targets if target.name in curves}


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
    ratios: Mapping[str, Sequence[float]],
) -> set[str]:
    """Fit what has no stored changes yet; names of the targets that have them in the end."""
    fitted = {t.name for t in targets if _has_changes(work, t.name, len(ratios[t.name]))}
    pending = {target.name: target for target in targets if target.name not in fitted}

    def note(name: str, is_fitted: bool) -> None:
        if not is_fitted:
            grams.log.emit(
                "warning",
                text=f"{name}: no coarse fit at {ratios[name]}; it takes no part in the allocation and keeps "
                f"ratio {grams.recipe.ratio}",
            )
            return
        fitted.add(name)
        grams.log.progress("coarse", module=name, done=len(fitted), total=len(targets))

    with SideBySide(grams.fits_bytes) as fits:
        for finished in grams.collect(list(pending.values())):
            while finished.grams:
                item = finished.grams.pop(next(iter(finished.grams)))
                for given in _coarse_inputs(grams, fisher, pending, item, fits):
                    room = _room(grams, pending[given.name])
                    call = partial(
                        _store_changes,
                        given,
                        grams.recipe,
                        ratios[given.name],
                        room["on_one_thread"],
                        fits,
                        work,
                    )
                    fits.submit(call, partial(note, given.name), **room)
            fits.drain()  # the next pass over the text needs the cores
    return fitted


def _coarse_inputs(
    grams: GramSource,
    fisher: FisherStore | None,
    targets: Mapping[str, TargetLinear],
    item: ActivationGram,
    fits: SideBySide,
) -> Iterator[FitInput]:
    """Inputs of the coarse fits of the linears that share a Gram, each when there is room; none if unusable."""
    fits.make_room(**_room(grams, targets[item.members[0]]))
    gram = item.gram.to(grams.device)
    try:
        whitening = whiten_gram(gram, item.members[0])
    except WhiteningError:
        return  # the fit says so, and keeps them dense
    for name in item.members:
        fits.make_room(**_room(grams, targets[name]))
        metric, output = whitening, None
        if fisher is not None:
            metric, output = fisher_metrics(fisher, targets[name], gram, whitening, grams.recipe)
        weight = grams.source.weight(targets[name])[0].to(grams.device)
        yield FitInput(name, weight, None, gram, metric, output=output)


class _Room(TypedDict):
    """What a coarse fit takes, as `SideBySide` asks for it."""

    shape: tuple[int, int]
    on_one_thread: bool


def _room(grams: GramSource, target: TargetLinear) -> _Room:
    shape = target.d_in, target.d_out
    return {"shape": shape, "on_one_thread": grams.device == CPU and fits_one_thread(*shape)}


def _store_changes(
    given: FitInput,
    recipe: Recipe,
    ratios: Sequence[float],
    on_one_thread: bool,
    fits: SideBySide,
    work: WorkDir,
) -> bool:
    """Keep the changes of a weight by coarse fits; whether there are any."""
    with torch_threads(1 if on_one_thread else torch.get_num_threads()):
        changes = _coarse_changes(given, recipe, ratios, lambda _: fits.report(_nothing))
    for index, change in enumerate(changes or ()):
        work.store_tensor("changes", f"{given.name}.{index}", change)
    return changes is not None


def _nothing() -> None:
    """Coarse fits have nothing to say but that they can be ended."""


def _coarse_changes(
    given: FitInput,
    recipe: Recipe,
    ratios: Sequence[float],
    progress: Callable[[IterationStats], None],
) -> list[Tensor] | None:
    """Changes of the weight (bfloat16) by coarse fits; None where a ratio leaves nothing, or a fit fails."""
    options = dataclasses.replace(
        recipe.learn_options(),
        first_penalty=max(COARSE_START, recipe.first_penalty),
        penalty_growth=max(COARSE_GROWTH, recipe.penalty_growth),
    )
    changes = []
    d_out, d_in = given.weight.shape
    for ratio in ratios:
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
            ((factor, _),) = fit([given], settings, progress=progress)
        except FitError:
            return None
        approximation = factor.dense_weight(device=given.weight.device)
        changes.append((given.weight - approximation).bfloat16().cpu())
    return changes


def _has_changes(work: WorkDir, name: str, count: int) -> bool:
    return all(work.load_tensor("changes", f"{name}.{index}") is not None for index in range(count))


class _StoredChanges(Mapping[str, Sequence[Tensor]]):
    """Changes by module name, ``counts[name]`` of each, read when asked for; the last `n_kept` modules' stay."""

    def __init__(self, work: WorkDir, counts: Mapping[str, int], *, n_kept: int | None) -> None:
        self._counts = counts
        self._read = lru_cache(maxsize=n_kept)(lambda name: _changes(work, name, counts[name]))

    def __getitem__(self, name: str) -> Sequence[Tensor]:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)


def _changes(work: WorkDir, name: str, count: int) -> Sequence[Tensor]:
    found = [work.load_tensor("changes", f"{name}.{index}") for index in range(count)]
    return [change for change in found if change is not None]
