"""Augmented dictionaries ``[I | D]``: the d_in inputs themselves are atoms, beside K learned ones.

Identity atoms cost nothing to store but their bits in the mask, and nothing to multiply. A code over them alone is a
pruned weight; learned atoms that every output uses are a low-rank part. One selection over both kinds finds what each
output needs.

Codes and learned atoms are found together. The codes are split as in `cospadi.learn.coding.admm`: a ridge solution over
all atoms, and a sparse one next to it, drawn together by a penalty that rises slowly from almost nothing. After every
step the learned atoms move to their least-squares place for the sparse codes, while most supports are still undecided.
That order is what counts: alternating full codings with atom updates settles the supports on the first atoms
(``q_proj`` of layer 15 of SmolLM2-135M, 72 learned atoms, 60 % of the bytes: relative error 0.0480 after four
alternations and 0.0442 after twelve (prototypes of the same steps), 0.0431 with the default options in one rise, 0.0403
in a slower one (growth 1.1); identity atoms alone 0.0641).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from cospadi.learn.deferred import DeferredChecks
from cospadi.learn.group import GroupFit, relative_group_error, unit_columns
from cospadi.learn.init import signal_svd
from cospadi.learn.learner import IterationStats
from cospadi.learn.member import Member
from cospadi.learn.options import LearnOptions
from cospadi.learn.result import FloatFactor, full_identity
from cospadi.learn.shared_dictionary import solve_dictionary
from cospadi.learn.splitting import Split
from cospadi.learn.whitening import Whitening

MAX_STEPS = 400
"""Bound on the steps of the rise; it ends by itself when supports rest, at a penalty of about one."""

MAX_PENALTY = 1e3
"""Where the rise ends at the latest: nothing can move any more. Weights that are sparse already come here, because
which of their zeros belong to a support is decided by rounding errors, for ever."""

REST = 3
"""Steps without a moved support after which the rise ends."""

REFIT_STEPS = 4
"""Conjugate gradient steps before the last update of the learned atoms, on final supports, and after it. Further rounds
of both gain nothing (under 0.3 % of error)."""


def fit_augmented(
    members: Sequence[Member],
    joint: Whitening,
    n_atoms: int,
    sparsity: int,
    options: LearnOptions,
    *,
    progress: Callable[[IterationStats], None] | None = None,
) -> GroupFit:
    """Learn the learned part of an augmented dictionary and the codes over both parts.

    Every member is measured in its own metric.

    Parameters
    ----------
    members : sequence of Member
        Weights with their whitenings; equal ``d_in``.
    joint : Whitening
        Of the mean of the members' Grams, for the start; for one member its own.
    n_atoms, sparsity : int
        Learned atoms K (0: identity atoms only) and coefficients per output, of both kinds.
    options : LearnOptions
        ``first_penalty`` and ``penalty_growth`` are used.
    progress : callable, optional
        Called once, at the end.

    Returns
    -------
    GroupFit
        With one entry of history: errors when the supports came to rest, and at the end. Where every weight may stay,
        the weights themselves and no history.

    Raises
    ------
    FitError
        A Gram is not finite.
    """
    start = time.perf_counter()
    if n_atoms == 0 and sparsity == members[0].weight.shape[1]:
        whole = tuple(full_identity(member.weight) for member in members)
        return GroupFit(whole, tuple(members), (), (0.0,))
    dictionary = _leading_atoms(members, joint, n_atoms)
    checks = DeferredChecks()
    splits = [Split(member, dictionary, checks, options.products) for member in members]
    penalty, resting = options.first_penalty, 0
    for _ in range(MAX_STEPS):
        moved = [split.step(penalty, sparsity) for split in splits]
        resting = 0 if any(checks.settle(moved)) else resting + 1
        if resting == REST:
            break
        penalty *= options.penalty_growth
        if penalty > MAX_PENALTY:
            break
        for split in splits:
            split.relax(options.penalty_growth)
        if n_atoms and len(splits) == 1:
            splits[0].update_dictionary()
        elif n_atoms:
            _update(members, splits)
    checks.settle()
    coded = time.perf_counter()
    coding_error = relative_group_error(members, [split.factor() for split in splits])
    if n_atoms:
        for split in splits:
            split.refit(REFIT_STEPS)
        _update(members, splits)
    for split in splits:
        split.refit(REFIT_STEPS)
    factors = [split.factor() for split in splits]
    error = relative_group_error(members, factors)
    used = torch.stack([(split.sparse[:, split.d_in :] != 0).any(0) for split in splits]).any(0)
    stats = IterationStats(
        iteration=1,
        error_after_coding=coding_error,
        error_after_update=error,
        n_unused=int((~used).sum()),
        n_reseeded=0,
        n_padded=0,
        coding_s=coded - start,
        update_s=time.perf_counter() - coded,
    )
    if progress is not None:
        progress(stats)
    return GroupFit(tuple(factors), tuple(members), (stats,), (error,))


def _update(members: Sequence[Member], splits: Sequence[Split]) -> None:
    """Least-squares learned atoms for the sparse codes of all members."""
    factors = [split.factor() for split in splits]
    dictionary = solve_dictionary(members, factors)
    moved = unit_columns(
        [FloatFactor(dictionary, f.indices, f.coeffs, f.n_identity) for f in factors]
    )
    for split, factor in zip(splits, moved, strict=True):
        split.take(factor)


def _leading_atoms(members: Sequence[Member], joint: Whitening, n_atoms: int) -> torch.Tensor:
    """``[d_in, K]`` leading directions of the weights in the joint metric."""
    if n_atoms == 0:
        return members[0].weight.new_zeros((members[0].weight.shape[1], 0), dtype=torch.float64)
    signals = torch.cat([m.weigh_outputs(joint.whiten(m.weight)) for m in members])
    columns = joint.unwhiten_atoms(signal_svd(signals).right[:n_atoms])
    return columns / columns.norm(dim=0)
