"""Batched exact orthogonal matching pursuit."""

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
class OmpResult:
    """Sparse codes of a batch of signals.

    Attributes
    ----------
    indices : torch.Tensor
        ``[n_signals, sparsity]`` int32, strictly ascending per row.
    coeffs : torch.Tensor
        ``[n_signals, sparsity]``, dtype of the inputs, in the order of `indices`.
    residual_energies : torch.Tensor or None
        ``[n_signals]`` squared residual norms; None without signal energies.
    n_padded : int
        Support entries filled at coefficient 0 because every remaining atom was dependent.
    workspace_bytes : int
        Memory held during the call, all threads together.
    n_passes, n_rows : int
        Passes over a history and history rows computed, summed over the signals; ``n_rows`` above
        ``n_signals * (sparsity - 1)`` is wasted speculation.
    """

    indices: torch.Tensor
    coeffs: torch.Tensor
    residual_energies: torch.Tensor | None
    n_padded: int
    workspace_bytes: int
    n_passes: int
    n_rows: int


def omp_encode(
    gram: torch.Tensor,
    correlations: torch.Tensor,
    sparsity: int,
    *,
    signal_energies: torch.Tensor | None = None,
    selection: Literal["omp", "ormp"] = "omp",
    num_threads: int | None = None,
    block_size: int = 0,
) -> OmpResult:
    """Code every signal with exactly `sparsity` atoms by orthogonal matching pursuit.

    ``argmin_x |y - D x|`` over the support that the greedy method builds one atom at a time.

    Parameters
    ----------
    gram : torch.Tensor
        ``[n_atoms, n_atoms]`` float32 or float64, ``D^T D``. Atoms need no unit norm. On a GPU its kernel runs, which
        checks no values and gives no statistics but `OmpResult.n_padded`.
    correlations : torch.Tensor
        ``[n_signals, n_atoms]``, same dtype; row n is ``D^T y_n``.
    sparsity : int
        Atoms per signal, ``1 <= sparsity <= n_atoms``.
    signal_energies : torch.Tensor, optional
        ``[n_signals]``, same dtype, ``|y_n|^2``; enables `OmpResult.residual_energies`.
    selection : {"omp", "ormp"}
        ``omp``: largest correlation with the residual per unit atom norm. ``ormp``: largest decrease of the
        error (orthogonal least squares; what SPAMS' ``omp`` does).
    num_threads : int, optional
        Default ``torch.get_num_threads()``.
    block_size : int
        History rows computed per pass, 0 chooses. It changes the speed only, 1 is the plain algorithm.

    Returns
    -------
    OmpResult
        Codes and statistics.

    Raises
    ------
    InputError
        Wrong dtype, device, shape or sparsity; a non-finite element of an input; a negative diagonal (on the CPU).
    MemoryError
        The workspace (about ``sparsity * n_atoms`` elements per thread) cannot be allocated.

    Notes
    -----
    Time about ``1.4 n_atoms sparsity^2`` flops per signal; memory independent of the number of signals. Equal
    scores are broken by the lowest index; the result is the same to the bit for any thread count and block size.

    References
    ----------
    Rubinstein, Zibulevsky, Elad: Efficient implementation of the K-SVD algorithm using Batch-OMP (2008);
    Zhu et al., Electronics 9 (2020) 1507, for the history recurrence.
    """
    name = "omp_encode"
    dtypes = (torch.float32, torch.float64)
    check_tensor(name, "gram", gram, (None, None), dtypes, any_device=True)
    n_atoms = gram.shape[0]
    check_tensor(name, "gram", gram, (n_atoms, n_atoms), dtypes, any_device=True)
    check_tensor(
        name, "correlations", correlations, (None, n_atoms), (gram.dtype,), any_device=True
    )
    if correlations.device != gram.device:
        raise InputError(
            f"{name}: correlations: expected them on {gram.device} like the Gram, got {correlations.device}"
        )
    n_signals = correlations.shape[0]
    if selection not in ("omp", "ormp"):
        raise InputError(f"{name}: selection: expected 'omp' or 'ormp', got {selection!r}")
    if not 1 <= sparsity <= n_atoms:
        raise InputError(f"{name}: sparsity: expected 1 to n_atoms = {n_atoms}, got {sparsity}")
    if not gram.is_cpu:
        return _encode_on_device(gram, correlations, sparsity, signal_energies, selection)
    gram, correlations = unit_stride_rows(gram), unit_stride_rows(correlations)
    residual_energies = None
    if signal_energies is not None:
        check_tensor(name, "signal_energies", signal_energies, (n_signals,), (gram.dtype,))
        signal_energies = unit_stride_rows(signal_energies)
        residual_energies = torch.empty(n_signals, dtype=gram.dtype, device=gram.device)
    indices = torch.empty((n_signals, sparsity), dtype=torch.int32, device=gram.device)
    coeffs = torch.empty((n_signals, sparsity), dtype=gram.dtype, device=gram.device)
    encode = _C.omp_encode_f32 if gram.dtype == torch.float32 else _C.omp_encode_f64
    with native_errors(name):
        n_padded, workspace_bytes, n_passes, n_rows = encode(
            gram.data_ptr(),
            row_stride(gram),
            correlations.data_ptr(),
            row_stride(correlations) if n_signals else n_atoms,
            0 if signal_energies is None else signal_energies.data_ptr(),
            n_signals,
            n_atoms,
            sparsity,
            selection == "ormp",
            thread_count(num_threads),
            block_size,
            indices.data_ptr(),
            coeffs.data_ptr(),
            0 if residual_energies is None else residual_energies.data_ptr(),
        )
    return OmpResult(
        indices, coeffs, residual_energies, n_padded, workspace_bytes, n_passes, n_rows
    )


def _encode_on_device(
    gram: torch.Tensor,
    correlations: torch.Tensor,
    sparsity: int,
    signal_energies: torch.Tensor | None,
    selection: str,
) -> OmpResult:
    indices, coeffs, n_padded = torch.ops.cospadi.omp_encode(
        gram.detach(), correlations.detach(), sparsity, selection == "ormp"
    )
    residual_energies = None
    if signal_energies is not None:
        # at the least-squares coefficients |y - D x|^2 = |y|^2 - x^T D^T y
        explained = (coeffs.double() * correlations.double().gather(1, indices.long())).sum(1)
        residual_energies = (signal_energies.double() - explained).clamp_min(0).to(gram.dtype)
    return OmpResult(indices, coeffs, residual_energies, int(n_padded), 0, 0, 0)
