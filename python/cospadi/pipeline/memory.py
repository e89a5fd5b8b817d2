"""What a compression takes in memory and on the disk, before it begins; and how it is run within a bound.

Estimates are upper bounds of what was measured with this package (``bench/soak/memory.py`` measures them again): a fit
takes ``24 MiB + 13 P + 3 Q`` with ``P = 8 d_in d_out`` and ``Q = 8 d_in^2`` bytes at most, whatever the method.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from cospadi.errors import InputError
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.model.discover import TargetLinear, decoder_blocks
from cospadi.pipeline.available_memory import available_bytes, resident_bytes
from cospadi.pipeline.costs import embedding_width
from cospadi.pipeline.fit_task import fits_one_thread
from cospadi.pipeline.gradient_memory import (
    backward_batch,
    depth_bytes,
    gradient_bytes,
    gradient_matrix_bytes,
    head_bytes,
)
from cospadi.pipeline.plan import Plan
from cospadi.pipeline.recipe import Recipe

_FIXED_FIT_BYTES = 24 << 20
_OPENING_BYTES = 64 << 20
_CHUNK_BYTES = 16 << 20
_LIBRARY_BYTES = 48 << 20
"""What libraries take when they are first used, the tokenizer and the text."""
_MOST_BUFFERED_ROWS = 4096
_SPARE_SHARE = 1 / 32
"""Of a limit, not to be filled with further fits: the single figures are estimates."""


@dataclass(frozen=True)
class Layout:
    """How a compression is run.

    Attributes
    ----------
    is_streamed : bool
        One decoder block at a time in memory; otherwise the whole model.
    is_spilled : bool
        Hidden states in a file.
    batch_size : int
        Windows per forward pass.
    max_gram_bytes : int or None
        Bound on the Grams held at a time.
    """

    is_streamed: bool
    is_spilled: bool
    batch_size: int
    max_gram_bytes: int | None


@dataclass(frozen=True)
class Needs:
    """What a layout needs.

    Attributes
    ----------
    layout : Layout
        Of which.
    base_bytes : int
        Interpreter and libraries, measured in this process.
    stages : dict
        Bytes above them by stage, worker processes included; the largest decides.
    fits_bytes : int
        Part of the stage "fits" that fits in progress take: one at least, at most as many as there are threads.
    work_disk_bytes, output_bytes : int
        On the disk, while it runs and in the end.
    bound_bytes : int
        What there is: the limit that was asked for, otherwise what this process may still take.
    """

    layout: Layout
    base_bytes: int
    stages: dict[str, int]
    fits_bytes: int
    work_disk_bytes: int
    output_bytes: int
    bound_bytes: int = 1 << 62

    @property
    def peak_bytes(self) -> int:
        """Peak memory of all processes."""
        return self.base_bytes + max(self.stages.values())


def whole_model_setting(recipe: Recipe) -> str | None:
    """The setting whose passes need all of the model at once; None without one."""
    for name, off in (
        ("reconstruction", "none"),
        ("sequential", False),
    ):
        if getattr(recipe, name) != off:
            return f"{name} {getattr(recipe, name)}"
    return None


def must_load(recipe: Recipe, targets: Sequence[TargetLinear]) -> str | None:
    """The setting because of which the model has to be in memory as a whole; None where it may be streamed."""
    setting = whole_model_setting(recipe)
    if setting is not None:
        return setting
    if recipe.group_size > 1:
        return f"group_size {recipe.group_size}"
    outside = next((t.name for t in targets if t.block is None), None)
    return None if outside is None else f"target {outside} outside the decoder blocks"


def choose_layout(
    model: nn.Module,
    targets: Sequence[TargetLinear],
    plan: Plan,
    recipe: Recipe,
    *,
    limit: int | None,
    spill: bool = False,
    can_stream: bool = True,
    workers: int | None = None,
) -> Needs:
    """The first way of running a compression that fits.

    Loaded as a whole; streamed; with hidden states on disk; with one Gram at a time; with smaller batches, the only
    step that changes a bit of the result. What is left of the memory is for further fits at a time.

    Parameters
    ----------
    model, targets, plan, recipe
        What is to be done; parameters may be without data.
    limit : int or None
        Bytes of all processes of the run, interpreter included. None: what is available now, for the choice between
        loading and streaming only.
    spill : bool
        Hidden states on disk in any case.
    can_stream : bool
        Whether the files allow it.
    workers : int, optional
        Local worker processes.

    Raises
    ------
    InputError
        Nothing fits the limit; names the smallest figure and what forbids less.
    """
    hindrance = must_load(recipe, targets)
    if hindrance is None and not can_stream:
        hindrance = "a source that is no folder of safetensors files with the model's own names"
    layouts = possible_layouts(targets, recipe, spill=spill, is_streamable=hindrance is None)
    if not layouts:
        raise InputError(f"spill: {hindrance} needs the whole model in memory; leave it out")

    def needs_of(layout: Layout, fits_bytes: int) -> Needs:
        return estimate(model, targets, plan, recipe, layout, workers, fits_bytes=fits_bytes)

    bound = available_bytes() + resident_bytes() if limit is None else limit
    needs = [needs_of(layout, 0) for layout in layouts]
    for found in needs:
        if found.peak_bytes <= bound:
            others = found.base_bytes + found.stages["fits"] - found.fits_bytes
            chosen = needs_of(found.layout, int(bound * (1.0 - _SPARE_SHARE)) - others)
            return replace(chosen, bound_bytes=bound)
    if limit is None:
        return replace(needs[-1], bound_bytes=bound)
    least = min(needs, key=lambda item: item.peak_bytes)
    stage = max(least.stages, key=lambda name: least.stages[name])
    because = f"; {hindrance} needs the whole model" if hindrance else ""
    raise InputError(
        f"max_memory: {limit / 1e6:.0f} MB do not suffice, the least is {least.peak_bytes / 1e6:.0f} MB "
        f"({least.base_bytes / 1e6:.0f} MB of interpreter and libraries; the largest stage: {stage}){because}"
    )


def possible_layouts(
    targets: Sequence[TargetLinear], recipe: Recipe, *, spill: bool, is_streamable: bool
) -> list[Layout]:
    """Ways of running a compression, in the order of `choose_layout`."""
    gram_bytes = None if recipe.max_gram_gb is None else int(recipe.max_gram_gb * 2**30)
    largest = max((8 * t.d_in**2 for t in targets), default=0)
    loaded = Layout(False, False, recipe.batch_size, gram_bytes)
    layouts = [] if spill else [loaded]
    if is_streamable:
        streamed = replace(loaded, is_streamed=True)
        one_gram = replace(streamed, is_spilled=True, max_gram_bytes=largest)
        if not spill:
            layouts.append(streamed)
        layouts += [replace(streamed, is_spilled=True), one_gram]
        size = recipe.batch_size // 2
        while size and recipe.uses_calibration:
            layouts.append(replace(one_gram, batch_size=size))
            size //= 2
    return layouts


def fit_bytes(d_in: int, d_out: int) -> int:
    """Bound on the memory of one fit, Gram and weight included."""
    return _FIXED_FIT_BYTES + 13 * 8 * d_in * d_out + 3 * 8 * d_in * d_in


def all_fits_bytes(plan: Plan, recipe: Recipe, most: int | None) -> int:
    """Bound on the memory of the fits of one process at a time; `most` as for `estimate`."""
    shapes = _fit_shapes(plan)
    largest = max(fit_bytes(*shape) for shape in shapes)
    if recipe.sequential:
        return largest
    abreast = sorted(
        (fit_bytes(*shape) for shape in shapes if fits_one_thread(*shape)), reverse=True
    )
    together = max(largest, sum(abreast[: torch.get_num_threads()]))
    return together if most is None else max(largest, min(together, most))


def _fit_shapes(plan: Plan) -> list[tuple[int, int]]:
    """d_in and d_out of every fit; a group's members lie side by side."""
    return [(group[0].d_in, sum(m.d_out for m in group)) for group in plan.groups.values()]


def estimate(
    model: nn.Module,
    targets: Sequence[TargetLinear],
    plan: Plan,
    recipe: Recipe,
    layout: Layout,
    workers: int | None = None,
    *,
    fits_bytes: int | None = None,
) -> Needs:
    """What a layout takes; arguments as for `choose_layout`.

    Fits take at most `fits_bytes`, except that one runs in any case; None: as many as there are threads, where they are
    fits for one.
    """
    blocks = dict(decoder_blocks(model))
    sizes = {id(p): p.numel() for p in model.parameters()}
    in_blocks = {id(p) for block in blocks.values() for p in block.parameters()}
    all_values = sum(sizes.values())
    outside = sum(n for key, n in sizes.items() if key not in in_blocks)
    tensor = max(sizes.values())
    block_values = max(sum(p.numel() for p in block.parameters()) for block in blocks.values())
    embedding, widest = embedding_width(model, targets), max(max(t.d_in, t.d_out) for t in targets)
    hidden = hidden_bytes(model, targets, recipe)
    activations = activation_bytes(model, targets, recipe, layout.batch_size)
    grams, waiting = gram_bytes(
        targets, recipe, max_bytes=layout.max_gram_bytes, by_block=layout.is_streamed
    )
    fit = all_fits_bytes(plan, recipe, fits_bytes)
    if workers and recipe.allocation != "loss":  # coarse fits run here in any case
        fit = max(8 * m.d_in**2 + 8 * m.d_in * m.d_out for m in plan.modules)
    stored = plan.stored_bits // 8
    width_out = STORAGE_DTYPES[recipe.storage_dtype].itemsize
    rest = all_values - sum(m.d_in * m.d_out for m in plan.modules)
    output = stored + width_out * rest
    largest_factor = max(m.spec.stored_bits for m in plan.modules) // 8
    # how blocks are called is recorded with the embeddings at hand: a batch goes through the first block, forwards
    n_first = max(layout.batch_size, backward_batch(recipe) if recipe.uses_gradients else 0)
    first = 4 * (
        block_values
        + 3 * min(n_first, recipe.samples) * recipe.sequence_length * (embedding + widest)
    )
    on_disk = hidden if layout.is_spilled else 0
    if layout.is_streamed:
        kept = 0 if layout.is_spilled or not recipe.uses_calibration else hidden
        stages = {
            "opening the files": _OPENING_BYTES,
            "embedding the tokens": 4 * outside + max(_CHUNK_BYTES, first) + kept,
            "calibration of a block": 4 * block_values + _CHUNK_BYTES + activations + grams + kept,
            "fits": fit + waiting + kept,
            "writing": (4 + width_out) * tensor + 3 * largest_factor,
        }
        if not recipe.uses_calibration:
            del stages["embedding the tokens"], stages["calibration of a block"]
        if recipe.uses_gradients:
            on_disk = max(on_disk, depth_bytes(model, targets, recipe, recipe.backward_windows))
            stages["gradients at the logits"] = 4 * outside + _CHUNK_BYTES + head_bytes(model)
            stages["gradients of a block"] = (
                4 * block_values
                + _CHUNK_BYTES
                + gradient_bytes(model, targets, recipe)
                + gradient_matrix_bytes(targets, recipe, by_block=True)
            )
    else:
        weights = 4 * all_values
        stages = {
            "calibration": weights + activations + grams,
            "fits": weights + fit + waiting,
            "writing": weights + output,
        }
        if recipe.uses_gradients:
            depths = depth_bytes(model, targets, recipe, backward_batch(recipe))
            block = gradient_bytes(model, targets, recipe)
            matrices = gradient_matrix_bytes(targets, recipe, by_block=False)
            stages["gradients"] = weights + depths + max(head_bytes(model), block) + matrices
        if recipe.sequential or recipe.reconstruction != "none":
            stages["calibration"] += 2 * hidden + 8 * block_values
    queue = 0
    if workers:
        one = max(fit_bytes(*shape) for shape in _fit_shapes(plan))
        for stage in stages.keys() - {"writing"}:  # they end before it
            stages[stage] += workers * (min(resident_bytes(), 300 << 20) + one)
        queue = min(sum(8 * m.d_in**2 + 4 * m.d_in * m.d_out for m in plan.modules), 16 << 30)
    return Needs(
        layout,
        resident_bytes() + _LIBRARY_BYTES,
        stages,
        fit,
        stored + on_disk + queue,
        output,
    )


def hidden_bytes(model: nn.Module, targets: Sequence[TargetLinear], recipe: Recipe) -> int:
    """Hidden states of all calibration tokens at one depth."""
    return 4 * recipe.samples * recipe.sequence_length * embedding_width(model, targets)


def activation_bytes(
    model: nn.Module, targets: Sequence[TargetLinear], recipe: Recipe, batch_size: int
) -> int:
    """What one batch takes in a decoder block, attention scores not counted."""
    if not recipe.uses_calibration:
        return 0
    tokens = min(batch_size, recipe.samples) * recipe.sequence_length
    widest = max(max(t.d_in, t.d_out) for t in targets)
    return 4 * tokens * (6 * embedding_width(model, targets) + 4 * widest)


def gram_bytes(
    targets: Sequence[TargetLinear], recipe: Recipe, *, max_bytes: int | None, by_block: bool
) -> tuple[int, int]:
    """Grams of a pass with the rows that are gathered for them; and those that wait while the largest is used."""
    if not recipe.uses_calibration:
        return 0, 0
    inputs: dict[tuple[int | None, str], int] = {(t.block, t.input_group): t.d_in for t in targets}
    widths_of: dict[int | None, list[int]] = defaultdict(list)
    for (block, _), d_in in inputs.items():
        widths_of[block if by_block else None].append(d_in)
    most = waiting = 0
    for widths in widths_of.values():
        total = sum(8 * d * d for d in widths)
        if max_bytes is not None:
            total = min(total, max(max_bytes, 8 * max(widths) ** 2))
        share = total / sum(8 * d * d for d in widths)
        rows = sum(4 * d * min(2 * d, _MOST_BUFFERED_ROWS) for d in widths)
        most = max(most, total + int(share * rows) + 4 * 192 * max(widths))
        waiting = max(waiting, total - 8 * max(widths) ** 2)
    return most, waiting
