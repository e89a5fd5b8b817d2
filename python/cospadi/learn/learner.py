"""The alternation: sparse coding of all signals, then the atom update (CoSpaDi Algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cospadi import native
from cospadi.learn.init import initial_atoms
from cospadi.learn.options import LearnOptions


@dataclass(frozen=True)
class IterationStats:
    """One alternation. Errors are relative, ``||signals - X atoms||_F / ||signals||_F``."""

    iteration: int
    error_after_coding: float
    error_after_update: float
    n_unused: int
    n_reseeded: int
    n_padded: int
    coding_s: float
    update_s: float


@dataclass(frozen=True)
class LearnResult:
    """A learned dictionary and code.

    Attributes
    ----------
    atoms : torch.Tensor
        ``[K, d]`` float32, unit-norm rows, whitened space.
    indices : torch.Tensor
        ``[n, s]`` int32, ascending.
    coeffs : torch.Tensor
        ``[n, s]`` float32.
    history : tuple of IterationStats
        One entry per alternation that was run.
    """

    atoms: torch.Tensor
    indices: torch.Tensor
    coeffs: torch.Tensor
    history: tuple[IterationStats, ...]


def encode(
    signals: torch.Tensor,
    atoms: torch.Tensor,
    sparsity: int,
    options: LearnOptions,
    *,
    signal_energies: torch.Tensor | None = None,
    num_threads: int | None = None,
) -> native.OmpResult:
    """Sparse code of ``signals [n, d]`` over ``atoms [K, d]`` in Gram form, exactly ``sparsity`` per row."""
    return native.omp_encode(
        atoms @ atoms.T,
        signals @ atoms.T,
        sparsity,
        signal_energies=signal_energies,
        selection=options.solver,
        num_threads=num_threads,
    )


def learn(
    signals: torch.Tensor,
    n_atoms: int,
    sparsity: int,
    options: LearnOptions,
    *,
    num_threads: int | None = None,
    progress: Callable[[IterationStats], None] | None = None,
) -> LearnResult:
    """Learn a dictionary for one whitened weight.

    ``min ||signals - X atoms||_F^2`` with exactly ``sparsity`` coefficients in every row of X and unit-norm atoms.
    The code is computed anew in each iteration: keeping supports freezes them (measured, 3 to 5 % more
    error). With ``iterations = 0`` the initial dictionary is coded once.

    Parameters
    ----------
    signals : torch.Tensor
        ``[n, d]`` float32.
    n_atoms, sparsity : int
        K and s, ``1 <= s <= K``.
    options : LearnOptions
        See there.
    num_threads : int, optional
        Threads of the native kernels; torch's setting by default.
    progress : callable, optional
        Called after each iteration.

    Returns
    -------
    LearnResult
        The state after the last atom update, which is the best one seen: neither half-step raises the
        error except for ties and rounding.
    """
    energies = signals.double().square().sum(1).to(signals.dtype)
    total = float(signals.double().square().sum())
    atoms = initial_atoms(signals, n_atoms, options.init, options.seed)
    history: list[IterationStats] = []
    if options.iterations == 0 or total == 0.0:
        code = encode(signals, atoms, sparsity, options, num_threads=num_threads)
        return LearnResult(atoms, code.indices, code.coeffs, ())

    best: LearnResult | None = None
    best_error = float("inf")
    for iteration in range(1, options.iterations + 1):
        start = time.perf_counter()
        code = encode(
            signals, atoms, sparsity, options, signal_energies=energies, num_threads=num_threads
        )
        coded = time.perf_counter()
        indices, coeffs = code.indices, code.coeffs
        stats = native.update_atoms(
            atoms,
            signals,
            indices,
            coeffs,
            power_iterations=options.power_iterations,
            block_size=options.block_size,
            sweeps=options.sweeps,
            unused=options.unused,
            num_threads=num_threads,
        )
        error = (stats.objective_after / total) ** 0.5
        history.append(
            IterationStats(
                iteration=iteration,
                error_after_coding=(stats.objective_before / total) ** 0.5,
                error_after_update=error,
                n_unused=stats.n_unused,
                n_reseeded=stats.n_reseeded,
                n_padded=code.n_padded,
                coding_s=coded - start,
                update_s=time.perf_counter() - coded,
            )
        )
        if progress is not None:
            progress(history[-1])
        improvement = 1.0 - error / best_error if best is not None else 1.0
        if error < best_error:
            best_error = error
            best = LearnResult(atoms.clone(), indices, coeffs, ())
        if improvement < options.tolerance:
            break
    assert best is not None
    return LearnResult(best.atoms, best.indices, best.coeffs, tuple(history))
