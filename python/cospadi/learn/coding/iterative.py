"""Coders made of products with the Gram: saliency threshold, normalised IHT, hard thresholding pursuit.

They cost a few dozen ``[n, A] x [A, A]`` products where a greedy coder needs s dependent steps. From an SVD start the
learned atoms stay well conditioned and all of them reach the error of exact OMP; on coherent dictionaries plain
gradient steps fail, and only the saliency threshold with a ridge, pursuit started from it, or ADMM keep up.
"""

from __future__ import annotations

import torch

from cospadi.errors import FitError
from cospadi.learn.coding.problem import CodingProblem, support_mask
from cospadi.learn.deferred import DeferredChecks
from cospadi.learn.refit import solve_on_support
from cospadi.learn.result import top_support

RIDGE = 1e-3
"""Of the saliency threshold, for atoms of norm one."""


def saliency_threshold(
    problem: CodingProblem, sparsity: int, *, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares over all atoms, then the s most salient coefficients.

    Removing coefficient j alone from the full solution raises the squared error by ``x_j^2 / ((G + r I)^-1)_jj``
    (optimal brain surgeon).

    Parameters
    ----------
    problem : CodingProblem
        See there.
    sparsity : int
        Atoms per signal.
    ridge : float
        r; needed where atoms are dependent.

    Returns
    -------
    (indices, code)
        ``[n, s]`` int32 ascending, and the full solution ``[n, A]``.

    Raises
    ------
    FitError
        ``G + r I`` is not positive definite.
    """
    lower = ridged_factor(problem.gram, ridge)
    code = torch.cholesky_solve(problem.correlations.T, lower).T
    variances = torch.cholesky_inverse(lower).diagonal()
    return top_support(code.square() / variances, sparsity), code


def normalised_iht(
    problem: CodingProblem, sparsity: int, *, steps: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised iterative hard thresholding (Blumensath, Davies, 2010), starting from the largest correlations.

    Returns the support ``[n, s]`` int32 and the last code ``[n, A]``.
    """
    indices = top_support(problem.correlations.abs(), sparsity)
    mask = support_mask(indices, problem.n_atoms)
    code = torch.zeros_like(problem.correlations)
    for _ in range(steps):
        residual = problem.correlations - code @ problem.gram
        code = code + _exact_step(residual, mask, problem.gram) * residual
        indices = top_support(code.abs(), sparsity)
        mask = support_mask(indices, problem.n_atoms)
        code *= mask
    return indices, code


def hard_thresholding_pursuit(
    problem: CodingProblem,
    sparsity: int,
    *,
    start: torch.Tensor | None = None,
    outer: int = 3,
    inner: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hard thresholding pursuit (Foucart, 2011) with conjugate gradients on every support.

    The step goes along the residual off the support, where the correlations on it have been solved away.

    Parameters
    ----------
    problem : CodingProblem
        See there.
    sparsity : int
        Atoms per signal.
    start : torch.Tensor, optional
        ``[n, s]`` first support; the largest correlations without one.
    outer, inner : int
        Supports tried, and conjugate gradient steps on each.

    Returns
    -------
    (indices, code)
        ``[n, s]`` int32 ascending, and the last code ``[n, A]``, not least squares on the support.
    """
    indices = top_support(problem.correlations.abs(), sparsity) if start is None else start
    mask = support_mask(indices, problem.n_atoms)
    code = torch.zeros_like(problem.correlations)
    for _ in range(outer):
        code = solve_on_support(problem.gram, problem.correlations, mask, code * mask, steps=inner)
        residual = problem.correlations - code @ problem.gram
        code = code + _exact_step(residual, 1.0 - mask, problem.gram) * residual
        indices = top_support(code.abs(), sparsity)
        mask = support_mask(indices, problem.n_atoms)
    return indices, code


def ridged_factor(
    gram: torch.Tensor, ridge: float, checks: DeferredChecks | None = None
) -> torch.Tensor:
    """Lower Cholesky factor of ``gram + ridge I``; `FitError` if there is none (from ``checks``, if given)."""
    ridged = gram.clone()
    ridged.diagonal().add_(ridge)
    lower: torch.Tensor
    lower, info = torch.linalg.cholesky_ex(ridged)
    message = "the Gram of the atoms is not positive semidefinite; the atoms are not finite"
    if checks is not None:
        checks.succeeded(info, message)
    elif int(info) != 0:
        raise FitError(message)
    return lower


def _exact_step(residual: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Best step length ``[n, 1]`` along the masked residual."""
    direction = residual * mask
    energy = direction.square().sum(1, keepdim=True)
    curvature = (direction * (direction @ gram)).sum(1, keepdim=True)
    return torch.where(curvature > 0, energy / curvature, torch.zeros_like(energy))
