"""Weights of chosen decoder blocks with their activation Grams, for programs that compare fits of single matrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cospadi.calibration.cache import collect_cached_grams
from cospadi.calibration.data import load_calibration
from cospadi.calibration.statistics import collect_grams
from cospadi.learn.whitening import Whitening, whiten_gram
from cospadi.model.discover import discover, weight_of
from cospadi.model.source import open_source


@dataclass(frozen=True)
class Matrix:
    """One projection: ``weight [d_out, d_in]``, ``gram [d_in, d_in]`` float64 and its whitening."""

    name: str
    weight: torch.Tensor
    gram: torch.Tensor
    whitening: Whitening


def load_matrices(
    model: str,
    calibration: str,
    blocks: set[int],
    *,
    samples: int,
    gram_cache: Path | None,
) -> list[Matrix]:
    """All linears of the given decoder blocks, calibrated with ``samples`` windows of 1024 tokens."""
    source = open_source(model)
    targets, _ = discover(source.model)
    chosen = [target for target in targets if target.block in blocks]
    ids = load_calibration(
        calibration, source.tokenizer, n_samples=samples, sequence_length=1024, seed=42
    ).ids
    if gram_cache is None:
        passes = collect_grams(source.model, chosen, ids, batch_size=4)
    else:
        passes = collect_cached_grams(
            source.model,
            chosen,
            ids,
            folder=gram_cache,
            weights=source.fingerprint,
            report=print,
            batch_size=4,
        )
    by_name = {target.name: target for target in chosen}
    found = []
    for finished in passes:
        for item in finished.grams.values():
            whitening = whiten_gram(item.gram, item.members[0])
            for name in item.members:
                weight, _ = weight_of(source.model, by_name[name])
                found.append(Matrix(name, weight.clone(), item.gram, whitening))
    return found
