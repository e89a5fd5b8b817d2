"""Seconds of the stages of a compression as tokens, inputs, outputs and atoms grow, and the rates behind them.

    python bench/scaling/measure.py --out costs.json [--quick]

One thread, timed by its processor time, so that a shared machine does not count; random weights and activations, so
that only sizes matter. Every stage is the product's own code. A stage's operations (`costs`) divided by its seconds are
its rate; the fit is ``seconds = overhead + operations / rate`` with the least relative error, and the exponent of a
free power law stands beside it: where it is near 1 the count explains the growth.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness
from cospadi.calibration.capture import GramAccumulator
from cospadi.learn import augmented
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.methods import factor_size
from cospadi.learn.whitening import whiten_gram
from cospadi.pipeline import costs
from cospadi.pipeline.plan import storage_widths
from cospadi.pipeline.recipe import Recipe

TOKENS = ((1024, 512), (4096, 512), (16384, 512), (4096, 1024), (4096, 2048))
WIDTHS = (256, 512, 1024, 1536, 2048)
SHAPES = (
    (256, 256),
    (256, 1024),
    (1024, 256),
    (384, 384),
    (512, 512),
    (768, 768),
    (512, 1536),
    (1024, 1024),
)
RATIOS = (0.2, 0.4)
"""The second for one shape: fewer atoms at equal sizes."""

Line = dict[str, Any]


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Least processor seconds of this thread."""
    taken = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        taken.append(time.thread_time() - start)
    return min(taken)


def gram_line(tokens: int, d_in: int) -> Line:
    """Activation Gram of one input."""
    x = torch.randn(tokens, d_in)

    def call() -> None:
        gram = GramAccumulator("x", d_in, x.device)
        for rows in x.split(4096):
            gram.add(rows)
        gram.mean()

    return {
        "tokens": tokens, "d_in": d_in, "flops": costs.gram_flops(tokens, d_in), "seconds": seconds_of(call, 3),
    }  # fmt: skip


def random_gram(d_in: int) -> torch.Tensor:
    """Gram of correlated activations."""
    x = torch.randn(2 * d_in, d_in) * torch.arange(1, d_in + 1) ** -0.5
    x = x @ torch.linalg.qr(torch.randn(d_in, d_in))[0]
    return (x.T @ x).double() / len(x)


def whitening_line(d_in: int) -> Line:
    """Factor of a Gram."""
    gram = random_gram(d_in)
    taken = seconds_of(lambda: whiten_gram(gram, "x"), 3)
    return {"d_in": d_in, "flops": costs.whitening_flops(d_in), "seconds": taken}


def fit_seconds(recipe: Recipe, d_in: int, d_out: int) -> tuple[float, int, int]:
    """Seconds of a fit, learned atoms, and steps of the rise."""
    types = recipe.types_at(recipe.ratio, d_in)
    size = factor_size(
        recipe.method, d_in, d_out, recipe.ratio, k_over_s=recipe.rho, convention="stored",
        widths=storage_widths(types), dictionary=recipe.atoms, learned_share=recipe.learned_share,
    )  # fmt: skip
    settings = FitSettings(recipe.method, size, types, recipe.learn_options())
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(d_out, 24, generator=generator) @ torch.randn(
        24, d_in, generator=generator
    )
    weight += 2.0 * torch.randn(d_out, d_in, generator=generator)
    gram = random_gram(d_in)
    item = FitInput("x", weight, None, gram, whiten_gram(gram, "x"))
    n_steps = 0
    step = augmented.Split.step

    def counted(self: augmented.Split, penalty: float, sparsity: int) -> torch.Tensor:
        nonlocal n_steps
        n_steps += 1
        return step(self, penalty, sparsity)

    augmented.Split.step = counted  # type: ignore[method-assign]
    try:
        taken = seconds_of(lambda: fit([item], settings), 1)
    finally:
        augmented.Split.step = step  # type: ignore[method-assign]
    return taken, size.n_atoms, n_steps


def augmented_line(d_in: int, d_out: int, ratio: float) -> Line:
    """Fit of the default method."""
    taken, n_atoms, n_steps = fit_seconds(Recipe(ratio=ratio), d_in, d_out)
    flops = costs.augmented_flops(d_in, d_out, n_atoms, n_steps)
    return {
        "d_in": d_in, "d_out": d_out, "ratio": ratio, "n_atoms": n_atoms, "n_steps": n_steps, "flops": flops,
        "seconds": taken,
    }  # fmt: skip


def learned_line(d_in: int, d_out: int, ratio: float) -> Line:
    """One alternation of a learned dictionary, as the difference of fits with three and with one."""
    pair = [
        fit_seconds(
            Recipe(ratio=ratio, dictionary="learned", iterations=n, tolerance=0.0), d_in, d_out
        )
        for n in (1, 3)
    ]
    n_atoms = pair[0][1]
    taken = max((pair[1][0] - pair[0][0]) / 2, 1e-6)  # of tiny fits the difference is noise
    return {
        "d_in": d_in, "d_out": d_out, "ratio": ratio, "n_atoms": n_atoms,
        "flops": costs.alternation_flops(d_in, d_out, n_atoms), "seconds": taken,
        "seconds_of_the_rest": pair[0][0] - taken,
    }  # fmt: skip


def fitted(lines: list[Line]) -> Line:
    """Overhead, rate, the worst ratio of prediction and measurement, and the free exponent."""
    flops = np.array([line["flops"] for line in lines])
    taken = np.array([line["seconds"] for line in lines])
    # relative errors: every equation divided by its seconds
    rows = np.stack([1 / taken, flops / taken], 1)
    solution = np.linalg.lstsq(rows, np.ones(len(lines)), rcond=None)[0]
    if solution[0] < 0 or solution[1] <= 0:  # no overhead to be seen
        solution = np.array([0.0, (flops / taken).sum() / ((flops / taken) ** 2).sum()])
    predicted = solution[0] + solution[1] * flops
    return {
        "overhead_s": float(solution[0]),
        "flops_per_s": float(1 / solution[1]),
        "worst_ratio": float(np.exp(np.abs(np.log(predicted / taken)).max())),
        "free_exponent": float(np.polyfit(np.log(flops), np.log(taken), 1)[0]),
    }


def main() -> int:
    """Measure, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="small sizes only, for a test")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens, widths, shapes = TOKENS, WIDTHS, SHAPES
    if args.quick:
        tokens, widths, shapes = (
            ((256, 64), (512, 64), (512, 96)),
            (64, 96, 128),
            ((48, 48), (48, 96), (96, 48)),
        )
    stages: dict[str, list[Line]] = {
        "gram": [],
        "whitening": [],
        "augmented": [],
        "learned alternation": [],
    }

    def take(stage: str, line: Line) -> None:
        stages[stage].append(line)
        print(
            stage,
            {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()},
            flush=True,
        )

    for n, d in tokens:
        take("gram", gram_line(n, d))
    for d in widths:
        take("whitening", whitening_line(d))
    cases = [(*shape, RATIOS[0]) for shape in shapes] + [(*shapes[len(shapes) // 2], RATIOS[1])]
    for case in cases:
        take("augmented", augmented_line(*case))
    for case in cases:
        take("learned alternation", learned_line(*case))
    a = torch.randn(1024, 1024)
    peak = 2.0 * 1024**3 / seconds_of(lambda: a @ a, 5)
    result = {
        "schema_version": 1,
        "program": "scaling/measure.py",
        "fingerprint": harness.fingerprint(),
        "product_flops_per_s": peak,
        "stages": {name: {"lines": lines, "fit": fitted(lines)} for name, lines in stages.items()},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, stage in result["stages"].items():
        print(name, {k: float(f"{v:.3g}") for k, v in stage["fit"].items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
