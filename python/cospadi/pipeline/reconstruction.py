"""Block-wise reconstruction of the finished factors, with its results on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from cospadi.calibration.blockwise import BlockwiseDecoder
from cospadi.calibration.placement import placed
from cospadi.calibration.reconstruction import (
    BlockResult,
    ReconstructionOptions,
    reconstruct_blocks,
)
from cospadi.learn.whitening import relative_error, weight_error
from cospadi.model.discover import weight_of
from cospadi.pipeline.grams import GramSource
from cospadi.pipeline.job import Job

STAGE = "reconstructed"
"""Folder of the work directory."""

HELD_BACK_SHARE = 8
"""One window in so many is held back to judge."""


def reconstruct(job: Job, grams: GramSource) -> list[dict[str, Any]]:
    """Tune the factors of a finished job block by block, in place, and restate their errors.

    Parameters
    ----------
    job : Job
        Finished; its factors and reports are replaced by the tuned ones. A report gets ``fitted_error``, the relative
        error before.
    grams : GramSource
        The Grams are needed again for the errors.

    Returns
    -------
    list of dict
        Per block ``block``, ``before``, ``after``, ``is_kept`` and ``seconds`` (see
        `cospadi.calibration.reconstruction.BlockResult`).
    """
    recipe, ids = job.recipe, grams.calibration.ids
    options = ReconstructionOptions(
        epochs=recipe.reconstruction_epochs,
        rate=recipe.reconstruction_rate,
        batch_size=recipe.batch_size,
        held_back=min(max(1, ids.shape[0] // HELD_BACK_SHARE), ids.shape[0] - 1),
        seed=recipe.seed,
    )
    shared = {
        member.name for members in job.groups.values() if len(members) > 1 for member in members
    }
    summaries = _resume(job)
    finished = {name: job.factors[name] for summary in summaries for name in summary["members"]}
    with placed(job.source.model, grams.device, whole=True):
        for result in reconstruct_blocks(
            job.source.model,
            job.factors,
            ids,
            options,
            shared=shared,
            finished=finished,
            progress=lambda done, total: job.log.progress("reconstruction", done=done, total=total),
        ):
            summaries.append(_commit(job, result))
    _restate_errors(job, grams, [name for summary in summaries for name in summary["members"]])
    return sorted(summaries, key=lambda summary: int(summary["block"]))


def check_blockwise(grams: GramSource) -> None:
    """Refuse a model that cannot be run block by block (`BlockwiseError`), before hours of fits."""
    ids = grams.calibration.ids[: grams.recipe.batch_size]
    was_training = grams.source.model.training
    grams.source.model.eval()
    with placed(grams.source.model, grams.device, whole=True):
        BlockwiseDecoder(grams.source.model).prepare(ids)
    grams.source.model.train(was_training)


def _resume(job: Job) -> list[dict[str, Any]]:
    """Put the results of blocks that an earlier run finished into the job."""
    summaries = []
    for block in sorted({t.block for t in job.targets.values() if t.block is not None}):
        summary = job.work.load_record(STAGE, f"block-{block}")
        if summary is None:
            continue
        stored = {name: job.work.load(name, stage=STAGE) for name in summary["members"]}
        results = {name: result for name, result in stored.items() if result is not None}
        if len(results) < len(stored):
            continue  # damaged: done again
        for name, (factor, _) in results.items():
            if not factor.owns_dictionary:
                old = job.factors[name]
                factor = dataclasses.replace(
                    factor, dictionary=old.dictionary, dictionary_scale=old.dictionary_scale
                )
            job.factors[name] = factor
        summaries.append(summary)
    if summaries:
        job.log.emit("resume_reconstruction", n_blocks=len(summaries))
    return summaries


def _commit(job: Job, result: BlockResult) -> dict[str, Any]:
    """Store a block's factors, and then what was gained: that makes the block finished."""
    for name, factor in result.factors.items():
        job.work.store(name, factor, {}, stage=STAGE)
        job.factors[name] = factor
    summary = {
        "block": result.block,
        "members": list(result.factors),
        "before": result.before,
        "after": result.after,
        "is_kept": result.is_kept,
        "seconds": round(result.seconds, 2),
    }
    job.work.store_record(STAGE, f"block-{result.block}", summary)
    job.log.emit("reconstructed", **summary)
    return summary


def _restate_errors(job: Job, grams: GramSource, names: Sequence[str]) -> None:
    """Errors of the factors as they are now; those of the fits stay beside them as ``fitted_error``."""
    for finished in grams.collect([job.targets[name] for name in names]):
        for item in finished.grams.values():
            for name in item.members:
                report = job.reports[name]
                weight = weight_of(job.source.model, job.targets[name])[0].to(grams.device)
                approximation = job.factors[name].dense_weight(torch.float64, device=grams.device)
                report["fitted_error"] = report["relative_error"]
                gram = item.gram.to(grams.device)
                report["relative_error"] = relative_error(gram, weight, approximation)
                report["weight_error"] = weight_error(weight, approximation)
