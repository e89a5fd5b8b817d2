"""Floating-point operations of the stages of a compression, by shape, and how fast they run.

One add or one multiply is one operation. The counts follow the code: `cospadi.calibration.capture` (Gram),
`cospadi.learn.whitening`, `cospadi.learn.splitting` (augmented dictionaries), `cospadi.learn.learner` with the solver
OBS and three sweeps of block updates (learned ones). ``bench/scaling/measure.py`` measures single matrices; the shares
below are its rates, relative to a float32 product of the same run (docs/scaling.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cospadi.model.discover import TargetLinear
from cospadi.pipeline.plan import ModulePlan
from cospadi.pipeline.recipe import Recipe

PANEL = 192
"""Columns of a Gram that are computed at a time, see `cospadi.calibration.capture`."""
CG_STEPS = 12
SWEEPS = 3
RISE_STEPS = 32
"""The penalty of the default rise reaches one after 29 steps, and supports rest a few later."""
AUGMENTED_SHARE, ALTERNATION_SHARE = 0.40, 0.63
"""Of the speed of a product. The rest of a step are factorisations, selections and passes over memory."""
REST_FACTOR = {
    "magnitude": 14.0,
    "wanda": 14.0,
    "svd": 45.0,
    "svd-llm": 45.0,
    "basis-sharing": 45.0,
}
"""Operations of a product that take as long as a whole fit of other methods does per ``d_in^2 d_out``."""
OTHER_FACTOR = 112.0
"""The same for what a learned dictionary does beside its alternations (its start and the rounding), and as a bound for
methods that are not listed; SparseGPT took 84."""


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


def fit_flops(module: ModulePlan, recipe: Recipe) -> float:
    """Operations of a product that take about as long as the fit of one matrix."""
    d_in, d_out = module.d_in, module.d_out
    size = 1.0 * d_in**2 * d_out
    if recipe.method != "cospadi":
        return size * REST_FACTOR.get(recipe.method, OTHER_FACTOR)
    if module.n_identity:
        steps = augmented_flops(d_in, d_out, module.n_atoms, RISE_STEPS)
        return steps * max(1, len(module.candidates)) / AUGMENTED_SHARE
    turns = max(1, recipe.learn_options().iterations)
    one = alternation_flops(d_in, d_out, module.n_atoms) / ALTERNATION_SHARE
    if recipe.solver in ("omp", "ormp"):
        # steps of a pursuit wait for memory: taken as four operations for each (not measured)
        one += 4.0 * 2.0 * d_out * module.n_atoms * module.sparsity**2
    return size * OTHER_FACTOR + turns * one


def embedding_width(model: nn.Module, targets: Sequence[TargetLinear]) -> int:
    """Features of the hidden states."""
    width = max(t.d_in for t in targets)
    return int(getattr(model.get_input_embeddings(), "embedding_dim", width))  # type: ignore[operator]
