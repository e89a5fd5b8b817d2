"""Integer coefficients for a given support, rounded with error feedback."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from cospadi import _C
from cospadi.errors import InputError
from cospadi.native.support import (
    check_tensor,
    native_errors,
    row_stride,
    thread_count,
    unit_stride_rows,
)

MAX_ROUND_LIMIT = 1 << 20
"""Largest ``limit`` of `round_code`."""


@dataclass(frozen=True)
class RoundCodeResult:
    """Integers and what it took to find them.

    Attributes
    ----------
    fields : torch.Tensor
        ``[n, s]`` int32, at most the limit in magnitude.
    errors : torch.Tensor or None
        ``[n]`` float32, ``(x - step q)^T G_II (x - step q)``; None if not asked for.
    n_raised : int
        Rows whose Gram was not positive definite with the damping asked for, and got a larger one.
    n_plain : int
        Rows rounded without feedback because no damping helped (a Gram of zeros, for example).
    n_moves : int
        Integers that coordinate descent changed.
    workspace_bytes : int
        Memory held during the call, all threads together.
    """

    fields: torch.Tensor
    errors: torch.Tensor | None
    n_raised: int
    n_plain: int
    n_moves: int
    workspace_bytes: int


def round_code(
    gram: torch.Tensor,
    indices: torch.Tensor | None,
    coeffs: torch.Tensor,
    steps: torch.Tensor,
    limit: int,
    *,
    group: int = 0,
    order: Literal["energy", "index"] = "energy",
    damping: float = 1e-3,
    sweeps: int = 4,
    with_errors: bool = False,
    num_threads: int | None = None,
) -> RoundCodeResult:
    """Round coefficients to integers, each error passed on to the coefficients that are not fixed yet.

    Looks for integers q with a small ``(x - step q)^T G_II (x - step q)`` in every row with support I. With the support
    in the chosen order and ``G_II + ridge = R^T R``, R upper triangular, from the last coefficient to the first::

        q_j = round((x_j + sum_{i > j} R_ji (x_i - step_i q_i) / R_jj) / step_j), ties to even, |q_j| <= limit

    Parameters
    ----------
    gram : torch.Tensor
        ``[A, A]`` float32 on the CPU, symmetric positive semidefinite (symmetry is not checked).
    indices : torch.Tensor or None
        ``[n, s]`` int32 supports, strictly ascending per row; None: every row uses all atoms, ``s = A``.
    coeffs : torch.Tensor
        ``[n, s]`` float32 x, best the least-squares solution on the support.
    steps : torch.Tensor
        ``[n, g]`` float32, positive; ``g = 1`` without groups, else ``ceil(s / group)``.
    limit : int
        Largest magnitude of an integer, 1 to `MAX_ROUND_LIMIT`.
    group : int
        Consecutive coefficients that share a step; 0: all of a row.
    order : {"energy", "index"}
        What is fixed first, so that all others can absorb its error: the coefficient with the largest diagonal element
        of the Gram (ties: lowest index), GPTQ's act-order; or the last one of the row.
    damping : float
        Ridge relative to the mean of the support's diagonal. It shapes the feedback alone: errors are undamped.
    sweeps : int
        Passes of coordinate descent afterwards, at most: each coefficient, ascending, moves to its best integer given
        all others. The objective never rises. The first pass costs most; one that changes nothing is the last.
    with_errors : bool
        Whether to compute `RoundCodeResult.errors`.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    RoundCodeResult
        Integers, errors and counts.

    Raises
    ------
    InputError
        Wrong dtype, device, shape or option; indices out of range or not ascending; a step that is not positive; a
        non-finite input; a negative diagonal.
    MemoryError
        The workspace (about ``s^2 / 2`` elements per thread) cannot be allocated.

    Notes
    -----
    A Gram that is not positive definite gets its ridge raised tenfold, from 1e-6 of the mean at least, up to eight
    times; after that the row is rounded plainly. Both are counted. Time about ``s^3 / 3`` flops per row; with full
    support that once, and ``s^2`` per row. The result is the same for any thread count.

    References
    ----------
    Babai, On Lovasz' lattice reduction and the nearest lattice point problem (1986); Frantar et al., GPTQ, arXiv
    2210.17323.
    """
    name = "round_code"
    float32 = (torch.float32,)
    check_tensor(name, "gram", gram, (None, None), float32)
    n_atoms = gram.shape[0]
    check_tensor(name, "gram", gram, (n_atoms, n_atoms), float32)
    check_tensor(name, "coeffs", coeffs, (None, n_atoms if indices is None else None), float32)
    n_rows, sparsity = coeffs.shape
    if not 1 <= sparsity <= n_atoms:
        raise InputError(
            f"{name}: coeffs: expected 1 to n_atoms = {n_atoms} columns, got {sparsity}"
        )
    if order not in ("energy", "index"):
        raise InputError(f"{name}: order: expected 'energy' or 'index', got {order!r}")
    for label, value, lowest, highest in (
        ("limit", limit, 1, MAX_ROUND_LIMIT),
        ("group", group, 0, 2**62),
        ("sweeps", sweeps, 0, 2**30),
    ):
        if not lowest <= value <= highest:
            raise InputError(f"{name}: {label}: expected {lowest} to {highest}, got {value}")
    if not (math.isfinite(damping) and damping >= 0):
        raise InputError(f"{name}: damping: expected a finite number of at least 0, got {damping}")
    n_steps = -(-sparsity // group) if group else 1
    check_tensor(name, "steps", steps, (n_rows, n_steps), float32)
    if indices is not None:
        check_tensor(name, "indices", indices, (n_rows, sparsity), (torch.int32,))
        indices = unit_stride_rows(indices)
    gram, coeffs, steps = unit_stride_rows(gram), unit_stride_rows(coeffs), unit_stride_rows(steps)
    fields = torch.empty((n_rows, sparsity), dtype=torch.int32, device=gram.device)
    errors = torch.empty(n_rows, dtype=torch.float32, device=gram.device) if with_errors else None
    with native_errors(name):
        n_raised, n_plain, n_moves, workspace_bytes = _C.round_code(
            gram.data_ptr(),
            n_atoms,
            row_stride(gram),
            0 if indices is None else indices.data_ptr(),
            sparsity if indices is None else row_stride(indices),
            coeffs.data_ptr(),
            n_rows,
            sparsity,
            row_stride(coeffs),
            steps.data_ptr(),
            n_steps,
            row_stride(steps),
            limit,
            group,
            order == "energy",
            damping,
            sweeps,
            fields.data_ptr(),
            0 if errors is None else errors.data_ptr(),
            thread_count(num_threads),
        )
    return RoundCodeResult(fields, errors, n_raised, n_plain, n_moves, workspace_bytes)
