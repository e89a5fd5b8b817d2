"""Activation Grams of a model that is never in memory as a whole: one decoder block at a time, all tokens through it.

The hidden states between two blocks are all that is kept of the tokens, in memory or in a file. They have the bits of
the ordinary forward pass (`cospadi.calibration.blockwise`), and so have the Grams.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.calibration.blockwise import BlockwiseDecoder
from cospadi.calibration.capture import (
    GramObserver,
    InputGroup,
    find_input_groups,
    observe_inputs,
    run_forward,
)
from cospadi.calibration.ids import check_ids
from cospadi.calibration.statistics import (
    ActivationGram,
    GramPass,
    Progress,
    finish_grams,
    plan_passes,
    probe_tokens,
)
from cospadi.errors import InputError
from cospadi.model.discover import TargetLinear
from cospadi.model.streamed import StreamedSource


class HiddenStates:
    """Hidden states ``[n_samples, length, features]`` float32, in memory or in a file without a name.

    Parameters
    ----------
    shape : tuple of int
        Sizes.
    folder : Path or None
        Existing folder for the file; None keeps them in memory. Read and written, not mapped: the address space, and
        not only the memory, stays bounded. The file ends with the process, whatever ends it.

    Raises
    ------
    InputError
        The folder cannot hold them.
    """

    def __init__(self, shape: tuple[int, int, int], folder: Path | None) -> None:
        self.shape = shape
        self._memory: Tensor | None = None
        self._row_bytes = 4 * shape[1] * shape[2]
        if folder is None:
            self._memory = torch.empty(shape, dtype=torch.float32)
            return
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as this
        except OSError as error:
            raise self._refused(error) from None
        try:
            os.posix_fallocate(self._file.fileno(), 0, self._row_bytes * shape[0])
        except OSError as error:
            self._file.close()
            raise self._refused(error) from None

    def get(self, part: slice) -> Tensor:
        """Return a copy of some samples, which the caller may write to."""
        if self._memory is not None:
            return self._memory[part].clone()
        values = torch.empty((part.stop - part.start, *self.shape[1:]), dtype=torch.float32)
        view = values.numpy().data.cast("B")
        position, done = part.start * self._row_bytes, 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], position + done)
            if count == 0:
                raise InputError(f"folder {self._folder}: the hidden states end too early")
            done += count
        return values

    def put(self, part: slice, values: Tensor) -> None:
        """Keep some samples."""
        if self._memory is not None:
            self._memory[part] = values
            return
        view = values.float().contiguous().numpy().data.cast("B")
        position, done = part.start * self._row_bytes, 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], position + done)
        except OSError as error:
            raise self._refused(error) from None

    def close(self) -> None:
        """Let go of memory or file."""
        if self._memory is None:
            self._file.close()
        self._memory = torch.empty(0)

    def _refused(self, error: OSError) -> InputError:
        n_bytes = self._row_bytes * self.shape[0]
        return InputError(
            f"folder {self._folder}: cannot hold {n_bytes} bytes of hidden states: {error.strerror or error}"
        )


class StreamedDecoder(BlockwiseDecoder):
    """The blocks of a streamed model. Everything but them is lent while calls are recorded and tokens are embedded."""

    def __init__(self, source: StreamedSource) -> None:
        super().__init__(source.model)
        self._source = source
        self._is_checked = False

    @property
    def device(self) -> torch.device:
        """Where the tokens go."""
        return torch.device("cpu")

    @contextmanager
    def outside_of_blocks(self) -> Iterator[None]:
        """Lend the decoder's embeddings and norms."""
        listed = self.names[0].rpartition(".")[0]
        prefix = next(n for n, m in self.model.named_modules() if m is self._decoder)
        with self._source.resident(prefix, without=listed):
            yield

    def prepare(self, ids: Tensor) -> None:
        """As in the base class, inside of `outside_of_blocks`; few tokens and three blocks take part in the check."""
        shape = (ids.shape[0], ids.shape[1])
        if shape in self._calls:
            return
        if not self._is_checked:
            self._is_checked = True
            self._check(probe_tokens(self.model, ids).cpu())
        with self._standing_in(real=()):
            self._calls[shape] = self._record(ids)

    def _check(self, ids: Tensor) -> None:
        """Compare calls recorded with some tokens to ordinary calls with others, in the first and the last blocks."""
        real = sorted({0, min(1, len(self.names) - 1), len(self.names) - 1})
        with self._standing_in(real=()):
            calls = self._record(ids)
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[index] = self._split_call(index, args, kwargs)[0].clone()
            if index and not _same(inputs[index], outputs[index - 1]):
                raise self._unsupported(
                    f"hidden states change between blocks {index - 1} and {index}"
                )

        def after(index: int, output: object) -> None:
            outputs[index] = self._hidden_of(index, output).clone()

        with self._standing_in(real=real), ExitStack() as hooks:
            self._hook_each(hooks, before, after)
            run_forward(self._decoder, ids.flip((0, 1)))
        for index in real:
            with self._source.resident(self.names[index]), torch.no_grad():
                again = self._hidden_of(
                    index, calls[index].run(self.blocks[index], inputs[index].clone())
                )
            if not _same(again, outputs[index]):
                raise self._unsupported(
                    f"block {index} on stored hidden states gives other values than the ordinary forward"
                )

    @contextmanager
    def _standing_in(self, real: Sequence[int]) -> Iterator[None]:
        """Let blocks hand on their input, except the first block's first call, which shows what they return.

        Those in `real` compute, with weights lent for the time of the call.
        """
        kind: list[object] = []

        def forward(index: int, block: nn.Module) -> Any:  # noqa: ANN401
            original = block.forward

            def compute(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401
                with self._source.resident(self.names[index]):
                    return original(*args, **kwargs)

            def hand_on(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401
                if not kind:
                    kind.append(compute(*args, **kwargs))
                hidden = self._split_call(index, args, kwargs)[0]
                first = kind[0]
                return (hidden, *first[1:]) if isinstance(first, tuple) else hidden

            return compute if index in real else hand_on

        with self._forwards(forward):
            yield


def collect_streamed_grams(
    source: StreamedSource,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    *,
    batch_size: int = 8,
    max_gram_bytes: int | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    keep_going: bool = False,
) -> Iterator[GramPass]:
    """Yield the Grams that `cospadi.calibration.statistics.collect_grams` yields, a block or a part of one at a time.

    Parameters
    ----------
    source : StreamedSource
        The model.
    targets : sequence of TargetLinear
        Layers in the decoder blocks.
    ids, batch_size, progress, keep_going
        As for `collect_grams`.
    max_gram_bytes : int, optional
        Bound on the Grams held at a time; a block whose Grams exceed it runs several times.
    folder : Path, optional
        Existing folder for the hidden states; None keeps them in memory.

    Yields
    ------
    GramPass
        `n_passes` counts blocks. No weight is in memory while the caller works on the Grams.

    Raises
    ------
    InputError
        As `collect_grams`; a target lies outside the blocks; the folder cannot hold the hidden states.
    BlockwiseError
        The model cannot be run block by block.

    Notes
    -----
    Memory: embeddings once, in the beginning; then one block, the activations of one batch in it, the Grams, and the
    hidden states unless they are in a file. Bits: those of `collect_grams` with the same batch size and threads.
    """
    if ids.ndim != 2:
        raise InputError(f"calibration ids must be [n_samples, length], got {list(ids.shape)}")
    check_ids(source.model, ids, length=ids.shape[1])
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    for target in targets:
        if target.block is None:
            raise InputError(f"{target.name} lies outside the decoder blocks: ignore it")
    if not targets:
        return iter(())
    return _collect(source, targets, ids, batch_size, max_gram_bytes, folder, progress, keep_going)


def _collect(
    source: StreamedSource,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    batch_size: int,
    max_gram_bytes: int | None,
    folder: Path | None,
    progress: Progress | None,
    keep_going: bool,
) -> Iterator[GramPass]:
    started = time.perf_counter()
    decoder = StreamedDecoder(source)
    parts = [
        slice(start, min(start + batch_size, len(ids))) for start in range(0, len(ids), batch_size)
    ]
    probe = probe_tokens(source.model, ids).cpu()
    with decoder.outside_of_blocks():
        for batch in (probe, ids[parts[0]], ids[parts[-1]]):
            decoder.prepare(batch)
        hidden = embedded(decoder, ids, parts, folder)
    last = max(target.block or 0 for target in targets)
    seconds = time.perf_counter() - started
    try:
        for index in range(last + 1):
            wanted = [target for target in targets if target.block == index]
            run = _BlockRun(source, decoder, index, wanted, hidden, parts, keep_going)
            for gram_pass in run.passes(max_gram_bytes, probe.shape[1], is_last=index == last):
                started = time.perf_counter()
                grams = gram_pass()
                seconds += time.perf_counter() - started
                if grams:
                    yield GramPass(index, last + 1, grams, seconds)
                    seconds = 0.0
                del grams
            if progress is not None:
                progress((index + 1) * len(parts), (last + 1) * len(parts))
    finally:
        hidden.close()


def embedded(
    decoder: StreamedDecoder, ids: Tensor, parts: Sequence[slice], folder: Path | None
) -> HiddenStates:
    """What enters the first block, for parts that cover all of ``ids [n_samples, length]``."""
    hidden = None
    for part in parts:
        values = decoder.first_hidden(ids[part])
        if hidden is None:
            hidden = HiddenStates((*ids.shape, values.shape[2]), folder)
        hidden.put(part, values)
    assert hidden is not None
    return hidden


class _BlockRun:
    """All tokens through one block."""

    def __init__(
        self,
        source: StreamedSource,
        decoder: StreamedDecoder,
        index: int,
        targets: Sequence[TargetLinear],
        hidden: HiddenStates,
        parts: Sequence[slice],
        keep_going: bool,
    ) -> None:
        self._keep_going = keep_going
        self._source = source
        self._decoder = decoder
        self._index = index
        self._targets = {target.name: target for target in targets}
        self._hidden = hidden
        self._parts = parts

    def passes(self, max_gram_bytes: int | None, n_probe: int, *, is_last: bool) -> Iterator[Any]:
        """Yield functions that run the block; the last of them brings the hidden states behind it."""
        groups = self._groups(n_probe) if self._targets else []
        split = plan_passes(groups, max_gram_bytes) if groups else [[]]
        for number, part in enumerate(split):
            moves_on = number == len(split) - 1 and not is_last

            def run(
                part: Sequence[InputGroup] = part, moves_on: bool = moves_on
            ) -> dict[str, ActivationGram]:
                return self._run(part, moves_on)

            yield run

    def _groups(self, n_probe: int) -> list[InputGroup]:
        """Who shares an input, by the first tokens of the first sample."""
        name = self._decoder.names[self._index]
        with self._source.resident(name):
            modules = {n: self._source.model.get_submodule(n) for n in self._targets}
            values = self._hidden.get(slice(0, 1))[:, :n_probe].contiguous()
            return find_input_groups(
                _Runner(self._decoder, self._index, values),
                modules,
                {n: t.d_in for n, t in self._targets.items()},
                {n: t.block for n, t in self._targets.items()},
                torch.empty(0),
            )

    def _run(self, part: Sequence[InputGroup], moves_on: bool) -> dict[str, ActivationGram]:
        if not part and not moves_on:
            return {}
        block = self._decoder.names[self._index]
        observer = GramObserver(part, torch.device("cpu"), keep_going=self._keep_going)
        with self._source.resident(block):
            watched = {
                name: self._source.model.get_submodule(name)
                for group in part
                for name in group.members
            }
            with observe_inputs(watched, observer):
                for samples in self._parts:
                    output = self._decoder.run(self._index, self._hidden.get(samples))
                    if moves_on:
                        self._hidden.put(samples, output)
                    del output
        return finish_grams(part, observer)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether values are equal, NaN to NaN: activations that overflow are judged where the Grams are made."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(nan=0.0), other.nan_to_num(nan=0.0)
    )


class _Runner(nn.Module):
    """A block on given hidden states, in the place of a decoder that is given ids."""

    def __init__(self, decoder: StreamedDecoder, index: int, values: Tensor) -> None:
        super().__init__()
        self._run = lambda: decoder.run(index, values)

    def forward(self, **_: object) -> None:
        """Run it."""
        self._run()
