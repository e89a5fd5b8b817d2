"""The paper's ablations on real weights: whitened error of chosen matrices under every knob.

usage: ablations.py MODEL CALIBRATION OUT.json [--ratio 0.2] [--blocks 3,15,27] [--samples 64]
                    [--iterations 60] [--gram-cache DIR] [--only NAME ...]

MODEL        folder, hub id or GGUF file
CALIBRATION  text source of `cospadi compress`
OUT.json     all numbers; finished variants are not run again

For every decoder block given, all seven projections are fitted at one stored ratio. A variant's figure is the root mean
square over the matrices of the relative output error of the learned state (unrounded, fp32), and the share of the
base's. The base is preset ``paper`` (60 alternations, 8 power iterations, sequential K-SVD, columns, K / s = 2), of
which one knob is changed at a time; ``fast`` is the recommended preset.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from matrices import load_matrices

from cospadi.learn.budget import sparse_size
from cospadi.learn.learner import learn
from cospadi.learn.options import LearnOptions
from cospadi.pipeline.recipe_file import recipe_from_mapping

PAPER = recipe_from_mapping({"preset": "paper"}).learn_options()
FAST = recipe_from_mapping({"preset": "fast"}).learn_options()
BEST = recipe_from_mapping({"preset": "best"}).learn_options()


def variants() -> dict[str, tuple[LearnOptions, float]]:
    """Options and K / s of every variant."""
    table: dict[str, tuple[LearnOptions, float]] = {
        "paper": (PAPER, 2.0),
        "fast": (FAST, 2.0),
        "best": (BEST, 2.0),
        "init svd": (replace(PAPER, init="svd"), 2.0),
        "init random": (replace(PAPER, init="random"), 2.0),
        "update mod": (replace(PAPER, update="mod"), 2.0),
        "update exact rank-1": (replace(PAPER, power_iterations=0), 2.0),
        "solver ormp": (replace(PAPER, solver="ormp"), 2.0),
        "unused reseed": (replace(PAPER, unused="reseed"), 2.0),
    }
    for count in (1, 2, 4):
        table[f"power iterations {count}"] = (replace(PAPER, power_iterations=count), 2.0)
    for ratio in (1.0, 1.25, 1.5, 1.75, 2.5, 3.0, 4.0):
        table[f"k/s {ratio:g}"] = (PAPER, ratio)
    for ratio in (1.5, 2.5, 3.0, 4.0, 6.0):
        table[f"fast k/s {ratio:g}"] = (FAST, ratio)
    return table


def matrices(args: argparse.Namespace) -> list[tuple[str, Any, Any]]:
    """Name, signals and shape of the chosen matrices."""
    found = load_matrices(
        args.model,
        args.calibration,
        {int(block) for block in args.blocks.split(",")},
        samples=args.samples,
        gram_cache=args.gram_cache,
    )
    return [(m.name, m.whitening.whiten(m.weight).float(), tuple(m.weight.shape)) for m in found]


def run(
    name: str, options: LearnOptions, k_over_s: float, data: list[Any], ratio: float
) -> dict[str, Any]:
    """Fit every matrix; errors after each alternation."""
    started = time.perf_counter()
    curves: dict[str, list[float]] = {}
    for module, signals, (d_out, d_in) in data:
        n_atoms, sparsity = sparse_size(d_in, d_out, ratio, k_over_s=k_over_s)
        result = learn(signals, n_atoms, sparsity, options)
        curves[module] = [stats.error_after_update for stats in result.history]
    seconds = time.perf_counter() - started
    best = [min(curve) for curve in curves.values()]
    rms = (sum(error**2 for error in best) / len(best)) ** 0.5
    print(f"{name:24} rms error {rms:.5f}  {seconds:7.1f} s", flush=True)
    return {"rms": rms, "seconds": seconds, "curves": curves}


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--blocks", default="3,15,27")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--gram-cache", type=Path)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    data = None
    for name, (options, k_over_s) in variants().items():
        if name in done or (args.only and name not in args.only):
            continue
        data = data or matrices(args)
        if not name.startswith(("fast", "best")):
            options = replace(options, iterations=args.iterations)
        done[name] = run(name, options, k_over_s, data, args.ratio)
        args.out.write_text(json.dumps(done, indent=1) + "\n")
    base = done.get("paper")
    if base is None:
        return
    print("\nvariant                    rms error   share of paper    seconds")
    for name, result in done.items():
        share = result["rms"] / base["rms"]
        print(f"{name:24} {result['rms']:11.5f} {share:16.3f} {result['seconds']:10.1f}")
    print("\npaper after T alternations: share of the error at the end")
    curves = list(base["curves"].values())
    for count in (1, 2, 5, 10, 20, 30, 40, 50, 60):
        if count <= min(len(curve) for curve in curves):
            rms = (sum(curve[count - 1] ** 2 for curve in curves) / len(curves)) ** 0.5
            print(f"  T = {count:2}  {rms / base['rms']:.3f}")


if __name__ == "__main__":
    main()
