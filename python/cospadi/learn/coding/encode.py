"""One door to all coders."""

from __future__ import annotations

from typing import Literal

import torch

from cospadi import native
from cospadi.errors import InputError
from cospadi.learn.coding.admm import admm_support
from cospadi.learn.coding.iterative import (
    hard_thresholding_pursuit,
    normalised_iht,
    saliency_threshold,
)
from cospadi.learn.coding.problem import Code, CodingProblem, coding_problem, support_mask
from cospadi.learn.refit import solve_on_support

Solver = Literal["auto", "omp", "ormp", "obs", "niht", "htp", "admm"]
SOLVERS: tuple[Solver, ...] = ("auto", "omp", "ormp", "obs", "niht", "htp", "admm")

WELL_CONDITIONED = 1e3
"""Condition of the atoms' Gram up to which the saliency threshold loses nothing."""

REFIT_STEPS = 20
"""Conjugate gradient steps on the final support: the error falls by about half per step at condition 10 to 30."""


def encode(
    signals: torch.Tensor,
    atoms: torch.Tensor,
    sparsity: int,
    solver: Solver,
    *,
    start: torch.Tensor | None = None,
    batch: int = 0,
    num_threads: int | None = None,
) -> Code:
    """Code every signal with exactly ``sparsity`` atoms.

    Parameters
    ----------
    signals : torch.Tensor
        ``[n, d]``.
    atoms : torch.Tensor
        ``[A, d]`` rows of any norm.
    sparsity : int
        ``1 <= s <= A``.
    solver : str
        ``omp``, ``ormp``: exact greedy coders (native). ``obs``: saliency threshold. ``niht``, ``htp``: iterative
        thresholding. ``admm``: splitting. ``auto``: `solver_for` decides.
    start : torch.Tensor, optional
        ``[n, A]`` code for ``admm`` to start from; the others ignore it.
    batch : int
        Signals per call of the greedy coders, 0: all; the result does not depend on it.
    num_threads : int, optional
        Of the native coders.

    Returns
    -------
    Code
        Coefficients are least squares on the support: exactly for the greedy coders, by conjugate gradients for the
        others.

    Raises
    ------
    InputError
        Unknown solver, sparsity out of range.
    FitError
        The atoms are not finite.
    """
    if solver in ("omp", "ormp"):
        return _encode_greedily(signals, atoms, sparsity, solver, batch, num_threads)
    problem = coding_problem(signals, atoms)
    if solver == "auto":
        solver = solver_for(problem.gram)
    indices, code = _select(problem, sparsity, solver, start)
    mask = support_mask(indices, problem.n_atoms)
    code = solve_on_support(
        problem.gram, problem.correlations, mask, code * mask, steps=REFIT_STEPS
    )
    coeffs = (code / problem.lengths).gather(1, indices.long())
    return Code(indices, coeffs)


def solver_for(gram: torch.Tensor) -> Solver:
    """Coder by the condition of the unit-norm atoms' Gram: ``obs`` up to `WELL_CONDITIONED`, else ``admm``."""
    values = torch.linalg.eigvalsh(gram)
    smallest, largest = float(values[0]), float(values[-1])
    return "obs" if smallest * WELL_CONDITIONED > largest else "admm"


def _select(
    problem: CodingProblem, sparsity: int, solver: Solver, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Support ``[n, s]`` and a code ``[n, A]`` to start the least squares from."""
    if solver == "obs":
        return saliency_threshold(problem, sparsity)
    if solver == "niht":
        return normalised_iht(problem, sparsity)
    if solver == "htp":
        first, _ = saliency_threshold(problem, sparsity)
        return hard_thresholding_pursuit(problem, sparsity, start=first)
    if solver == "admm":
        unit_start = None if start is None else start.float() * problem.lengths
        return admm_support(problem, sparsity, start=unit_start)
    raise InputError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")


def _encode_greedily(
    signals: torch.Tensor,
    atoms: torch.Tensor,
    sparsity: int,
    solver: Literal["omp", "ormp"],
    batch: int,
    num_threads: int | None,
) -> Code:
    """On the CPU every correlation is summed in the same order whatever the batch is.

    The native product's order is fixed; BLAS libraries change theirs with the number of rows.
    """
    gram = atoms @ atoms.T

    def correlations(part: torch.Tensor) -> torch.Tensor:
        if not part.is_cpu:
            return part @ atoms.T
        return native.gemm(part, atoms.T, num_threads=num_threads)

    parts = [
        native.omp_encode(
            gram,
            correlations(part),
            sparsity,
            selection=solver,
            num_threads=num_threads,
        )
        for part in signals.split(batch or max(signals.shape[0], 1))
    ]
    return Code(
        torch.cat([part.indices for part in parts]),
        torch.cat([part.coeffs for part in parts]),
        sum(part.n_padded for part in parts),
    )
