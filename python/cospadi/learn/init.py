"""Initial dictionaries, and the truncated SVD they and the baselines share."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cospadi.errors import FitError, InputError
from cospadi.learn.options import Init


class SignalSvd(NamedTuple):
    """Singular triplets of ``signals [n, d]``, largest first, fp64.

    ``signals = left @ diag(values) @ right`` with ``left [n, r]``, ``values [r]``, ``right [r, d]`` and
    ``r = min(n, d)``.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def signal_svd(signals: torch.Tensor) -> SignalSvd:
    """SVD of ``signals [n, d]`` through the eigenvectors of the smaller fp64 Gram.

    Several times faster than a bidiagonal SVD for the wide and tall shapes here. Squaring costs the
    singular values below 1e-8 of the largest, which carry 1e-16 of the energy. Raises `FitError` if LAPACK
    does not converge.
    """
    x = signals.double()
    n, d = x.shape
    if n < d:
        other = signal_svd(x.T)
        return SignalSvd(other.right.T, other.values, other.left.T)
    try:
        energies, vectors = torch.linalg.eigh(x.T @ x)
    except RuntimeError as error:
        raise FitError(f"eigendecomposition of the signals failed: {error}") from error
    values = energies.flip(0).clamp_min(0.0).sqrt()
    right = vectors.flip(1).T
    left = x @ right.T
    floor = 1e-8 * float(values[0]) if values.numel() else 0.0
    left = torch.where(
        values > floor, left / values.clamp_min(floor or 1.0), torch.zeros_like(left)
    )
    return SignalSvd(left, values, right)


def principal_directions(signals: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` leading eigenvectors of ``signals^T signals`` as orthonormal rows.

    Parameters
    ----------
    signals : torch.Tensor
        ``[n, d]``; n may be below ``count``: the rest then spans directions without energy.
    count : int
        ``1 <= count <= d``.

    Returns
    -------
    torch.Tensor
        ``[count, d]`` float64.

    Raises
    ------
    InputError
        ``count`` out of range.
    FitError
        LAPACK does not converge.
    """
    d = signals.shape[1]
    if not 1 <= count <= d:
        raise InputError(
            f"n_atoms: an orthonormal basis has 1 to d_in = {d} atoms, got {count}; "
            "bound the budget with max_atoms = d_in"
        )
    x = signals.double()
    try:
        _, vectors = torch.linalg.eigh(x.T @ x)
    except RuntimeError as error:
        raise FitError(f"eigendecomposition of the signals failed: {error}") from error
    return vectors.flip(1).T[:count].contiguous()


def initial_atoms(signals: torch.Tensor, n_atoms: int, init: Init, seed: int) -> torch.Tensor:
    """Unit-norm start dictionary.

    Parameters
    ----------
    signals : torch.Tensor
        ``[n, d]`` whitened weight, one row per output.
    n_atoms : int
        K; may exceed d or n.
    init : {"svd", "columns", "random"}
        See `LearnOptions`.
    seed : int
        Seed of the choice of columns and of the Gaussian fill.

    Returns
    -------
    torch.Tensor
        ``[n_atoms, d]`` in the dtype of ``signals``, every row of norm one.
    """
    generator = torch.Generator().manual_seed(seed)
    if init == "svd":
        svd = signal_svd(signals)
        usable = int((svd.values > 1e-7 * svd.values[0]).sum()) if svd.values.numel() else 0
        atoms = svd.right[: min(n_atoms, usable)]
        if atoms.shape[0] < n_atoms:
            # overcomplete, or a rank-deficient weight: go on with columns of the weight
            fill = _columns(signals, n_atoms - atoms.shape[0], generator)
            atoms = torch.cat([atoms, fill])
    elif init == "columns":
        atoms = _columns(signals, n_atoms, generator)
    else:
        atoms = _gaussian(n_atoms, signals.shape[1], generator).to(signals.device)
    return _normalise(atoms, generator).to(signals.dtype).contiguous()


def _columns(signals: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(signals.shape[0], generator=generator)
    chosen = signals[order[:count].to(signals.device)].double()
    missing = count - chosen.shape[0]
    if missing > 0:
        fill = _gaussian(missing, signals.shape[1], generator)
        chosen = torch.cat([chosen, fill.to(chosen.device)])
    return chosen


def _gaussian(count: int, d: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(count, d, generator=generator, dtype=torch.float64)


def _normalise(atoms: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    norms = atoms.norm(dim=1)
    zero = norms == 0
    if bool(zero.any()):
        # an output that is zero everywhere cannot be an atom
        atoms = atoms.clone()
        fill = _gaussian(int(zero.sum()), atoms.shape[1], generator)
        atoms[zero] = fill.to(atoms.device)
        norms = atoms.norm(dim=1)
    return atoms / norms[:, None]
