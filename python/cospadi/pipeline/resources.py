"""What ``plan`` says about memory, disk and time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi.errors import InputError
from cospadi.model.discover import TargetLinear
from cospadi.model.streamed import StreamingUnsupported, check_streamable
from cospadi.pipeline.costs import estimate_seconds
from cospadi.pipeline.device_memory import estimate_device
from cospadi.pipeline.memory import (
    Layout,
    choose_layout,
    estimate,
    must_load,
    possible_layouts,
)
from cospadi.pipeline.plan import Plan
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.recipe_file import parse_size


def resources(
    model: str | Path,
    shapes: nn.Module,
    targets: Sequence[TargetLinear],
    plan: Plan,
    recipe: Recipe,
    *,
    max_memory: str | int | None = None,
    workers: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Every way of running a compression with what it takes, as plain data.

    Parameters
    ----------
    model : str or Path
        The source; only its headers are read.
    shapes : nn.Module
        Its structure without data.
    targets, plan, recipe
        What is to be done.
    max_memory, workers, device
        As for `cospadi.pipeline.compress.compress`; a device need not be there.

    Returns
    -------
    dict
        ``ways`` (each with ``how``, ``peak_bytes``, ``stages``, ``work_disk_bytes``, ``output_bytes`` and whether it is
        the one that would be taken), ``seconds`` by stage (None on a GPU), ``threads``, ``device`` (None on the CPU;
        else what `cospadi.pipeline.device_memory` computes, or ``{"not_computed": setting}``).

    Raises
    ------
    InputError
        `max_memory` does not suffice, or does not go with the device.
    """
    if device != "cpu":
        return _on_device(device, shapes, targets, plan, recipe, max_memory, workers)
    can_stream = True
    if Path(model).exists():  # a plan downloads nothing
        try:
            check_streamable(model)
        except StreamingUnsupported:
            can_stream = False
        except InputError:  # no weights yet, or damaged ones: compress will say so
            can_stream = True
    limit = None if max_memory is None else parse_size(max_memory, "max_memory")
    chosen = choose_layout(
        shapes, targets, plan, recipe, limit=limit, can_stream=can_stream, workers=workers
    )
    is_streamable = can_stream and must_load(recipe, targets) is None
    layouts = possible_layouts(targets, recipe, spill=False, is_streamable=is_streamable)
    seconds = estimate_seconds(shapes, targets, plan, recipe)
    if workers:
        seconds["fits"] /= workers
    ways = []
    for layout in layouts:
        is_chosen = layout == chosen.layout
        needs = chosen
        if not is_chosen:
            needs = estimate(shapes, targets, plan, recipe, layout, workers, fits_bytes=0)
        ways.append(
            {
                "how": _described(layout, recipe),
                "is_chosen": is_chosen,
                "peak_bytes": needs.peak_bytes,
                "stages": needs.stages,
                "work_disk_bytes": needs.work_disk_bytes,
                "output_bytes": needs.output_bytes,
            }
        )
    return {"ways": ways, "seconds": seconds, "threads": torch.get_num_threads(), "device": None}


def _on_device(
    device: str,
    shapes: nn.Module,
    targets: Sequence[TargetLinear],
    plan: Plan,
    recipe: Recipe,
    max_memory: str | int | None,
    workers: int | None,
) -> dict[str, Any]:
    """`resources` with fits on a GPU: the model is loaded as a whole. Workers' own memory is not counted."""
    if device != "cuda":
        raise InputError(f"device: expected cpu or cuda, got {device!r}")
    if max_memory is not None or workers is not None:
        raise InputError(
            "max_memory, workers: with device cuda the plan is that of one process and a whole model; leave them out"
        )
    found = estimate_device(shapes, targets, plan, recipe)
    (layout, *_) = possible_layouts(targets, recipe, spill=False, is_streamable=False)
    needs = estimate(shapes, targets, plan, recipe, layout, fits_bytes=0)
    pinned = 0 if isinstance(found, str) else found.hidden_bytes
    way = {
        "how": _described(layout, recipe) + (", hidden states pinned" if pinned else ""),
        "is_chosen": True,
        "peak_bytes": needs.peak_bytes + pinned,
        "stages": {name: size + pinned for name, size in needs.stages.items()},
        "work_disk_bytes": needs.work_disk_bytes,
        "output_bytes": needs.output_bytes,
    }
    gpu = {"not_computed": found} if isinstance(found, str) else found.to_mapping()
    return {"ways": [way], "seconds": None, "threads": torch.get_num_threads(), "device": gpu}


def _described(layout: Layout, recipe: Recipe) -> str:
    if not layout.is_streamed:
        return "with the whole model loaded"
    text = "streamed, one block at a time"
    if layout.is_spilled:
        text += ", hidden states on disk"
    limit = recipe.max_gram_gb
    if layout.max_gram_bytes != (None if limit is None else int(limit * 2**30)):
        text += ", one Gram at a time"
    if layout.batch_size != recipe.batch_size:
        text += f", batches of {layout.batch_size} (other rounding)"
    return text
