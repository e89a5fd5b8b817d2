"""Streaming token batches through the model and collecting one activation Gram per distinct input."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cospadi.calibration.capture import (
    GramObserver,
    InputGroup,
    find_input_groups,
    observe_inputs,
    run_forward,
)
from cospadi.calibration.ids import check_ids
from cospadi.errors import InputError
from cospadi.model.discover import TargetLinear, decoder_blocks

Progress = Callable[[int, int], None]

# Tokens of the forward pass that finds out who shares an input; the answer does not depend on the tokens, except for
# routed experts, which `find_input_groups` treats separately.
_PROBE_TOKENS = 64


@dataclass(eq=False)
class ActivationGram:
    """Second moment of the input of one or several linear layers.

    Attributes
    ----------
    gram
        X^T X / n_tokens, [d_in, d_in], fp64, symmetric, on the model's device.
    n_tokens
        Rows of X.
    n_nonfinite
        0; 1 where an activation was not finite and `collect_grams` was told to go on: the Gram is NaN then.
    members
        Names of the modules that receive this input.
    """

    gram: Tensor
    n_tokens: int
    n_nonfinite: int
    members: list[str]


@dataclass(eq=False)
class GramPass:
    """Result of one pass over the calibration tokens.

    Attributes
    ----------
    index, n_passes
        Number of this pass (from 0) and of all passes.
    grams
        Gram of each distinct input; the key is the name of the first module that receives it.
    seconds
        Duration of the pass.
    """

    index: int
    n_passes: int
    grams: dict[str, ActivationGram]
    seconds: float


def collect_grams(
    model: nn.Module,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    *,
    batch_size: int = 8,
    max_gram_bytes: int | None = None,
    progress: Progress | None = None,
    skip_targets: AbstractSet[str] = frozenset(),
    device: torch.device | None = None,
    keep_going: bool = False,
) -> Iterator[GramPass]:
    """Run the calibration tokens through the model and collect the Grams of the targets' inputs.

    Parameters
    ----------
    model
        Causal language model. Only its decoder runs, without the head, and only up to the last needed block.
    targets
        Layers whose inputs are wanted.
    ids
        Token ids [n_samples, length], integer.
    batch_size
        Sequences per forward pass. The Grams do not depend on it beyond fp32 rounding.
    max_gram_bytes
        Bound on the fp64 Grams held at a time. Above it the tokens are streamed several times, each pass collecting
        a range of decoder blocks. None means one pass.
    progress
        Called with (finished batches, all batches of all passes).
    skip_targets
        Names of targets to leave out.
    device
        Where to compute; None is the model's own device. On another one the tokens run block by block
        (`cospadi.calibration.blockwise`), so a block, its Grams and one batch are all that must fit, and the Grams are
        yielded on the CPU. A model that cannot run so lies there as a whole.
    keep_going
        Give NaN for the Gram of an input that is not finite, in place of an error.

    Yields
    ------
    GramPass
        One per pass, in the order of the blocks. Together they name every target once. The generator keeps no
        reference; drop the Grams (``grams.clear()``) before asking for the next pass, or both lie in memory.

    Raises
    ------
    InputError
        An activation is not finite (names the module), ids lie outside the vocabulary or are longer than the model's
        context, a target is never reached, or the largest Gram alone exceeds `max_gram_bytes`.

    Notes
    -----
    Memory: the Grams (8 d_in^2 bytes each), at most as much again for gathered rows of small batches, and the
    activations of one batch. Deterministic for a given thread count.
    """
    wanted = [target for target in targets if target.name not in skip_targets]
    if ids.ndim != 2:
        raise InputError(f"calibration ids must be [n_samples, length], got {list(ids.shape)}")
    check_ids(model, ids, length=ids.shape[1])
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if not wanted:
        return iter(())
    if device is None or device == next(model.parameters()).device:
        return collect_here(model, wanted, ids, batch_size, max_gram_bytes, progress, keep_going)
    from cospadi.calibration.blockwise_statistics import collect_on_device

    return collect_on_device(
        model, wanted, ids, batch_size, max_gram_bytes, progress, keep_going, device
    )


def collect_here(
    model: nn.Module,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    batch_size: int,
    max_gram_bytes: int | None,
    progress: Progress | None,
    keep_going: bool,
) -> Iterator[GramPass]:
    """Run `collect_grams` on the device where the model lies, as a whole; the arguments have been checked."""
    device = next(model.parameters()).device
    modules = {target.name: model.get_submodule(target.name) for target in targets}
    decoder = decoder_with(model, modules.values())
    blocks = [block for _, block in decoder_blocks(model)]
    was_training = model.training
    model.eval()  # dropout would enter the statistics
    try:
        passes = plan_passes(input_groups(model, targets, ids), max_gram_bytes)
        n_batches = -(-ids.shape[0] // batch_size)
        for index, part in enumerate(passes):
            stream = _Stream(decoder, modules, blocks, ids, batch_size, device, keep_going)
            count = _offset_progress(progress, index * n_batches, len(passes) * n_batches)
            # yielded at once: a local name would keep the Grams alive while the caller works on them
            yield _run_pass(stream, part, index, len(passes), count)
    finally:
        model.train(was_training)


@dataclass(frozen=True, eq=False)
class _Stream:
    """What every pass runs: the decoder, its watched modules, and the tokens."""

    decoder: nn.Module
    modules: Mapping[str, nn.Module]
    blocks: Sequence[nn.Module]
    ids: Tensor
    batch_size: int
    device: torch.device
    keep_going: bool


def _offset_progress(
    progress: Progress | None, done_before: int, total: int
) -> Callable[[int], None]:
    def count(done: int) -> None:
        if progress is not None:
            progress(done_before + done, total)

    return count


def _run_pass(
    stream: _Stream,
    part: Sequence[InputGroup],
    index: int,
    n_passes: int,
    count: Callable[[int], None],
) -> GramPass:
    started = time.perf_counter()
    observer = GramObserver(part, stream.device, keep_going=stream.keep_going)
    watched = {name: stream.modules[name] for group in part for name in group.members}
    with observe_inputs(watched, observer, _stop_block(part, stream.blocks)):
        for number, batch in enumerate(torch.split(stream.ids, stream.batch_size)):
            run_forward(stream.decoder, batch.to(stream.device))
            count(number + 1)
    return GramPass(index, n_passes, finish_grams(part, observer), time.perf_counter() - started)


def input_groups(
    model: nn.Module, targets: Sequence[TargetLinear], ids: Tensor
) -> list[InputGroup]:
    """Find out which targets receive the same input, by a forward pass over the first tokens.

    Parameters
    ----------
    model
        Causal language model in eval mode.
    targets
        Layers to group.
    ids
        Calibration tokens [n_samples, length].

    Returns
    -------
    list of InputGroup
        As `find_input_groups` gives them.
    """
    modules = {target.name: model.get_submodule(target.name) for target in targets}
    return find_input_groups(
        decoder_with(model, modules.values()),
        modules,
        {target.name: target.d_in for target in targets},
        {target.name: target.block for target in targets},
        probe_tokens(model, ids),
    )


def probe_tokens(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the first tokens [1, at most 64] on the model's device: enough to see which modules are called."""
    device = next(model.parameters()).device
    probe = ids[:1, :_PROBE_TOKENS]
    return probe if device.type == "meta" else probe.to(device)


def plan_passes(groups: Sequence[InputGroup], max_gram_bytes: int | None) -> list[list[InputGroup]]:
    """Cut the groups, in block order, into passes whose Grams fit.

    Raises
    ------
    InputError
        The largest Gram alone exceeds `max_gram_bytes`.
    """
    outside = max((group.last_block or 0 for group in groups), default=0) + 1
    ordered = sorted(groups, key=lambda g: outside if g.last_block is None else g.last_block)
    passes: list[list[InputGroup]] = [[]]
    held = 0
    for group in ordered:
        if max_gram_bytes is not None and group.gram_bytes > max_gram_bytes:
            raise InputError(
                f"max_gram_bytes = {max_gram_bytes} (setting max_gram_gb) is less than the Gram of {group.key} needs: "
                f"{group.gram_bytes} bytes (8 x {group.d_in}^2)"
            )
        if max_gram_bytes is not None and held + group.gram_bytes > max_gram_bytes:
            passes.append([])
            held = 0
        passes[-1].append(group)
        held += group.gram_bytes
    return passes


def _stop_block(part: Sequence[InputGroup], blocks: Sequence[nn.Module]) -> nn.Module | None:
    """Return the last block that a pass needs, or None if it has to run the whole decoder."""
    last = [group.last_block for group in part]
    known = [index for index in last if index is not None]
    return blocks[max(known)] if len(known) == len(last) else None


def finish_grams(part: Sequence[InputGroup], observer: GramObserver) -> dict[str, ActivationGram]:
    """Return the Grams that an observer has gathered; it gives them up one by one.

    Raises
    ------
    InputError
        No token reached a group.
    """
    grams = {}
    for group in part:
        n_tokens = observer.accumulators[group.key].n_tokens
        if n_tokens == 0:
            raise InputError(
                f"no calibration token reached {group.key}: use more calibration samples, or ignore the module"
            )
        gram = observer.mean(group.key)
        n_bad = int(group.key in observer.failures)
        grams[group.key] = ActivationGram(gram, n_tokens, n_bad, list(group.members))
    return grams


def decoder_with(model: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    """Return the model's decoder if every module lies in it, else the whole model."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    if isinstance(decoder, nn.Module):
        inside = {id(module) for module in decoder.modules()}
        if all(id(module) in inside for module in modules):
            return decoder
    return model
