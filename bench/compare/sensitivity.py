"""What the metrics of the outputs are worth, matrix by matrix, on tokens that no fit has seen.

usage: sensitivity.py MODEL CALIBRATION HELD_BACK OUT.json --cache DIR [--ratio 0.4] [--blocks 2,15,27] [--samples 64]

Every linear of the given blocks is fitted as an augmented dictionary with every `output_metric`. Printed: relative
output error on the calibration text, and the loss that the change of the weight causes to second order
(`cospadi.calibration.probe`, nats per 1000 tokens) on windows of HELD_BACK.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from cospadi.calibration.cache import collect_cached_grams
from cospadi.calibration.data import load_calibration
from cospadi.calibration.fisher import FisherStore
from cospadi.calibration.probe import measure_losses
from cospadi.learn.budget import BF16
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.methods import factor_size
from cospadi.learn.options import LearnOptions
from cospadi.learn.output_metric import OutputMetric, RowScales
from cospadi.learn.quantize import StorageTypes
from cospadi.learn.whitening import Whitening, whiten_gram
from cospadi.model.discover import discover, weight_of
from cospadi.model.source import open_source
from cospadi.pipeline.recipe import OutputMetricKind, Recipe
from cospadi.pipeline.sensitivity import fisher_metrics

METRICS: tuple[OutputMetricKind, ...] = ("none", "diagonal", "fisher")


def main() -> None:
    """Fit, measure, print one line per matrix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("held_back")
    parser.add_argument("out", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--blocks", default="2,15,27")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--backward-samples", type=int, default=32)
    parser.add_argument("--learned-share", type=float, default=0.2)
    args = parser.parse_args()
    source = open_source(args.model)
    blocks = {int(block) for block in args.blocks.split(",")}
    targets = [target for target in discover(source.model)[0] if target.block in blocks]
    by_name = {target.name: target for target in targets}

    def windows(text: str, count: int) -> torch.Tensor:
        return load_calibration(
            text, source.tokenizer, n_samples=count, sequence_length=1024, seed=42
        ).ids

    ids = windows(args.calibration, args.samples)
    fisher = FisherStore(
        args.cache, source.model, ids[: args.backward_samples], weights=source.fingerprint, seed=42
    )
    fisher.prepare(targets)
    errors: dict[str, dict[str, float]] = {}
    changes: dict[str, list[torch.Tensor]] = {}
    for finished in collect_cached_grams(
        source.model,
        targets,
        ids,
        folder=args.cache,
        weights=source.fingerprint,
        report=print,
        batch_size=4,
    ):
        for item in finished.grams.values():
            plain = whiten_gram(item.gram, item.members[0])
            for name in item.members:
                weight, _ = weight_of(source.model, by_name[name])
                d_out, d_in = weight.shape
                size = factor_size(
                    "cospadi",
                    d_in,
                    d_out,
                    args.ratio,
                    widths=BF16,
                    dictionary="augmented",
                    learned_share=args.learned_share,
                )
                settings = FitSettings("cospadi", size, StorageTypes(), LearnOptions())
                metrics: dict[str, tuple[Whitening, OutputMetric | RowScales | None]] = {
                    "none": (plain, None),
                    **{
                        kind: fisher_metrics(
                            fisher,
                            by_name[name],
                            item.gram,
                            plain,
                            Recipe(output_metric=kind),
                        )
                        for kind in METRICS[1:]
                    },
                }
                errors[name], changes[name] = {}, []
                for label in METRICS:
                    whitening, output = metrics[label]
                    given = FitInput(name, weight, None, item.gram, whitening, output=output)
                    ((factor, report),) = fit([given], settings)
                    errors[name][label] = report.relative_error
                    changes[name].append(weight - factor.dense_weight())
    losses = measure_losses(source.model, changes, windows(args.held_back, 16), seed=1)
    found: dict[str, Any] = {}
    for name, values in losses.items():
        found[name] = {
            label: {"relative_error": errors[name][label], "loss": value}
            for label, value in zip(METRICS, values, strict=True)
        }
        parts = [
            f"{label} error {part['relative_error']:.4f} loss {1e3 * part['loss']:.4f}"
            for label, part in found[name].items()
        ]
        print(f"{name}: {'; '.join(parts)}", flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
