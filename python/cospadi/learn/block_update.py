"""The K-SVD atom update in blocks as matrix products, for tensors that do not lie on the CPU.

`cospadi.native.update_atoms` is the same method with kernels for processors, and its reference describes it. Here every
block of atoms J is a handful of dense products with the residual ``R = Y - X D`` (coefficients X with their zeros)::

    U = R^T X_J + D_J diag(X_J^T X_J);  D_J' = U with unit columns;  X_J' = mask (R D_J' + X_J diag(D_J'^T D_J))
"""

from __future__ import annotations

import torch

from cospadi.native import AtomUpdateStats

CONVERGED_ITERATIONS = 60
"""Power iterations for the best rank-one term."""


def update_atoms_in_blocks(
    atoms: torch.Tensor,
    signals: torch.Tensor,
    indices: torch.Tensor,
    coeffs: torch.Tensor,
    *,
    power_iterations: int,
    block_size: int,
    sweeps: int,
    unused: str,
) -> AtomUpdateStats:
    """Improve atoms and coefficients in place with the supports kept; arguments as `cospadi.native.update_atoms`.

    Memory: the residual twice, and two matrices of coefficients ``[n, K]``. Every block waits for the device once: has
    the objective fallen?
    """
    index = indices.long()
    code = torch.zeros((signals.shape[0], atoms.shape[0]), dtype=atoms.dtype, device=atoms.device)
    code.scatter_(1, index, coeffs)
    mask = torch.zeros_like(code).scatter_(1, index, 1.0)
    residual = signals - code @ atoms
    before = objective = _energy(residual)
    n_halved = 0
    iterations = power_iterations or CONVERGED_ITERATIONS
    for sweep in range(sweeps):
        if sweep:
            residual = signals - code @ atoms  # takes back what rounding added
            objective = _energy(residual)
        first, limit, n_accepted = 0, block_size, 0
        while first < atoms.shape[0]:
            block = slice(first, min(first + limit, atoms.shape[0]))
            size = block.stop - first
            moved, moved_code = _improved(
                atoms[block], code[:, block], mask[:, block], residual, iterations
            )
            change = torch.cat([code[:, block], moved_code], 1)
            new_residual = residual.addmm(change, torch.cat([atoms[block], -moved]))
            new_objective = _energy(new_residual)
            if size > 1 and new_objective > objective:
                limit, n_accepted, n_halved = size // 2, 0, n_halved + 1
                continue
            atoms[block], code[:, block] = moved, moved_code
            residual, objective = new_residual, new_objective
            first, n_accepted = block.stop, n_accepted + 1
            if n_accepted >= 4 and limit < block_size:
                limit, n_accepted = min(2 * limit, block_size), 0
    coeffs.copy_(code.gather(1, index))
    is_unused = ~mask.any(0)
    n_unused, n_reseeded = int(is_unused.sum()), 0
    if unused == "reseed" and n_unused:
        n_reseeded = _reseed(atoms, residual, is_unused)
    return AtomUpdateStats(before, objective, n_unused, n_reseeded, n_halved, 0)


def _improved(
    atoms: torch.Tensor,
    code: torch.Tensor,
    mask: torch.Tensor,
    residual: torch.Tensor,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Atoms ``[b, d]`` and coefficients ``[n, b]`` after the power iterations, each atom by itself."""
    moved, found = atoms, code
    for _ in range(iterations):
        # E^T x for E = R_Omega + x_0 d_0^T
        candidate = found.T @ residual + (code * found).sum(0)[:, None] * atoms
        norms = candidate.norm(dim=1, keepdim=True)
        is_zero = norms == 0
        moved = torch.where(is_zero, moved, candidate / norms.masked_fill(is_zero, 1.0))
        image = (residual @ moved.T + code * (moved * atoms).sum(1)) * mask
        found = torch.where(is_zero[:, 0], found, image)
    return moved, found


def _reseed(atoms: torch.Tensor, residual: torch.Tensor, is_unused: torch.Tensor) -> int:
    """Put directions of the residuals of the worst coded signals in the place of unused atoms; how many."""
    energies = residual.double().square().sum(1)
    free = is_unused.nonzero()[:, 0]
    worst = energies.argsort(descending=True, stable=True)[: free.numel()]
    worst = worst[energies[worst] > 0]
    atoms[free[: worst.numel()]] = torch.nn.functional.normalize(residual[worst], dim=1)
    return worst.numel()


def _energy(residual: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(residual, dtype=torch.float64).square())
