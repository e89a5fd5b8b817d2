"""Least-squares coefficients on a fixed support."""

from __future__ import annotations

import torch


def refit_coefficients(
    signals: torch.Tensor,
    atoms: torch.Tensor,
    indices: torch.Tensor,
    coeffs: torch.Tensor,
    *,
    steps: int = 25,
    tolerance: float = 1e-7,
) -> torch.Tensor:
    """Minimise ``||signals - X atoms||`` over the coefficients, the support kept.

    Conjugate gradients on every column's ``G_II x = p_I`` at once: the products run on the dense ``[n, K]``
    code and the result is masked, so that one GEMM with the shared Gram serves all columns (cheaper than a
    Cholesky of each ``s x s`` block from s of a few hundred on). Jacobi-preconditioned: after rounding and
    un-whitening atoms do not have equal norms. Starts from ``coeffs``; a column never gets worse.

    Parameters
    ----------
    signals : torch.Tensor
        ``[n, d]`` float32 or float64.
    atoms : torch.Tensor
        ``[K, d]``, any norms.
    indices, coeffs : torch.Tensor
        ``[n, s]`` support (integer) and start.
    steps : int
        At most this many CG steps.
    tolerance : float
        Stop when every column's squared residual gradient fell by this factor.

    Returns
    -------
    torch.Tensor
        ``[n, s]`` new coefficients in the dtype of ``signals``.
    """
    atoms = atoms.to(signals.dtype)
    gram = atoms @ atoms.T
    target = signals @ atoms.T
    index = indices.long()
    mask = torch.zeros_like(target).scatter_(1, index, 1.0)
    x = torch.zeros_like(target).scatter_(1, index, coeffs.to(signals.dtype))
    inverse_diagonal = mask / gram.diagonal().clamp_min(torch.finfo(signals.dtype).tiny)

    residual = (target - x @ gram) * mask
    direction = residual * inverse_diagonal
    energy = (residual * direction).sum(1)
    start = energy.clone()
    for _ in range(steps):
        active = energy > tolerance * start
        if not bool(active.any()):
            break
        product = (direction @ gram) * mask
        curvature = (direction * product).sum(1)
        step = torch.where(active & (curvature > 0), energy / curvature, torch.zeros_like(energy))
        x.addcmul_(step[:, None], direction)
        residual.addcmul_(step[:, None], product, value=-1.0)
        scaled = residual * inverse_diagonal
        new_energy = (residual * scaled).sum(1)
        beta = torch.where(active & (energy > 0), new_energy / energy, torch.zeros_like(energy))
        direction = scaled.addcmul_(beta[:, None], direction)
        energy = torch.where(active, new_energy, energy)
    return x.gather(1, index)
