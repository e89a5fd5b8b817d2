"""Single matrices at equal stored bytes: the corners of the augmented dictionary, and what lies between them.

usage: corners.py MODEL CALIBRATION OUT.json [--ratios 0.2,0.4] [--blocks 2,15,27] [--samples 64] [--gram-cache DIR]

Relative output error as stored (bf16, refitted) of truncated SVD, learned atoms, pruning, identity atoms, augmented
dictionaries with several shares of the budget in learned atoms, and ``auto``, which chooses among them. ``slow`` lets
the penalty rise from 0.003 by 1.05 per step instead of the default.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from matrices import Matrix, load_matrices

from cospadi.learn.budget import BF16
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.methods import candidate_sizes, factor_size
from cospadi.learn.options import LearnOptions
from cospadi.learn.quantize import StorageTypes

SLOW = {"first_penalty": 0.003, "penalty_growth": 1.05}
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "svd-llm": ("svd-llm", {}, {}),
    "learned": ("cospadi", {}, {}),
    "sparsegpt": ("sparsegpt", {}, {}),
    "identity": ("cospadi", {"dictionary": "identity"}, {}),
    "augmented .05": ("cospadi", {"dictionary": "augmented", "learned_share": 0.05}, {}),
    "augmented .1": ("cospadi", {"dictionary": "augmented", "learned_share": 0.1}, {}),
    "augmented .1 slow": ("cospadi", {"dictionary": "augmented", "learned_share": 0.1}, SLOW),
    "augmented .2": ("cospadi", {"dictionary": "augmented", "learned_share": 0.2}, {}),
    "augmented .35": ("cospadi", {"dictionary": "augmented", "learned_share": 0.35}, {}),
    "auto": ("cospadi", {"dictionary": "auto", "learned_share": 0.2}, {}),
}


def measure(matrix: Matrix, ratio: float) -> dict[str, tuple[float, float]]:
    """Error and seconds of every variant."""
    d_out, d_in = matrix.weight.shape
    found = {}
    for label, (method, sizes, options) in VARIANTS.items():
        size = factor_size(method, d_in, d_out, ratio, widths=BF16, **sizes)
        if size.sparsity < 1:
            continue
        settings = FitSettings(method, size, StorageTypes(), LearnOptions(**options))
        if label == "auto":
            choice = candidate_sizes(d_in, d_out, ratio, widths=BF16, learned_share=0.2)
            settings = replace(settings, candidates=choice)
        item = FitInput(matrix.name, matrix.weight, None, matrix.gram, matrix.whitening)
        begin = time.perf_counter()
        [(_, report)] = fit([item], settings)
        found[label] = (report.relative_error, time.perf_counter() - begin)
    return found


def main() -> None:
    """Measure what is missing and print one line per matrix and ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ratios", default="0.2,0.4")
    parser.add_argument("--blocks", default="2,15,27")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--gram-cache", type=Path)
    args = parser.parse_args()
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    blocks = {int(block) for block in args.blocks.split(",")}
    matrices = load_matrices(
        args.model, args.calibration, blocks, samples=args.samples, gram_cache=args.gram_cache
    )
    for matrix in matrices:
        for ratio in map(float, args.ratios.split(",")):
            key = f"{matrix.name} {ratio:g}"
            if key not in done:
                done[key] = measure(matrix, ratio)
                args.out.write_text(json.dumps(done, indent=1) + "\n")
            line = "  ".join(f"{label} {error:.4f}" for label, (error, _) in done[key].items())
            print(f"{key}: {line}", flush=True)


if __name__ == "__main__":
    main()
