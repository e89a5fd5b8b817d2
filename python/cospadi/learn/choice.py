"""The kind of dictionary and its number of atoms, chosen for every weight (`dictionary: auto`).

At equal stored bytes a weight may be pruned (identity atoms), a truncated SVD (learned atoms that every output uses), a
sparse code over learned atoms (CoSpaDi), or have identity and learned atoms in any proportion. Which is best depends on
the weight. Coarse fits tell the hopeless ones apart, and what is left is fitted in full and rounded; the best result as
stored is taken, so that no corner is better than what was chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from cospadi.learn.augmented import fit_augmented
from cospadi.learn.baselines.low_rank import truncated
from cospadi.learn.group import GroupFit, GroupObjective, fit_group, relative_group_error
from cospadi.learn.learner import IterationStats
from cospadi.learn.member import Member
from cospadi.learn.methods import FactorSize
from cospadi.learn.options import LearnOptions
from cospadi.learn.whitening import Whitening

MARGIN = 1.3
"""What is worse than the best coarse fit by this factor is not fitted in full: from coarse to full the error falls by
10 to 30 %, more for sparse codes over learned atoms than for the rest."""


def learn_dictionary(
    members: Sequence[Member],
    joint: Whitening,
    size: FactorSize,
    options: LearnOptions,
    *,
    objective: GroupObjective = "exact",
    num_threads: int | None = None,
    progress: Callable[[IterationStats], None] | None = None,
) -> GroupFit:
    """Fit one kind and size.

    Parameters
    ----------
    members, joint, options, objective, num_threads, progress
        See `cospadi.learn.group.fit_group`.
    size : FactorSize
        With identity atoms: `cospadi.learn.augmented.fit_augmented`. Without, one member, full support: truncated SVD,
        the optimum of that form.
    """
    if size.n_identity:
        return fit_augmented(
            members, joint, size.n_atoms, size.sparsity, options, progress=progress
        )
    if size.full_support and len(members) == 1:
        factors = [truncated(members[0], size.n_atoms)]
        error = relative_group_error(members, factors)
        return GroupFit(tuple(factors), tuple(members), (), (error,))
    return fit_group(
        members,
        joint,
        size.n_atoms,
        size.sparsity,
        options,
        objective=objective,
        num_threads=num_threads,
        progress=progress,
    )


def shortlist(
    members: Sequence[Member],
    joint: Whitening,
    sizes: Sequence[FactorSize],
    options: LearnOptions,
    *,
    num_threads: int | None = None,
) -> list[FactorSize]:
    """Sizes that may turn out best, by coarse fits; the most promising first.

    The first of `sizes` always stays: coarse fits flatter small numbers of learned atoms, which need longer to find
    their places (layer 15 of SmolLM2-135M, v and o: a share of 0.1 looked best and 0.2 was, by 2 and 8 %). Of the other
    sizes with both kinds of atoms only the best one does.

    Parameters
    ----------
    members, joint, options, num_threads
        See `cospadi.learn.group.fit_group`.
    sizes : sequence of FactorSize
        At equal stored bytes; at least one.
    """
    coarse = dataclasses.replace(
        options, first_penalty=0.02, penalty_growth=1.6, iterations=2, sweeps=2
    )
    errors: dict[FactorSize, float] = {}
    for size in dict.fromkeys(sizes):
        found = learn_dictionary(members, joint, size, coarse, num_threads=num_threads)
        errors[size] = relative_group_error(members, found.factors)
    ranked = sorted(errors, key=lambda size: errors[size])
    best_error = errors[ranked[0]]
    others = [size for size in ranked if size != sizes[0] and errors[size] <= MARGIN * best_error]
    mixed = [size for size in others if size.n_identity and size.n_atoms]
    kept = {sizes[0], *mixed[:1], *(size for size in others if size not in mixed)}
    return [size for size in ranked if size in kept]
