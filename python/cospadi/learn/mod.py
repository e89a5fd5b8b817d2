"""Least-squares dictionary for a given code: the method of optimal directions (Engan, Aase, Husoy, 1999)."""

from __future__ import annotations

import torch

from cospadi.errors import FitError

RELATIVE_RIDGE = 1e-8
"""Ridge relative to the mean diagonal of the code's Gram: far above fp64 rounding, far below any error that counts."""


def least_squares_dictionary(
    signals: torch.Tensor,
    code: torch.Tensor,
    atoms: torch.Tensor,
    *,
    ridge: float = RELATIVE_RIDGE,
) -> torch.Tensor:
    """Minimise ``||signals - code atoms||^2`` over the atoms.

    The ridge pulls towards the present ``atoms``: ``min ||Y - X D||^2 + r ||D - D_0||^2`` for signals Y and code X. So
    the error never rises, an atom without coefficients stays as it is, and a singular ``X^T X`` needs no special case.

    Parameters
    ----------
    signals : torch.Tensor
        ``[n, d]``.
    code : torch.Tensor
        ``[n, K]``, zeros off the supports (at half the atoms per row a dense product is the fast one).
    atoms : torch.Tensor
        ``[K, d]`` present atoms.
    ridge : float
        ``r`` relative to the mean diagonal of ``X^T X``.

    Returns
    -------
    torch.Tensor
        ``[K, d]`` float64, any norms.

    Raises
    ------
    FitError
        ``X^T X`` plus the ridge has no Cholesky factor (a code with non-finite coefficients).
    """
    code = code.double()
    present = atoms.double()
    gram = code.T @ code
    gradient = code.T @ signals.double() - gram @ present
    gram.diagonal().add_(relative_ridge(gram, ridge))
    lower, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        raise FitError("the least-squares dictionary has no solution: the code is not finite")
    return present + torch.cholesky_solve(gradient, lower)


def relative_ridge(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """``ridge`` times the mean diagonal of ``gram`` (float64), 0-d; ``ridge`` itself for a zero one."""
    mean = gram.diagonal().mean()
    return ridge * torch.where(mean == 0, torch.ones_like(mean), mean)
