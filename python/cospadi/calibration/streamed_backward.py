"""Running tokens backwards through a model whose weights stay in their files: one decoder block at a time.

What `cospadi.calibration.backward` does batch by batch is done here block by block, all batches through each, to the
same bits. Hidden states of all depths go to files without names, since going backwards needs them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from cospadi.calibration.backward import (
    GradientObserver,
    Progress,
    backward_batches,
    block_gradient,
    head_gradient,
    watched,
)
from cospadi.calibration.streamed import HiddenStates, StreamedDecoder, embedded
from cospadi.model.discover import decoder_blocks
from cospadi.model.streamed import StreamedSource
from cospadi.native.heap import trim_heap


class StreamedBackward:
    """Gradients of one sample of tokens, at the blocks of a streamed model, from the last to the first.

    Parameters
    ----------
    source
        The model.
    ids
        Token ids [n_samples, length], integer.
    seed
        Of the labels.
    folder
        Existing folder for hidden states and gradients.
    progress
        Called with (finished batches, all batches); a batch through a block one way counts as one.

    Raises
    ------
    InputError
        Ids do not fit the model, logits are not finite, or the folder cannot hold the hidden states:
        ``4 n_samples length features`` bytes for every block, once more for gradients.
    BlockwiseError
        The model cannot be run block by block.

    Notes
    -----
    Memory: everything outside of the blocks, once before and once after them, with the logits of some tokens; between,
    one block with what its gradients need.
    """

    def __init__(
        self,
        source: StreamedSource,
        ids: Tensor,
        *,
        seed: int,
        folder: Path,
        progress: Progress | None = None,
    ) -> None:
        self._source, self._ids, self._folder, self._progress = source, ids, folder, progress
        self._batches = backward_batches(source.model, ids)
        self._decoder = StreamedDecoder(source)
        self._n_done = 0
        self._depths: list[HiddenStates] = []
        try:
            self._gradients = self._forward(torch.Generator().manual_seed(seed))
        except BaseException:
            self._close()
            raise

    @property
    def n_blocks(self) -> int:
        """Decoder blocks."""
        return len(self._decoder.names)

    def __enter__(self) -> StreamedBackward:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Let go of all files."""
        self._close()
        self._gradients.close()

    def _close(self) -> None:
        for states in self._depths:
            states.close()
        self._depths.clear()

    def run(self, observers: Mapping[str, GradientObserver], *, moves_on: bool) -> None:
        """Run all tokens through the last block that is left.

        Parameters
        ----------
        observers
            Of modules in this block, see `cospadi.calibration.backward.run_backwards`.
        moves_on
            Whether the block before it is next.
        """
        index = len(self._depths) - 1
        with (
            self._source.resident(self._decoder.names[index]),
            watched(self._source.model, observers),
        ):
            for part in self._batches:
                gradient = block_gradient(
                    self._decoder, index, self._depths[index].get(part), self._gradients.get(part)
                )
                if moves_on:
                    self._gradients.put(part, gradient)
                    self._count()
        if moves_on:
            self._depths.pop().close()

    def _forward(self, generator: torch.Generator) -> HiddenStates:
        decoder, names = self._decoder, self._decoder.names
        with decoder.outside_of_blocks():
            for part in (self._batches[0], self._batches[-1]):
                decoder.prepare(self._ids[part])
            self._depths.append(embedded(decoder, self._ids, self._batches, self._folder))
        for index, name in enumerate(names):
            hidden = self._depths[-1]
            behind = HiddenStates(hidden.shape, self._folder)
            self._depths.append(behind)
            with self._source.resident(name):
                for part in self._batches:
                    behind.put(part, decoder.run(index, hidden.get(part)))
                    self._count()
        hidden = self._depths[-1]
        trim_heap()
        with self._source.resident("", without=names[0].rpartition(".")[0]):
            for part in self._batches:
                hidden.put(
                    part, head_gradient(decoder, hidden.get(part), self._ids[part], generator)
                )
        return self._depths.pop()

    def _count(self) -> None:
        self._n_done += 1
        if self._progress is not None:
            self._progress(self._n_done, 2 * self.n_blocks * len(self._batches))


def run_streamed_backwards(
    source: StreamedSource,
    observers: Mapping[str, GradientObserver],
    ids: Tensor,
    *,
    seed: int,
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """What `cospadi.calibration.backward.run_backwards` does; see there, and `StreamedBackward`."""
    names = [name for name, _ in decoder_blocks(source.model)]
    of_block = [
        {name: found for name, found in observers.items() if name.startswith(f"{block}.")}
        for block in names
    ]
    first = next((index for index, found in enumerate(of_block) if found), None)
    if first is None:
        return
    with StreamedBackward(source, ids, seed=seed, folder=folder, progress=progress) as backward:
        for index in range(len(names) - 1, first - 1, -1):
            backward.run(of_block[index], moves_on=index > first)
