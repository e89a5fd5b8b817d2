"""Floating-point operations of the stages of a compression, by shape, and how fast they run.

One add or one multiply is one operation. The counts follow the code: `cospadi.calibration.capture` (Gram),
`cospadi.learn.whitening`, `cospadi.learn.splitting` (augmented dictionaries), `cospadi.learn.learner` with the solver
OBS and three sweeps of block updates (learned ones). ``bench/scaling/measure.py`` measures single matrices; the shares
below are its rates, relative to a float32 product of the same run (docs/scaling.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from cospadi.model.discover import TargetLinear, decoder_blocks, input_embeddings
from cospadi.pipeline.plan import ModulePlan, Plan
from cospadi.pipeline.recipe import Recipe

PANEL = 192
"""Columns of a Gram that are computed at a time, see `cospadi.calibration.capture`."""
CG_STEPS = 12
SWEEPS = 3
REST_STEPS = 3
"""Supports rest about as many steps after the penalty of a rise has reached one."""
FISHER_FACTOR = 2.5
"""Time of a step with coupled outputs, relative to one without (docs/results.md: 2 to 3)."""
COARSE_START, COARSE_GROWTH = 0.03, 1.6
"""First penalty and its growth in coarse fits, which take a third of the steps of a fine one."""
SLOPE_BLOCKS, SLOPE_RATIOS = 3, 3
"""Blocks whose linears are fitted coarsely at several ratios; models with up to twice as many give all theirs."""
AUGMENTED_SHARE, ALTERNATION_SHARE = 0.48, 0.63
"""Of the speed of a product. The rest of a step are factorisations, selections and passes over memory. The first was
0.40 in the measurements of docs/scaling.md; fits of the shapes of SmolLM2-135M now have 0.35 (192 outputs) to 0.65."""
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


def rise_steps(first_penalty: float, growth: float) -> int:
    """Steps until the supports of a rise rest."""
    return int(math.log(1.0 / first_penalty) / math.log(growth)) + REST_STEPS


def fit_flops(module: ModulePlan, recipe: Recipe) -> float:
    """Operations of a product that take about as long as the fit of one matrix."""
    d_in, d_out = module.d_in, module.d_out
    size = 1.0 * d_in**2 * d_out
    if recipe.method != "cospadi":
        return size * REST_FACTOR.get(recipe.method, OTHER_FACTOR)
    if module.n_identity:
        n_steps = rise_steps(recipe.first_penalty, recipe.penalty_growth)
        steps = augmented_flops(d_in, d_out, module.n_atoms, n_steps)
        if recipe.metric == "fisher" and d_out <= d_in:
            steps *= FISHER_FACTOR
        return steps * max(1, len(module.candidates)) / AUGMENTED_SHARE
    turns = max(1, recipe.learn_options().iterations)
    one = alternation_flops(d_in, d_out, module.n_atoms) / ALTERNATION_SHARE
    if recipe.solver in ("omp", "ormp"):
        # steps of a pursuit wait for memory: taken as four operations for each (not measured)
        one += 4.0 * 2.0 * d_out * module.n_atoms * module.sparsity**2
    return size * OTHER_FACTOR + turns * one


def backward_flops(
    model: nn.Module, targets: Sequence[TargetLinear], recipe: Recipe, n_sweeps: int
) -> float:
    """Windows run forwards, and through every block twice more for gradients; the head both ways; sums over them."""
    tokens = min(recipe.backward_windows, recipe.samples) * recipe.sequence_length
    blocks = sum(p.numel() for _, block in decoder_blocks(model) for p in block.parameters())
    vocabulary = int(getattr(input_embeddings(model), "num_embeddings", 0))
    head = embedding_width(model, targets) * vocabulary
    sums = 0
    if recipe.metric == "fisher":
        sums += sum(t.d_out**2 for t in targets)
    if recipe.allocation == "loss":
        sums += sum(t.d_in * t.d_out for t in targets)
    return 2.0 * tokens * (n_sweeps * (3.0 * blocks + 2.0 * head) + sums)


def coarse_flops(modules: Sequence[ModulePlan], recipe: Recipe, n_blocks: int) -> float:
    """Coarse fits of all linears, those of some blocks at several ratios."""
    coarse = replace(
        recipe,
        first_penalty=max(COARSE_START, recipe.first_penalty),
        penalty_growth=max(COARSE_GROWTH, recipe.penalty_growth),
    )
    share = 1.0 if n_blocks <= 2 * SLOPE_BLOCKS else SLOPE_BLOCKS / n_blocks
    times = 1.0 + (SLOPE_RATIOS - 1) * share
    return times * sum(fit_flops(module, coarse) for module in modules)


def estimate_seconds(
    model: nn.Module, targets: Sequence[TargetLinear], plan: Plan, recipe: Recipe
) -> dict[str, float]:
    """About how long each stage takes with this process's threads, from the speed of a product just now."""
    speed = _flops_per_second()
    tokens = recipe.samples * recipe.sequence_length
    layers = decoder_blocks(model)
    blocks = sum(p.numel() for _, block in layers for p in block.parameters())
    inputs = {(t.block, t.input_group): t.d_in for t in targets}
    stages = {}
    if recipe.uses_gradients:
        divides = recipe.allocation == "loss"
        n_sweeps = divides + (recipe.metric != "none")
        stages["gradients"] = backward_flops(model, targets, recipe, n_sweeps)
        if divides:
            stages["coarse fits"] = coarse_flops(plan.modules, recipe, len(layers))
    stages["calibration"] = 0.0
    if recipe.uses_calibration:
        stages["calibration"] = 2.0 * tokens * blocks
        stages["calibration"] += sum(gram_flops(tokens, d) for d in inputs.values())
    stages["fits"] = sum(fit_flops(module, recipe) for module in plan.modules)
    return {stage: flops / speed for stage, flops in stages.items()}


def _flops_per_second() -> float:
    size = 768
    a = torch.randn(size, size)
    a @ a  # the first call sets libraries up
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def embedding_width(model: nn.Module, targets: Sequence[TargetLinear]) -> int:
    """Features of the hidden states."""
    width = max(t.d_in for t in targets)
    return int(getattr(input_embeddings(model), "embedding_dim", width))
