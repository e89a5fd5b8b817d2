"""What the prediction depends on, as fits use it: Fisher matrices made ready, metrics made from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cospadi.calibration.fisher import FisherStore
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.learn.output_metric import (
    DAMPED,
    OutputMetric,
    RowScales,
    output_metric,
    row_scales,
)
from cospadi.learn.whitening import Whitening, WhiteningError, whiten_gram
from cospadi.model.discover import TargetLinear
from cospadi.pipeline.grams import GramSource
from cospadi.pipeline.recipe import Recipe

PLAIN_SHARE = 0.5
"""Share of the plain Gram in a weighted one: the few tokens that carry the weight must not be all there is."""

ATTENTION_READERS = 3
"""As many linears read one input where they are q, k and v."""


def prepare_fisher(
    grams: GramSource, targets: Sequence[TargetLinear], folder: Path
) -> FisherStore | None:
    """Collect the Fisher matrices of targets' outputs, or their diagonals, that `folder` does not hold yet.

    Parameters
    ----------
    grams : GramSource
        Model, calibration windows and recipe.
    targets : sequence of TargetLinear
        All targets.
    folder : Path
        Keeps the matrices.

    Returns
    -------
    FisherStore or None
        With the matrices of those targets that use them; None if none does.

    Raises
    ------
    InputError, BlockwiseError
        The model does not run backwards, or gradients are not finite.
    """
    recipe, log = grams.recipe, grams.log
    targets = [target for target in targets if recipe.weighs_outputs(target)]
    if not targets:
        return None
    limit = recipe.max_gram_gb
    with grams.running_model() as model:
        store = FisherStore(
            folder,
            model,
            grams.calibration.ids[: recipe.backward_windows],
            weights=grams.source.fingerprint,
            seed=recipe.seed,
            is_diagonal=recipe.metric == "diagonal",
            spill=grams.work,
        )
        seconds = store.prepare(
            targets,
            max_bytes=None if limit is None else int(limit * 2**30),
            progress=lambda done, total: log.progress("backward", done=done, total=total),
        )
    log.emit(
        "output_metric", kind=recipe.metric, n_matrices=len(targets), seconds=round(seconds, 2)
    )
    return store


def fisher_metrics(
    fisher: FisherStore,
    target: TargetLinear,
    gram: torch.Tensor,
    whitening: Whitening,
    recipe: Recipe,
) -> tuple[Whitening, OutputMetric | RowScales | None]:
    """Metrics of a target's inputs and outputs.

    Parameters
    ----------
    fisher : FisherStore
        Prepared for the target.
    target : TargetLinear
        Module.
    gram : torch.Tensor
        ``[d_in, d_in]`` float64 activation Gram; the metrics lie on its device.
    whitening : Whitening
        Of it.
    recipe : Recipe
        Settings of the fit that they are for.

    Returns
    -------
    (Whitening, OutputMetric, RowScales or None)
        The first is that of the activation Gram, except where a few tokens carry the gradient: there they weigh more.
    """
    mixed, output = fisher_grams(fisher, target, gram, recipe)
    if mixed is None:
        return whitening, output
    try:
        return whiten_gram(mixed, target.name), output
    except WhiteningError:
        return whitening, output


def fisher_grams(
    fisher: FisherStore,
    target: TargetLinear,
    gram: torch.Tensor,
    recipe: Recipe,
) -> tuple[torch.Tensor | None, OutputMetric | RowScales | None]:
    """Gram to whiten in place of ``gram [d_in, d_in]`` where a few tokens carry the gradient; output metric.

    Both lie on the device of `gram`. With ``output_metric: fisher`` a weight with more outputs than inputs has scales
    of its rows in place of the metric: beside its diagonal such an F is noise, and more than half of a fit's time
    (docs/results.md). Integers keep the metric, in which their rounding errors answer each other, and so do q, k and v,
    of whose outputs attention reads mixtures.

    With ``output_metric: diagonal`` there are scales alone; not for integers, whose rows are rounded each by itself.
    """
    if not recipe.weighs_outputs(target):
        return None, None
    is_rounded = recipe.coeffs_dtype is not None and recipe.coeffs_dtype not in STORAGE_DTYPES
    for_attention = target.n_readers >= ATTENTION_READERS
    is_wide = target.d_out > target.d_in and not for_attention
    output: OutputMetric | RowScales | None
    if recipe.metric == "diagonal" or (is_wide and not is_rounded):
        diagonal = fisher.load_diagonal(target).to(gram.device)
        # the root for gate and up
        output = row_scales(diagonal, target.name, power=1.0 if for_attention else DAMPED)
    else:
        output = output_metric(fisher.load(target).to(gram.device), target.name)
    weighted = None if output is None else fisher.load_weighted_gram(target)
    if is_rounded and isinstance(output, RowScales):
        output = None
    if weighted is None:
        return None, output
    weighted = weighted.to(gram.device)
    share = float(gram.diagonal().mean() / weighted.diagonal().mean())
    return PLAIN_SHARE * gram + (1.0 - PLAIN_SHARE) * share * weighted, output
