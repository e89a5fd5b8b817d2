"""Running a decoder block by block on stored hidden states, so that one block at a time is needed.

A decoder of transformers is a loop over blocks whose body is one call, ``hidden = block(hidden, ...)``. What else the
call receives (position embeddings, masks, sliding windows, which may differ from block to block) depends on the shape
of the batch and not on its tokens, so the model's own forward computes it once per shape. That this holds for a model,
and that nothing happens between the blocks, is checked bit for bit on other tokens before anything relies on it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.calibration.capture import StopForward, run_forward
from cospadi.calibration.ids import check_ids
from cospadi.calibration.statistics import decoder_with
from cospadi.errors import CospadiError, InputError
from cospadi.model.discover import decoder_blocks


class BlockwiseError(CospadiError):
    """The model cannot be run block by block; run it as a whole."""


@dataclass(frozen=True, eq=False)
class _BlockCall:
    """Arguments of one call of a block, without the hidden states.

    Attributes
    ----------
    args
        Positional arguments behind the hidden states, or all of them if those came by name.
    kwargs
        Keyword arguments.
    hidden_name
        Keyword of the hidden states; None where they are the first positional argument.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None

    def run(self, block: nn.Module, hidden: Tensor) -> object:
        """Call a block on hidden states [batch, length, features] and return its output as it is."""
        if self.hidden_name is None:
            return block(hidden, *self.args, **self.kwargs)
        return block(*self.args, **self.kwargs, **{self.hidden_name: hidden})


class BlockwiseDecoder:
    """The blocks of a model's decoder, and what each call of them needs besides hidden states.

    Parameters
    ----------
    model
        Causal language model in eval mode. The blocks are looked up at every use: modules in them may be replaced.

    Attributes
    ----------
    model
        The model.
    names
        Module names of the blocks in order.

    Raises
    ------
    InputError
        The model has no list of decoder blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = [name for name, _ in decoder_blocks(model)]
        self._decoder = decoder_with(model, self.blocks)
        self._calls: dict[tuple[int, int], list[_BlockCall]] = {}
        self._beside: tuple[Any, ...] | None = None  # what blocks return behind hidden states

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in order, as they are in the model now."""
        return [self.model.get_submodule(name) for name in self.names]

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    def prepare(self, ids: Tensor) -> None:
        """Record the calls for batches of one shape, and check that they reproduce the ordinary forward.

        Parameters
        ----------
        ids
            Token ids [batch, length] of that shape. Recorded with these tokens, checked with the same tokens in
            reverse order.

        Raises
        ------
        BlockwiseError
            The blocks are not called once each in their order, do not return hidden states, or do not give the
            same bits as the ordinary forward; the message names the model and the block.

        Notes
        -----
        Three forward passes over one batch; nothing for a shape that was prepared before.
        """
        shape = (ids.shape[0], ids.shape[1])
        if shape not in self._calls:
            ids = ids.to(self.device)
            calls = self._record(ids)
            self._verify(ids.flip((0, 1)), calls)
            self._calls[shape] = calls

    def first_hidden(self, ids: Tensor) -> Tensor:
        """Return what enters the first block, [batch, length, features], for token ids [batch, length]."""
        found: list[Tensor] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(self._split_call(0, args, kwargs)[0])
            raise StopForward

        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            run_forward(self._decoder, ids.to(self.device))
        finally:
            handle.remove()
        return found[0]

    def run(
        self,
        index: int,
        hidden: Tensor,
        block: nn.Module | None = None,
        *,
        with_gradients: bool = False,
    ) -> Tensor:
        """Run one block.

        Parameters
        ----------
        index
            Number of the block.
        hidden
            [batch, length, features], in the model's type, of a shape that was prepared.
        block
            Module to run in its place, such as a copy of it; None for the model's own.
        with_gradients
            Record what a backward pass through the block needs.

        Returns
        -------
        Tensor
            [batch, length, features].
        """
        call = self._calls[hidden.shape[0], hidden.shape[1]][index]
        with torch.set_grad_enabled(with_gradients):
            output = call.run(self.blocks[index] if block is None else block, hidden)
        return self._hidden_of(index, output)

    def logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What the model makes of the hidden states that leave its last block.

        Parameters
        ----------
        hidden
            [batch, length, features]; any positions of the tokens, since only the blocks know about them.
        ids
            Token ids [batch, length]; they do not enter the result.

        Returns
        -------
        Tensor
            [batch, length, vocabulary], with gradients where `hidden` has them.

        Notes
        -----
        The model's own forward, with blocks that hand their input on; some batch has been prepared before.
        """
        beside, last = self._beside, len(self.names) - 1

        def stand_in(index: int) -> Callable[..., object]:
            def forward(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401
                values = hidden if index == last else self._split_call(index, args, kwargs)[0]
                return values if beside is None else (values, *beside)

            return forward

        with self._forwards(lambda index, _block: stand_in(index)):
            output: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return output

    @contextmanager
    def _forwards(
        self, forward: Callable[[int, nn.Module], Callable[..., object]]
    ) -> Iterator[None]:
        """Let ``forward(index, block)`` stand in for the forward of every block while the context lasts."""
        blocks = self.blocks
        try:
            for index, block in enumerate(blocks):
                block.forward = forward(index, block)
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def _record(self, ids: Tensor) -> list[_BlockCall]:
        calls: list[_BlockCall] = []
        order: list[int] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(index)
            calls.append(self._split_call(index, args, kwargs)[1])

        def returned(index: int, output: object) -> None:
            self._hidden_of(index, output)
            self._beside = output[1:] if isinstance(output, tuple) else None

        with ExitStack() as hooks:
            self._hook_each(hooks, record, returned)
            run_forward(self._decoder, ids)
        if order != list(range(len(self.names))):
            raise self._unsupported(f"its {len(self.names)} blocks are called in the order {order}")
        return calls

    def _verify(self, ids: Tensor, calls: Sequence[_BlockCall]) -> None:
        """Run a second chain beside the ordinary forward, block by block, and compare."""
        blocks = self.blocks
        chain = torch.empty(0)
        is_ours = False  # our own calls of the blocks run through the same hooks

        def before(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal chain
            if is_ours:
                return
            hidden = self._split_call(index, args, kwargs)[0]
            if index == 0:
                chain = hidden.clone()
            elif not torch.equal(chain, hidden):
                raise self._unsupported(
                    f"hidden states change between blocks {index - 1} and {index}"
                )

        def after(index: int, output: object) -> None:
            nonlocal chain, is_ours
            if is_ours:
                return
            is_ours = True
            try:
                chain = self._hidden_of(index, calls[index].run(blocks[index], chain))
            finally:
                is_ours = False
            if not torch.equal(chain, self._hidden_of(index, output)):
                raise self._unsupported(
                    f"block {index} on stored hidden states gives other values than the ordinary forward"
                )

        with ExitStack() as hooks:
            self._hook_each(hooks, before, after)
            run_forward(self._decoder, ids)

    def _hook_each(
        self,
        hooks: ExitStack,
        before: Callable[[int, tuple[Any, ...], dict[str, Any]], None],
        after: Callable[[int, object], object],
    ) -> None:
        for index, block in enumerate(self.blocks):
            handle = block.register_forward_pre_hook(
                lambda _module, args, kwargs, index=index: before(index, args, kwargs),
                with_kwargs=True,
            )
            hooks.callback(handle.remove)
            handle = block.register_forward_hook(
                # hooks that return something replace the output
                lambda _module, _args, output, index=index: (after(index, output), None)[1]
            )
            hooks.callback(handle.remove)

    def _split_call(
        self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, _BlockCall]:
        """Separate the hidden states of a block's call from everything else."""
        if args and isinstance(args[0], Tensor):
            return args[0], _BlockCall(args[1:], dict(kwargs), None)
        hidden = kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise self._unsupported(f"block {index} is called without hidden states")
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return hidden, _BlockCall(args, rest, "hidden_states")

    def _hidden_of(self, index: int, output: object) -> Tensor:
        """Return the hidden states of a block's output."""
        hidden = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(hidden, Tensor):
            raise self._unsupported(
                f"block {index} returns {type(output).__name__} instead of hidden states"
            )
        return hidden

    def _unsupported(self, reason: str) -> BlockwiseError:
        return BlockwiseError(
            f"{type(self.model).__name__} cannot be run block by block: {reason}; run it as a whole"
        )


class BlockStream:
    """Hidden states of the calibration tokens at one depth of a decoder.

    Parameters
    ----------
    decoder
        The blocks. Batch shapes that are new to it are prepared.
    ids
        Token ids [n_samples, length], integer.
    batch_size
        Sequences per call of a block.
    folder
        Existing folder for the hidden states, which are then mapped from an unnamed file there; None keeps them in
        memory. The file disappears with the stream, also when the process is killed.

    Attributes
    ----------
    index
        Number of the block that comes next.
    hidden
        [n_samples, length, features] fp32 on the CPU: what enters that block.

    Raises
    ------
    InputError
        The ids do not fit the model, a number is out of range, or the folder cannot be written.
    BlockwiseError
        See `BlockwiseDecoder.prepare`.

    Notes
    -----
    Memory: 4 n_samples length features bytes, plus one batch in one block. fp32 holds the values of every model type
    exactly.
    """

    def __init__(
        self,
        decoder: BlockwiseDecoder,
        ids: Tensor,
        *,
        batch_size: int = 8,
        folder: Path | None = None,
    ) -> None:
        if ids.ndim != 2:
            raise InputError(f"calibration ids must be [n_samples, length], got {list(ids.shape)}")
        check_ids(decoder.model, ids, length=ids.shape[1])
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        self.index = 0
        self._decoder = decoder
        self._batch_size = batch_size
        self._folder = folder
        batches = torch.split(ids, batch_size)
        for batch in (batches[0], batches[-1]):
            decoder.prepare(batch)
        for part, batch in zip(self.batches(len(ids)), batches, strict=True):
            hidden = decoder.first_hidden(batch)
            if part.start == 0:
                self._dtype = hidden.dtype
                self._is_pinned = hidden.is_cuda
                shape = (*ids.shape, hidden.shape[2])
                self.hidden = _allocate(shape, folder, is_pinned=self._is_pinned)
            self.hidden[part] = hidden

    def fork(self) -> BlockStream:
        """Return a stream of its own at the same depth."""
        other = object.__new__(BlockStream)
        other.__dict__.update(self.__dict__)
        shape = tuple(self.hidden.shape)
        other.hidden = _allocate(shape, self._folder, is_pinned=self._is_pinned)
        other.hidden.copy_(self.hidden)
        return other

    def batches(self, n_samples: int | None = None) -> Iterator[slice]:
        """Yield the samples of each batch."""
        n_samples = self.hidden.shape[0] if n_samples is None else n_samples
        for start in range(0, n_samples, self._batch_size):
            yield slice(start, min(start + self._batch_size, n_samples))

    def run(
        self, part: slice, block: nn.Module | None = None, *, with_gradients: bool = False
    ) -> Tensor:
        """Run the next block on one of the `batches` and return its output; the stream stays where it is.

        Parameters
        ----------
        part
            One of the `batches`.
        block
            Module to run in place of the model's block.
        with_gradients
            As in `BlockwiseDecoder.run`.

        Returns
        -------
        Tensor
            [batch, length, features] in the model's type, on its device.
        """
        # a copy even where neither type nor device differ: the block may write to its input
        hidden = self.hidden[part].to(self._decoder.device, self._dtype, copy=True)
        return self._decoder.run(self.index, hidden, block, with_gradients=with_gradients)

    def advance(
        self, block: nn.Module | None = None, *, progress: Callable[[], None] | None = None
    ) -> None:
        """Run the next block on all batches and keep its output.

        Parameters
        ----------
        block
            Module to run in place of the model's block.
        progress
            Called after every batch.
        """
        for part in self.batches():
            self.hidden[part] = self.run(part, block)
            if progress is not None:
                progress()
        self.index += 1


def _allocate(shape: tuple[int, ...], folder: Path | None, *, is_pinned: bool = False) -> Tensor:
    """Memory for hidden states; pinned memory is copied to and from a GPU several times as fast."""
    if folder is None:
        return torch.empty(shape, dtype=torch.float32, pin_memory=is_pinned)
    size = torch.Size(shape).numel()
    try:
        # the mapping keeps the data after the name is gone
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".hidden") as file:
            os.posix_fallocate(
                file.fileno(), 0, 4 * size
            )  # a full disk shows here, not as a crash later
            mapped = torch.from_file(file.name, shared=True, size=size, dtype=torch.float32)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"folder {folder}: cannot hold {4 * size} bytes of hidden states: {reason}"
        ) from error
    return mapped.view(shape)
