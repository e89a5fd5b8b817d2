"""The alternation: sparse coding of all signals, then the atom update (CoSpaDi Algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cospadi import native
from cospadi.learn.block_update import update_atoms_in_blocks
from cospadi.learn.coding import Code, encode
from cospadi.learn.init import initial_atoms
from cospadi.learn.mod import least_squares_dictionary
from cospadi.learn.options import LearnOptions, Unused


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
    total = float(signals.double().square().sum())
    atoms = initial_atoms(signals, n_atoms, options.init, options.seed)
    history: list[IterationStats] = []
    if options.iterations == 0 or total == 0.0:
        code = _encode(signals, atoms, sparsity, options, num_threads)
        return LearnResult(atoms, code.indices, code.coeffs, ())

    best: LearnResult | None = None
    best_error = float("inf")
    for iteration in range(1, options.iterations + 1):
        start = time.perf_counter()
        code = _encode(signals, atoms, sparsity, options, num_threads)
        coded = time.perf_counter()
        stats = _update(atoms, signals, code, options, num_threads)
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
            best = LearnResult(atoms.clone(), code.indices, code.coeffs, ())
        # coding anew may raise the error a little; with tolerance 0 that stops nothing either
        if options.tolerance and improvement < options.tolerance:
            break
    assert best is not None
    return LearnResult(best.atoms, best.indices, best.coeffs, tuple(history))


def _encode(
    signals: torch.Tensor,
    atoms: torch.Tensor,
    sparsity: int,
    options: LearnOptions,
    num_threads: int | None,
) -> Code:
    return encode(
        signals,
        atoms,
        sparsity,
        options.solver,
        batch=options.coding_batch,
        num_threads=num_threads,
    )


class UpdateStats(NamedTuple):
    """Squared errors before and after a dictionary update, atoms that no signal uses, and those replaced."""

    objective_before: float
    objective_after: float
    n_unused: int
    n_reseeded: int


def _update(
    atoms: torch.Tensor,
    signals: torch.Tensor,
    code: Code,
    options: LearnOptions,
    num_threads: int | None,
) -> UpdateStats:
    if options.update == "mod":
        return update_by_least_squares(atoms, signals, code, unused=options.unused)
    if atoms.is_cpu:
        stats = native.update_atoms(
            atoms,
            signals,
            code.indices,
            code.coeffs,
            power_iterations=options.power_iterations,
            block_size=options.block_size,
            sweeps=options.sweeps,
            unused=options.unused,
            num_threads=num_threads,
        )
    else:
        stats = update_atoms_in_blocks(
            atoms,
            signals,
            code.indices,
            code.coeffs,
            power_iterations=options.power_iterations,
            block_size=options.block_size,
            sweeps=options.sweeps,
            unused=options.unused,
        )
    return UpdateStats(
        stats.objective_before, stats.objective_after, stats.n_unused, stats.n_reseeded
    )


def update_by_least_squares(
    atoms: torch.Tensor, signals: torch.Tensor, code: Code, *, unused: Unused = "skip"
) -> UpdateStats:
    """Replace all atoms by their least-squares values for the code (MOD), in place.

    The new atoms are scaled to norm one and the scale moves into the coefficients, so the product is that of the
    unscaled solution. Atoms that no signal uses stay, or become the directions of the residuals of the worst coded
    signals.

    Parameters
    ----------
    atoms : torch.Tensor
        ``[K, d]``, unit rows, updated in place.
    signals : torch.Tensor
        ``[n, d]``.
    code : Code
        Of the signals; its coefficients are updated in place.
    unused : {"skip", "reseed"}
        What happens to atoms without coefficients.

    Returns
    -------
    UpdateStats
        Objectives and counts.
    """
    dense = code.dense(atoms.shape[0])
    before = (signals - dense @ atoms).double().square().sum()
    solved = least_squares_dictionary(signals, dense, atoms)
    norms = solved.norm(dim=1)
    used = dense.any(dim=0) & (norms > 0)
    atoms[used] = (solved[used] / norms[used, None]).to(atoms.dtype)
    norms = torch.where(used, norms, torch.ones_like(norms)).to(atoms.dtype)
    code.coeffs.mul_(norms[code.indices.long()])
    residual = signals - code.dense(atoms.shape[0]) @ atoms
    energies = residual.double().square().sum(1)
    n_unused = int((~used).sum())
    n_reseeded = 0
    if unused == "reseed" and n_unused:
        worst = energies.argsort(descending=True, stable=True)[:n_unused]
        worst = worst[energies[worst] > 0]
        n_reseeded = worst.numel()
        free = (~used).nonzero()[:n_reseeded, 0]
        atoms[free] = torch.nn.functional.normalize(residual[worst], dim=1)
    return UpdateStats(float(before), float(energies.sum()), n_unused, n_reseeded)
