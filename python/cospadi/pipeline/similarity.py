"""Groups of layers that are most alike, from the weights and the activations that they see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from cospadi.learn.grouping import groups_by_similarity as group_similar
from cospadi.learn.grouping import whitened_distances
from cospadi.learn.whitening import Whitening, identity_whitening, whiten_gram
from cospadi.model.discover import TargetLinear, weight_of
from cospadi.model.source import SourceModel
from cospadi.model.streamed import StreamedSource
from cospadi.pipeline.grams import GramSource
from cospadi.pipeline.plan import sharing_runs
from cospadi.pipeline.recipe import Recipe


def groups_by_similarity(
    source: SourceModel | StreamedSource,
    targets: Sequence[TargetLinear],
    recipe: Recipe,
    grams: GramSource | None,
) -> list[tuple[str, ...]]:
    """Groups of ``recipe.group_size`` layers for every projection that may share, the most alike together.

    Parameters
    ----------
    source : SourceModel
        The original model.
    targets : sequence of TargetLinear
        All targets.
    recipe : Recipe
        Which projections share, and how many.
    grams : GramSource or None
        Activations; needs a folder, so that the fits need not collect them again. None compares the weights alone.
    """
    runs = sharing_runs(targets, recipe)
    metrics = _mean_metrics(targets, runs, grams)
    groups: list[tuple[str, ...]] = []
    for run, metric in zip(runs, metrics, strict=True):
        by_name = {target.name: target for target in targets}
        place = metric.factor.device
        weights = [weight_of(source.model, by_name[name])[0].to(place) for name in run]
        distances = whitened_distances(weights, metric)
        groups += [
            tuple(run[i] for i in members)
            for members in group_similar(distances, recipe.group_size)
            if len(members) > 1
        ]
    return groups


def _mean_metrics(
    targets: Sequence[TargetLinear], runs: Sequence[Sequence[str]], grams: GramSource | None
) -> list[Whitening]:
    """Metric of the mean Gram of each run."""
    by_name = {target.name: target for target in targets}
    if grams is None:
        return [identity_whitening(by_name[run[0]].d_in) for run in runs]
    run_of = {name: index for index, run in enumerate(runs) for name in run}
    sums: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
    for finished in grams.collect([by_name[name] for name in run_of]):
        while finished.grams:
            item = finished.grams.pop(next(iter(finished.grams)))
            for name in item.members:
                # each layer counts alike, whatever the size of its activations
                gram = item.gram.to(grams.device)
                scaled = gram / gram.diagonal().mean().clamp_min(1e-300)
                sums[run_of[name]] = sums[run_of[name]] + scaled
    return [whiten_gram(sums[index], run[0]) for index, run in enumerate(runs)]
