"""Activation Grams on a device that the model does not lie on, block by block."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from cospadi.calibration.blockwise import BlockStream, BlockwiseDecoder, BlockwiseError
from cospadi.calibration.capture import GramObserver, InputGroup, observe_inputs
from cospadi.calibration.placement import Placement, placed
from cospadi.calibration.statistics import (
    ActivationGram,
    GramPass,
    Progress,
    collect_here,
    finish_grams,
    input_groups,
    plan_passes,
)
from cospadi.model.discover import TargetLinear


def collect_on_device(
    model: nn.Module,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    batch_size: int,
    max_gram_bytes: int | None,
    progress: Progress | None,
    keep_going: bool,
    device: torch.device,
) -> Iterator[GramPass]:
    """Run `cospadi.calibration.statistics.collect_grams` for its ``device``; the arguments have been checked there.

    Raises
    ------
    BlockwiseError
        The model cannot run block by block, and does not fit on the device as a whole.
    """
    was_training = model.training
    model.eval()
    try:
        with placed(model, device) as placement:
            groups = input_groups(model, targets, ids)
            passes = plan_passes(groups, max_gram_bytes)
            try:
                blocks = _by_block(groups, targets)
                stream = BlockStream(BlockwiseDecoder(model), ids, batch_size=batch_size)
            except BlockwiseError:
                if not placement.is_resident:
                    raise
                whole = collect_here(
                    model, targets, ids, batch_size, max_gram_bytes, progress, keep_going
                )
                yield from map(_on_cpu, whole)
                return
            run = _Run(model, placement, stream, blocks, progress, keep_going)
            for index, part in enumerate(passes):
                started = time.perf_counter()
                later = {group.key for rest in passes[index + 1 :] for group in rest}
                grams = run.collect(part, later)
                seconds = time.perf_counter() - started
                # yielded at once: a local name would keep the Grams alive while the caller works on them
                finished = GramPass(index, len(passes), grams, seconds)
                del grams
                yield finished
                del finished
    finally:
        model.train(was_training)


def _by_block(
    groups: Sequence[InputGroup], targets: Sequence[TargetLinear]
) -> dict[int, list[InputGroup]]:
    """Groups by the block that all of their members lie in."""
    block_of = {target.name: target.block for target in targets}
    blocks: dict[int, list[InputGroup]] = defaultdict(list)
    for group in groups:
        if group.last_block is None or any(
            block_of[name] != group.last_block for name in group.members
        ):
            raise BlockwiseError(
                f"the input of {group.key} does not belong to one decoder block: run the model as a whole"
            )
        blocks[group.last_block].append(group)
    return blocks


class _Run:
    """The tokens on their way through the blocks."""

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        stream: BlockStream,
        blocks: dict[int, list[InputGroup]],
        progress: Progress | None,
        keep_going: bool,
    ) -> None:
        self._keep_going = keep_going
        self._model, self._placement, self._stream = model, placement, stream
        self._blocks = blocks
        self._decoder = BlockwiseDecoder(model)
        n_batches = len(list(stream.batches()))
        self._count = _counter(progress, n_batches * (max(blocks) + 1))

    def collect(self, part: Sequence[InputGroup], later: set[str]) -> dict[str, ActivationGram]:
        """Grams of a pass; the stream stays in front of a block that has groups in a `later` one."""
        wanted = {group.key for group in part}
        grams: dict[str, ActivationGram] = {}
        last = max(group.last_block for group in part if group.last_block is not None)
        while self._stream.index <= last:
            index = self._stream.index
            groups = [group for group in self._blocks.get(index, ()) if group.key in wanted]
            is_finished = not any(group.key in later for group in self._blocks.get(index, ()))
            found = self._pass_block(index, groups, advances=is_finished)
            grams |= {key: _gram_on_cpu(gram) for key, gram in found.items()}
            if not is_finished:
                break
        return grams

    def _pass_block(
        self, index: int, groups: Sequence[InputGroup], *, advances: bool
    ) -> dict[str, ActivationGram]:
        observer = GramObserver(groups, self._placement.device, keep_going=self._keep_going)
        watched = {
            name: self._model.get_submodule(name) for group in groups for name in group.members
        }
        block = self._decoder.blocks[index]
        with self._placement.hold(block), observe_inputs(watched, observer):
            if advances:
                self._stream.advance(progress=self._count)
            else:
                for part in self._stream.batches():
                    self._stream.run(part)
        return finish_grams(groups, observer)


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return count


def _gram_on_cpu(gram: ActivationGram) -> ActivationGram:
    return dataclasses.replace(gram, gram=gram.gram.cpu())


def _on_cpu(finished: GramPass) -> GramPass:
    grams = {key: _gram_on_cpu(gram) for key, gram in finished.grams.items()}
    finished.grams.clear()
    return dataclasses.replace(finished, grams=grams)
