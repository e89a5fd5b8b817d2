"""One dictionary for several weights: CoSpaDi with cross-layer groups; a single weight is a group of one.

Two objectives. *Averaged* (CoSpaDi Eq. 26 to 32, as Basis Sharing): every member is measured in the metric of the mean
activation Gram, so a group is learned like the one weight that its members make side by side. *Exact*: every member
keeps its own Gram, ``sum_l ||X_l (W_l - D S_l)||^2``; starts from the averaged solution and alternates codes and
dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cospadi.learn.coding import encode
from cospadi.learn.learner import IterationStats, learn
from cospadi.learn.member import Member, group_error
from cospadi.learn.options import LearnOptions
from cospadi.learn.result import FloatFactor, dense_code
from cospadi.learn.shared_dictionary import solve_dictionary
from cospadi.learn.whitening import Whitening

GroupObjective = Literal["averaged", "exact"]
GROUP_OBJECTIVES: tuple[GroupObjective, ...] = ("averaged", "exact")


@dataclass(frozen=True)
class GroupFit:
    """A dictionary and the codes of its members.

    Attributes
    ----------
    factors : tuple of FloatFactor
        One per member, all with the same dictionary tensor of unit columns.
    members : tuple of Member
        Weights with the metric that the objective gives them; rounding goes on in it.
    history : tuple of IterationStats
        Alternations of the learner, in the averaged metric.
    exact_errors : tuple of float
        Relative error of the exact objective, ``sqrt(sum_l ||X_l (W_l - W~_l)||^2 / sum_l ||X_l W_l||^2)``: of the
        averaged solution, then after every alternation with the members' own Grams. One value if there is none.
    """

    factors: tuple[FloatFactor, ...]
    members: tuple[Member, ...]
    history: tuple[IterationStats, ...]
    exact_errors: tuple[float, ...]


def fit_group(
    members: Sequence[Member],
    joint: Whitening,
    n_atoms: int,
    sparsity: int,
    options: LearnOptions,
    *,
    objective: GroupObjective = "exact",
    alternations: int = 4,
    num_threads: int | None = None,
    progress: Callable[[IterationStats], None] | None = None,
) -> GroupFit:
    """Learn one dictionary for all members.

    Parameters
    ----------
    members : sequence of Member
        Weights with the whitening of their own activation Grams; equal ``d_in``.
    joint : Whitening
        Of the mean of the members' Grams; for one member its own.
    n_atoms, sparsity : int
        K and s; `cospadi.learn.budget.sparse_size` with the summed ``d_out``.
    options : LearnOptions
        Of the learner.
    objective : {"averaged", "exact"}
        See the module. They are the same thing for one member.
    alternations : int
        At most this many with the members' own Grams; ends early when the error falls by less than
        ``options.tolerance``.
    num_threads, progress
        As in `cospadi.learn.learner.learn`.

    Returns
    -------
    GroupFit
        The exact objective is never above that of the averaged solution.
    """
    signals = torch.cat([joint.whiten(member.weight) for member in members]).float()
    result = learn(signals, n_atoms, sparsity, options, num_threads=num_threads, progress=progress)
    sizes = [member.weight.shape[0] for member in members]
    dictionary = joint.unwhiten_atoms(result.atoms)
    factors = unit_columns(
        [
            FloatFactor(dictionary, indices, coeffs)
            for indices, coeffs in zip(
                result.indices.split(sizes), result.coeffs.double().split(sizes), strict=True
            )
        ]
    )
    errors = [relative_group_error(members, factors)]
    if objective == "averaged" or len(members) == 1:
        shared = tuple(Member(member.weight, joint) for member in members)
        return GroupFit(tuple(factors), shared, result.history, tuple(errors))

    best = factors
    for _ in range(alternations):
        coded = [
            _recode(member, factor, options, num_threads)
            for member, factor in zip(members, factors, strict=True)
        ]
        dictionary = solve_dictionary(members, coded)
        factors = unit_columns(
            [FloatFactor(dictionary, factor.indices, factor.coeffs) for factor in coded]
        )
        errors.append(relative_group_error(members, factors))
        if errors[-1] < min(errors[:-1]):
            best = factors
        if options.tolerance and errors[-1] > (1.0 - options.tolerance) * errors[-2]:
            break
    return GroupFit(tuple(best), tuple(members), result.history, tuple(errors))


def _recode(
    member: Member, factor: FloatFactor, options: LearnOptions, num_threads: int | None
) -> FloatFactor:
    """Coefficients in the member's own metric: for every output the better of its support refitted and OMP anew."""
    kept = member.refit(factor, factor.dictionary)
    signals = member.signals.float()
    atoms = member.atoms(factor.dictionary).float()
    fresh = encode(signals, atoms, factor.sparsity, options.solver, num_threads=num_threads)

    def errors(indices: torch.Tensor, coeffs: torch.Tensor) -> torch.Tensor:
        code = dense_code(indices, coeffs.float(), atoms.shape[0])
        return (signals - code @ atoms).square().sum(1, keepdim=True)

    better = errors(fresh.indices, fresh.coeffs) < errors(kept.indices, kept.coeffs)
    return FloatFactor(
        factor.dictionary,
        torch.where(better, fresh.indices, kept.indices),
        torch.where(better, fresh.coeffs, kept.coeffs),
    )


def unit_columns(factors: Sequence[FloatFactor]) -> list[FloatFactor]:
    """The same products with unit-norm dictionary columns; their scale moves into the coefficients.

    Identity atoms stay as they are. Un-whitened columns differ in norm by the condition of L; unit columns round alike
    in every type and keep float16 in range.
    """
    norms = factors[0].dictionary.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    dictionary = factors[0].dictionary / norms
    everything = torch.cat([norms.new_ones(factors[0].n_identity), norms])
    return [
        FloatFactor(
            dictionary,
            f.indices,
            f.coeffs.double() * everything[f.indices.long()],
            f.n_identity,
        )
        for f in factors
    ]


def relative_group_error(members: Sequence[Member], factors: Sequence[FloatFactor]) -> float:
    """``sqrt(sum_l ||X_l (W_l - W~_l)||^2 / sum_l ||X_l W_l||^2)``; 0 for zero weights."""
    total = sum(member.energy for member in members)
    lost = group_error(members, [factor.dense_weight() for factor in factors])
    return (lost / total) ** 0.5 if total else 0.0
