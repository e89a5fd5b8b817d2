"""Floating-point operations of the stages of a compression, by shape.

One add or one multiply is one operation. The counts follow the code: `cospadi.calibration.capture` (Gram),
`cospadi.learn.whitening`, `cospadi.learn.splitting` (augmented dictionaries), `cospadi.learn.learner` with the solver
OBS and three sweeps of block updates (learned ones).
"""

from __future__ import annotations

PANEL = 192
"""Columns of a Gram that are computed at a time, see `cospadi.calibration.capture`."""
CG_STEPS = 12
SWEEPS = 3


def gram_flops(tokens: int, d_in: int) -> float:
    """Upper triangle of X^T X, by panels."""
    return 1.0 * tokens * d_in * (d_in + PANEL)


def whitening_flops(d_in: int) -> float:
    """Cholesky factor in float64."""
    return d_in**3 / 3.0


def step_flops(d_in: int, d_out: int, n_atoms: int) -> float:
    """One step of the rise of augmented dictionaries: ridge solution, learned atoms, their products."""
    n = d_in + n_atoms
    solve = 2.0 * d_out * n**2 + (n**3 if d_out >= n else n**3 / 3.0)
    update = 4.0 * d_out * n_atoms * d_in + 2.0 * (d_out + d_in) * n_atoms**2 + n_atoms**3 / 3.0
    products = 4.0 * d_in**2 * n_atoms + 2.0 * d_in * n_atoms**2 + 2.0 * d_out * d_in * n_atoms
    return solve + update + products


def augmented_flops(d_in: int, d_out: int, n_atoms: int, n_steps: int) -> float:
    """A fit of an augmented dictionary; refits, rounding and checks are some ten steps more."""
    return (n_steps + 10.0) * step_flops(d_in, d_out, n_atoms)


def alternation_flops(d_in: int, d_out: int, n_atoms: int) -> float:
    """One alternation of a learned dictionary: correlations, ridge solution and refit, block update."""
    coding = 2.0 * d_in * n_atoms * (n_atoms + d_out) + 2.0 * (1 + CG_STEPS) * d_out * n_atoms**2
    return coding + SWEEPS * 8.0 * d_in * d_out * n_atoms
