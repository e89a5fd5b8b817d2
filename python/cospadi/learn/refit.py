"""Least-squares coefficients on a fixed support."""

from __future__ import annotations

import torch

from cospadi import native


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

    Parameters
    ----------
    signals : torch.Tensor
        ``[n, d]`` float32 or float64.
    atoms : torch.Tensor
        ``[K, d]``, any norms.
    indices, coeffs : torch.Tensor
        ``[n, s]`` support (integer) and start.
    steps : int
        At most this many conjugate gradient steps.
    tolerance : float
        See `solve_on_support`.

    Returns
    -------
    torch.Tensor
        ``[n, s]`` new coefficients in the dtype of ``signals``.
    """
    atoms = atoms.to(signals.dtype)
    correlations = signals @ atoms.T
    index = indices.long()
    mask = torch.zeros_like(correlations).scatter_(1, index, 1.0)
    start = torch.zeros_like(correlations).scatter_(1, index, coeffs.to(signals.dtype))
    code = solve_on_support(
        atoms @ atoms.T, correlations, mask, start, steps=steps, tolerance=tolerance
    )
    return code.gather(1, index)


def solve_on_support(
    gram: torch.Tensor,
    correlations: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor,
    *,
    steps: int,
    tolerance: float = 1e-7,
) -> torch.Tensor:
    """Conjugate gradients on every row's ``G_II x = p_I`` at once.

    The products run on the dense code and the result is masked, so that one GEMM with the shared Gram serves all rows
    (cheaper than a Cholesky of each ``s x s`` block from s of a few hundred on). Jacobi-preconditioned: after rounding
    and un-whitening atoms do not have equal norms.

    Parameters
    ----------
    gram : torch.Tensor
        ``[A, A]`` Gram of the atoms.
    correlations : torch.Tensor
        ``[n, A]`` of the signals with the atoms.
    mask : torch.Tensor
        ``[n, A]``, one on the supports and zero elsewhere, in the dtype of ``gram``.
    start : torch.Tensor
        ``[n, A]``, zero off the supports. No row gets worse than it.
    steps : int
        At most this many.
    tolerance : float
        Stop when every row's squared gradient fell by this factor, or to rounding error.

    Returns
    -------
    torch.Tensor
        ``[n, A]``, zero off the supports.
    """
    x = start.clone()
    inverse_diagonal = mask / gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
    residual = (correlations - x @ gram) * mask
    direction = residual * inverse_diagonal
    energy = (residual * direction).sum(1)
    # below this the gradient is rounding error, and following it only moves the code along flat directions
    noise = torch.finfo(gram.dtype).eps ** 2 * (correlations.square() * inverse_diagonal).sum(1)
    enough = torch.maximum(tolerance * energy, gram.shape[0] * noise)
    if not x.is_cpu:
        # no look at the energies: a row that has enough rests, and asking would cost more than the steps
        for _ in range(steps):
            native.gradient_step(
                direction @ gram, mask, inverse_diagonal, enough, x, residual, direction, energy
            )
        return x
    for _ in range(steps):
        active = energy > enough
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
    return x


def solve_on_support_jointly(
    gram: torch.Tensor,
    rows: torch.Tensor,
    correlations: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor,
    *,
    steps: int,
) -> torch.Tensor:
    """Conjugate gradients on ``B X G = B P`` over all supports at once, where an output metric couples the rows.

    Parameters
    ----------
    gram, correlations, mask, start
        As in `solve_on_support`; `correlations` without the output metric.
    rows : torch.Tensor
        ``[n, n]`` output metric B, positive definite, in the dtype of ``gram``.
    steps : int
        At most this many.

    Returns
    -------
    torch.Tensor
        ``[n, A]``, zero off the supports, with an objective not above that of the start.
    """
    tiny = torch.finfo(gram.dtype).tiny
    scaling = mask / (rows.diagonal()[:, None] * gram.diagonal()).clamp_min(tiny)
    x = start.clone()
    residual = (rows @ (correlations - x @ gram)) * mask
    direction = residual * scaling
    energy = float((residual * direction).sum())
    enough = 1e-7 * energy
    for _ in range(steps):
        if energy <= enough:
            break
        product = (rows @ (direction @ gram)) * mask
        curvature = float((direction * product).sum())
        if not curvature > 0.0:
            break
        step = energy / curvature
        x.add_(direction, alpha=step)
        residual.sub_(product, alpha=step)
        scaled = residual * scaling
        previous, energy = energy, float((residual * scaled).sum())
        direction = scaled.add_(direction, alpha=energy / previous)
    return x
