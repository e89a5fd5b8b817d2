"""Sparse coding by splitting: the alternating direction method of multipliers with a rising penalty.

``min ||Y - X A||^2`` with ``X = Z`` and s non-zeros in every row of Z. One linear system serves all rows, the
projection keeps the s largest entries, and the penalty rises until the support of Z no longer moves. The use for
pruning is that of ALPS (Meng et al., arXiv 2406.07831); here the atoms are any dictionary. The penalty also makes the
system well-conditioned, so dependent atoms (identity atoms beside learned ones) need no care.
"""

from __future__ import annotations

import torch

from cospadi.learn.coding.iterative import ridged_factor
from cospadi.learn.coding.problem import CodingProblem, support_mask
from cospadi.learn.result import top_support

FIRST_PENALTY = 0.1
"""For atoms of norm one."""

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""The penalty grows by the second number while more than the first share of the support moved since the last rise."""

HOLD = 3
"""Steps between two rises: a factorisation serves that many."""


def admm_support(
    problem: CodingProblem,
    sparsity: int,
    *,
    start: torch.Tensor | None = None,
    max_steps: int = 60,
    first_penalty: float = FIRST_PENALTY,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Support and code that the splitting ends with.

    Parameters
    ----------
    problem : CodingProblem
        See there.
    sparsity : int
        Atoms per signal.
    start : torch.Tensor, optional
        ``[n, A]`` code (of the unit-norm atoms, not sparse) to start from; the method is not convex, so it matters.
        Without it the solution with the first penalty as a ridge.
    max_steps : int
        At most this many steps.
    first_penalty : float
        Rho of the first steps.

    Returns
    -------
    (indices, code)
        ``[n, s]`` int32 ascending, and ``[n, A]`` with zeros off the support: near the least squares on it, not there.

    Raises
    ------
    FitError
        The Gram of the atoms is not positive semidefinite.
    """
    penalty = first_penalty
    lower = ridged_factor(problem.gram, penalty)
    if start is None:
        start = torch.cholesky_solve(problem.correlations.T, lower).T
    indices = top_support(start.abs(), sparsity)
    mask = support_mask(indices, problem.n_atoms)
    split, dual = start.clone(), torch.zeros_like(start)
    held = mask
    for step in range(1, max_steps + 1):
        right = problem.correlations + penalty * (split - dual)
        code = torch.cholesky_solve(right.T, lower).T
        dual += code
        indices = top_support(dual.abs(), sparsity)
        mask = support_mask(indices, problem.n_atoms)
        split = dual * mask
        dual -= split
        if step % HOLD:
            continue
        moved = float((mask != held).sum()) / (2 * mask.shape[0] * sparsity)
        if moved == 0.0:
            break
        held = mask
        growth = next(factor for share, factor in GROWTH if moved > share)
        penalty *= growth
        dual /= growth
        lower = ridged_factor(problem.gram, penalty)
    return indices, split
