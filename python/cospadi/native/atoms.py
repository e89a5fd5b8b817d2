"""The K-SVD atom update."""

from __future__ import annotations

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


@dataclass(frozen=True)
class AtomUpdateStats:
    """What one call of `update_atoms` did.

    Attributes
    ----------
    objective_before, objective_after : float
        ``|Y - X D|^2`` (squared Frobenius norm), accumulated in double precision.
    n_unused : int
        Atoms that no signal uses.
    n_reseeded : int
        Unused atoms replaced by the residual direction of a badly coded signal.
    n_halved : int
        Blocks undone and halved because they would have raised the objective.
    workspace_bytes : int
        Memory held during the call.
    """

    objective_before: float
    objective_after: float
    n_unused: int
    n_reseeded: int
    n_halved: int
    workspace_bytes: int


def update_atoms(
    atoms: torch.Tensor,
    signals: torch.Tensor,
    indices: torch.Tensor,
    coeffs: torch.Tensor,
    *,
    power_iterations: int = 1,
    block_size: int = 64,
    sweeps: int = 1,
    unused: Literal["skip", "reseed"] = "skip",
    num_threads: int | None = None,
) -> AtomUpdateStats:
    """Improve atoms and coefficients in place with the supports kept (K-SVD).

    For each atom ``d`` with coefficients ``x`` on the signals ``Omega`` that use it, and
    ``E = R_Omega + x d^T`` the residual without it: `power_iterations` times ``d = E^T x / |E^T x|``,
    ``x = E d``.

    Parameters
    ----------
    atoms : torch.Tensor
        ``[n_atoms, d]`` float32 or float64 on the CPU, rows with unit inner stride, updated in place; used
        atoms have unit norm afterwards.
    signals : torch.Tensor
        ``[n_signals, d]``, same dtype.
    indices : torch.Tensor
        ``[n_signals, sparsity]`` int32, strictly ascending per row.
    coeffs : torch.Tensor
        ``[n_signals, sparsity]``, same dtype as `atoms`, unit inner stride, updated in place.
    power_iterations : int
        At least 1; or 0 for iterating to convergence: until an alternation moves the atom by less than 1e-6 (float32)
        or 1e-12 (float64), at most 200 times. That is the best rank-one update (the paper's exact PCA), as far as the
        gap between the first two singular values of ``E`` lets the iteration tell them apart.
    block_size : int
        Atoms updated together against one residual. 1 is the strictly sequential method; larger blocks run as
        dense matrix products. A block that would raise the objective is undone and halved, so the objective
        never increases beyond rounding.
    sweeps : int
        Passes over all atoms.
    unused : {"skip", "reseed"}
        Atoms that no signal uses stay, or become the direction of the residual of the worst coded signal (each
        signal serves once).
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    AtomUpdateStats
        Objective before and after, counts.

    Raises
    ------
    InputError
        Wrong dtype, device, shape or layout, an option out of range, an index out of range or out of order, a
        non-finite input. Nothing has been changed then.
    MemoryError
        The workspace (about ``n_signals * d`` elements) cannot be allocated.

    Notes
    -----
    An atom whose update is zero stays as it is. The result is the same for any thread count.

    References
    ----------
    Aharon, Elad, Bruckstein: K-SVD (2006); Rubinstein et al. (2008) for the power iteration; Irofti, Dumitrescu,
    arXiv:1509.05054, for updating atoms in parallel.
    """
    name = "update_atoms"
    dtypes = (torch.float32, torch.float64)
    check_tensor(name, "atoms", atoms, (None, None), dtypes)
    n_atoms, dim = atoms.shape
    check_tensor(name, "signals", signals, (None, dim), (atoms.dtype,))
    n_signals = signals.shape[0]
    check_tensor(name, "indices", indices, (n_signals, None), (torch.int32,))
    sparsity = indices.shape[1]
    check_tensor(name, "coeffs", coeffs, (n_signals, sparsity), (atoms.dtype,))
    if unused not in ("skip", "reseed"):
        raise InputError(f"{name}: unused: expected 'skip' or 'reseed', got {unused!r}")
    for label, tensor in (("atoms", atoms), ("coeffs", coeffs)):
        if tensor.numel() and unit_stride_rows(tensor).data_ptr() != tensor.data_ptr():
            raise InputError(
                f"{name}: {label}: updated in place, so rows must have unit stride; call .contiguous()"
            )
    signals, indices = unit_stride_rows(signals), unit_stride_rows(indices)
    update = _C.update_atoms_f32 if atoms.dtype == torch.float32 else _C.update_atoms_f64
    with native_errors(name):
        before, after, n_unused, n_reseeded, n_halved, workspace_bytes = update(
            atoms.data_ptr(),
            row_stride(atoms),
            signals.data_ptr(),
            row_stride(signals),
            indices.data_ptr(),
            row_stride(indices),
            coeffs.data_ptr(),
            row_stride(coeffs),
            n_atoms,
            dim,
            n_signals,
            sparsity,
            power_iterations,
            block_size,
            sweeps,
            unused == "reseed",
            thread_count(num_threads),
        )
    return AtomUpdateStats(before, after, n_unused, n_reseeded, n_halved, workspace_bytes)
