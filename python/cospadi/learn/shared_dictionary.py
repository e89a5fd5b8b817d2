"""Least-squares dictionary of a group, every member in its own metric.

``min_D sum_l ||L_l (W_l - D S_l)||^2`` has the coupled normal equations ``sum_l A_l D B_l = sum_l A_l W_l S_l^T`` with
``A_l = L_l^T L_l`` and ``B_l = S_l S_l^T`` (CoSpaDi Eq. 26 to 28). Members with one metric need only the code's Gram
(the method of optimal directions); two are diagonalised together (GeoPair, arXiv 2609.25963); more go to conjugate
gradients. All solve for the *change* of the present dictionary, with a small ridge on the change: the error never
rises, and an atom that nobody uses stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cospadi.errors import FitError
from cospadi.learn.member import Member
from cospadi.learn.mod import RELATIVE_RIDGE, least_squares_dictionary, relative_ridge
from cospadi.learn.result import FloatFactor


@dataclass(frozen=True)
class CoupledTerm:
    """``A D B`` of one member: ``A [d_in, d_in]`` positive definite, ``B [K, K]`` positive semidefinite, float64."""

    a: torch.Tensor
    b: torch.Tensor


def solve_dictionary(
    members: Sequence[Member], factors: Sequence[FloatFactor], *, ridge: float = RELATIVE_RIDGE
) -> torch.Tensor:
    """Best dictionary for the codes of all members, identity atoms kept.

    Parameters
    ----------
    members : sequence of Member
        Weights and metrics.
    factors : sequence of FloatFactor
        Their codes over one dictionary, from which the solve starts.
    ridge : float
        On the change, relative to the mean diagonal of the codes' Gram.

    Returns
    -------
    torch.Tensor
        ``[d_in, K]`` float64, any norms.

    Raises
    ------
    FitError
        A matrix that must be positive definite is not.
    """
    dictionary, n_identity = factors[0].dictionary.double(), factors[0].n_identity
    # What identity atoms contribute is fixed; the learned atoms explain the rest.
    codes = [factor.code() for factor in factors]
    targets = [member.weight.double() for member in members]
    if n_identity:
        targets = [w - code[:, :n_identity] for w, code in zip(targets, codes, strict=True)]
        codes = [code[:, n_identity:] for code in codes]
    if all(member.whitening is members[0].whitening for member in members):
        # With one metric L drops out of the normal equations.
        return least_squares_dictionary(
            torch.cat([m.weigh_outputs(t) for m, t in zip(members, targets, strict=True)]),
            torch.cat([m.weigh_outputs(c) for m, c in zip(members, codes, strict=True)]),
            dictionary.T,
            ridge=ridge,
        ).T
    terms, gradient = [], torch.zeros_like(dictionary)
    for member, target, code in zip(members, targets, codes, strict=True):
        rest, weighed = (
            member.weigh_outputs(target - code @ dictionary.T),
            member.weigh_outputs(code),
        )
        term = CoupledTerm(member.metric, weighed.T @ weighed)
        gradient += term.a @ (rest.T @ weighed)
        terms.append(term)
    solve = solve_pair if len(terms) == 2 else solve_by_conjugate_gradients
    return dictionary + solve(terms, gradient, ridge=ridge)


def solve_pair(
    terms: Sequence[CoupledTerm], right: torch.Tensor, *, ridge: float = RELATIVE_RIDGE
) -> torch.Tensor:
    """Solve ``A_1 D B_1 + A_2 D B_2 + r A D B = right`` with ``A = A_1 + A_2``, ``B = B_1 + B_2``, exactly.

    Both pencils are diagonalised against their sums, ``P^T A P = I``, ``P^T A_1 P = diag(p)``, and Q, q of the B
    likewise, so that ``D = P [(P^T right Q) / (p q^T + (1 - p)(1 - q)^T + r)] Q^T``. The sums keep every number between
    0 and 1 even if one member does not use an atom; GeoPair divides by the first member's matrices instead.

    Parameters
    ----------
    terms : sequence of two CoupledTerm
        The members.
    right : torch.Tensor
        ``[d_in, K]`` float64.
    ridge : float
        r, and the shift of B relative to its mean diagonal.

    Returns
    -------
    torch.Tensor
        ``[d_in, K]`` float64.

    Raises
    ------
    FitError
        A sum is not positive definite, or LAPACK does not converge.
    """
    first, second = terms
    p_vectors, p = _diagonalise(first.a, second.a, 0.0)
    q_vectors, q = _diagonalise(first.b, second.b, ridge)
    inner = p_vectors.T @ right @ q_vectors
    inner /= p[:, None] * q + (1.0 - p)[:, None] * (1.0 - q) + ridge
    return p_vectors @ inner @ q_vectors.T


def solve_by_conjugate_gradients(
    terms: Sequence[CoupledTerm],
    right: torch.Tensor,
    *,
    ridge: float = RELATIVE_RIDGE,
    steps: int = 30,
    tolerance: float = 1e-3,
) -> torch.Tensor:
    """Solve ``sum_l A_l D B_l + r A D B = right`` with ``A``, ``B`` the sums, by preconditioned conjugate gradients.

    The preconditioner ``A D B`` is exact, up to a factor, for equal members. Starts from zero, so any number of steps
    lowers the quadratic whose gradient at zero is ``-right``.

    Parameters
    ----------
    terms : sequence of CoupledTerm
        The members.
    right : torch.Tensor
        ``[d_in, K]`` float64.
    ridge : float
        r, and the shift of B relative to its mean diagonal.
    steps : int
        At most this many products with every term. Ten bring the error of three attention projections of SmolLM2 within
        1e-5 of its minimum, relatively.
    tolerance : float
        Stop when the preconditioned norm of the residual fell by this factor.

    Returns
    -------
    torch.Tensor
        ``[d_in, K]`` float64.

    Raises
    ------
    FitError
        A sum is not positive definite.
    """
    a_sum, b_sum = _sum([term.a for term in terms], 0.0), _sum([term.b for term in terms], ridge)
    a_lower, b_lower = _cholesky(a_sum), _cholesky(b_sum)

    def product(x: torch.Tensor) -> torch.Tensor:
        total = ridge * (a_sum @ x @ b_sum)
        for term in terms:
            total += term.a @ x @ term.b
        return total

    def precondition(residual: torch.Tensor) -> torch.Tensor:
        half = torch.cholesky_solve(residual, a_lower)
        return torch.cholesky_solve(half.T, b_lower).T

    solution = torch.zeros_like(right)
    residual = right.clone()
    scaled = precondition(residual)
    direction = scaled.clone()
    energy = float((residual * scaled).sum())
    enough = tolerance**2 * energy
    for _ in range(steps):
        if energy <= enough or energy <= 0.0:
            break
        image = product(direction)
        step = energy / float((direction * image).sum())
        solution += step * direction
        residual -= step * image
        scaled = precondition(residual)
        previous, energy = energy, float((residual * scaled).sum())
        direction = scaled + energy / previous * direction
    return solution


def _sum(matrices: Sequence[torch.Tensor], ridge: float) -> torch.Tensor:
    total = torch.stack(list(matrices)).sum(0)
    if ridge:
        total.diagonal().add_(relative_ridge(total, ridge))
    return total


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise FitError("the shared dictionary has no solution: a normal matrix is not definite")
    return lower


def _diagonalise(
    first: torch.Tensor, second: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors V and values v in [0, 1] with ``V^T (first + second) V = I`` and ``V^T first V = diag(v)``."""
    lower = _cholesky(_sum([first, second], ridge))
    half = torch.linalg.solve_triangular(lower, first, upper=False)
    reduced = torch.linalg.solve_triangular(lower, half.T, upper=False)
    try:
        values, vectors = torch.linalg.eigh((reduced + reduced.T) * 0.5)
    except RuntimeError as error:
        raise FitError(f"the shared dictionary has no solution: {error}") from error
    vectors = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    return vectors, values.clamp(0.0, 1.0)
