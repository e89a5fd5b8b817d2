"""From the bytes that a whole model may take to the removed share of its compressed linears."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from cospadi.errors import InputError
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.learn.budget import VALUE_BITS
from cospadi.model.discover import Skipped, TargetLinear
from cospadi.pipeline.plan import make_plan, without_override
from cospadi.pipeline.recipe import Recipe

HEADER_BYTES = 160
"""Of a safetensors header per tensor: name, type, shape and offsets."""


def with_ratio_for_size(
    model: nn.Module, targets: Sequence[TargetLinear], skipped: Sequence[Skipped], recipe: Recipe
) -> Recipe:
    """The recipe with the ratio that makes all weights of the result take ``recipe.target_size`` bytes.

    Parameters
    ----------
    model : nn.Module
        The dense model; its parameters may be without data.
    targets, skipped
        From `cospadi.model.discover.discover`.
    recipe : Recipe
        Without a target size it comes back as it is.

    Raises
    ------
    InputError
        What is not compressed takes the size already, or the model is not larger than it.
    """
    size = recipe.target_size
    if size is None:
        return recipe
    width = STORAGE_DTYPES[recipe.storage_dtype].itemsize
    weights = sum(t.d_in * t.d_out for t in targets)
    values = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    headers = HEADER_BYTES * (len(list(model.parameters())) + 3 * len(targets))
    rest = width * (values - weights) + headers
    apart = {t.name for t in targets} - {t.name for t in without_override(targets, recipe)}
    if apart:
        plan = make_plan(targets, skipped, recipe)
        planned = {m.name: m.spec.stored_bits // 8 for m in plan.modules}
        rest += sum(
            planned.get(t.name, width * t.d_in * t.d_out) for t in targets if t.name in apart
        )
    dense = VALUE_BITS // 8 * sum(t.d_in * t.d_out for t in targets if t.name not in apart)
    ratio = 1.0 - (size - rest) / dense if dense else 1.0
    if ratio >= 1.0:
        raise InputError(
            f"target_size: {size / 1e6:.1f} MB, but what is not compressed (embeddings, norms, overrides) takes "
            f"{rest / 1e6:.1f} MB already"
        )
    if ratio <= 0.0:
        raise InputError(
            f"target_size: the model takes {(rest + dense) / 1e6:.1f} MB in {recipe.storage_dtype}, no more than "
            f"{size / 1e6:.1f} MB"
        )
    return dataclasses.replace(recipe, ratio=ratio)
