"""Hooks that watch the inputs of linear layers: who shares an input, and the Gram of each distinct input."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.errors import CospadiError, InputError

# Columns of X per product: only the blocks on and above the diagonal of X^T X are computed. With 8192 x 576 and
# 8192 x 1536 inputs on two AVX-512 cores, 192 columns take 0.77 and 0.60 of the time of the whole product; 128 and 256
# columns lie within 11 % of that, 512 columns take 0.91 of the smaller product.
_PANEL = 192
# Rows gathered at most. A product of few rows pays more for packing and for the pass over the fp64 sum: gathering
# batches of 1024 x 1536 saves 9 %, of 512 x 1536 16 %; batches of 4096 rows gain nothing.
_MOST_BUFFERED_ROWS = 4096

InputObserver = Callable[[str, Tensor], None]


class StopForward(Exception):
    """Raised by a hook after the last decoder block that is needed."""


@dataclass(frozen=True)
class InputGroup:
    """Modules that receive the same tensor object.

    Attributes
    ----------
    key
        Name of the member that is called first.
    members
        Module names in the order of their calls, `key` first.
    d_in
        Features of the shared input.
    last_block
        Index of the decoder block after which every member has been called; None outside the blocks.
    """

    key: str
    members: tuple[str, ...]
    d_in: int
    last_block: int | None

    @property
    def gram_bytes(self) -> int:
        """Bytes of the fp64 accumulator."""
        return 8 * self.d_in * self.d_in


class GramAccumulator:
    """Sum of X^T X over batches: products in fp32, sum in fp64.

    Rows of small batches are gathered first. A chunk of gathered rows, or one large batch, contributes one fp32
    product, whose rounding error does not grow with the number of chunks; the sum of the chunks is exact to fp64.

    Parameters
    ----------
    name
        Module that receives X, for error messages.
    d_in
        Features of the input.
    device
        Where the inputs lie.

    Notes
    -----
    Memory: 8 d_in^2 bytes for the sum, and at most as much for gathered rows.
    """

    def __init__(self, name: str, d_in: int, device: torch.device) -> None:
        self.n_tokens = 0
        self._name = name
        # blocks below the diagonal stay zero until `mean`
        self.total = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self._capacity = min(2 * d_in, _MOST_BUFFERED_ROWS)
        self._buffer: Tensor | None = None
        self._n_buffered = 0

    def add(self, rows: Tensor) -> None:
        """Add X^T X of one batch.

        Parameters
        ----------
        rows
            X, [n_tokens, d_in], any floating dtype. Not kept: it may be overwritten afterwards.

        Raises
        ------
        InputError
            A product is not finite; the accumulator is then useless. Gathered rows are looked at when their chunk is
            multiplied, in `mean` at the latest.

        Notes
        -----
        n_tokens * d_in * (d_in + 192) multiply-adds, temporaries of 192 rows of the Gram.
        """
        n_rows = rows.shape[0]
        self.n_tokens += n_rows
        if 2 * n_rows > self._capacity:  # two of them would not fit: gathering would only copy
            self._multiply(rows.to(torch.float32))  # no copy for a fp32 model
            return
        if self._n_buffered + n_rows > self._capacity:
            self._flush()
        if self._buffer is None:
            self._buffer = torch.empty(
                self._capacity, rows.shape[1], dtype=torch.float32, device=rows.device
            )
        self._buffer[self._n_buffered : self._n_buffered + n_rows] = rows
        self._n_buffered += n_rows

    def mean(self) -> Tensor:
        """Return X^T X / n_tokens, [d_in, d_in] fp64, exactly symmetric; ends the accumulation.

        Raises
        ------
        InputError
            As `add`.
        """
        self._flush()
        self._buffer = None
        gram = self.total
        for start in range(0, gram.shape[0], _PANEL):
            stop = min(start + _PANEL, gram.shape[0])
            block = gram[start:stop, start:stop]
            block.copy_((block + block.T) / 2)
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        return gram.div_(max(self.n_tokens, 1))

    def _flush(self) -> None:
        if self._buffer is not None and self._n_buffered:
            self._multiply(self._buffer[: self._n_buffered])
            self._n_buffered = 0

    def _multiply(self, rows: Tensor) -> None:
        d_in = rows.shape[1]
        finite = torch.ones((), dtype=torch.bool, device=rows.device)
        for start in range(0, d_in, _PANEL):
            stop = min(start + _PANEL, d_in)
            product = rows[:, start:stop].T @ rows[:, start:]  # [panel, d_in - start]
            # a NaN or infinity in column j of X makes G[j, j] non-finite: the diagonal is enough
            finite &= torch.isfinite(product.diagonal()).all()
            self.total[start:stop, start:] += product
        if not finite:
            raise not_finite(self._name, rows)


def not_finite(name: str, rows: Tensor) -> InputError:
    """Return the error for an input X whose products are not finite."""
    bad = int((~torch.isfinite(rows)).sum())
    what = (
        f"{bad} of {rows.numel()} values are NaN or infinite"
        if bad
        else "its squares overflow fp32"
    )
    return InputError(f"the activation that enters {name} is not finite: {what}")


@contextmanager
def observe_inputs(
    modules: Mapping[str, nn.Module], observer: InputObserver, stop_after: nn.Module | None = None
) -> Iterator[None]:
    """Call `observer(name, x)` before each call of a module with its input tensor.

    Parameters
    ----------
    modules
        Modules to watch by name.
    observer
        Receives the very tensor object that the module receives.
    stop_after
        Module after whose forward `StopForward` is raised.
    """

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
            if not isinstance(x, Tensor):
                raise CospadiError(
                    f"{name} was called without an input tensor: it cannot be calibrated"
                )
            observer(name, x)

        return hook

    def stop(*_: object) -> None:
        raise StopForward

    handles = [
        module.register_forward_pre_hook(make_hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    if stop_after is not None:
        handles.append(stop_after.register_forward_hook(stop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_forward(decoder: nn.Module, ids: Tensor) -> None:
    """Run the decoder on token ids [batch, length] up to the hook that stops it."""
    with torch.no_grad(), suppress(StopForward):
        decoder(input_ids=ids, use_cache=False)


class _SameTensor:
    """Recognises a tensor object seen before, as long as it lives and nobody wrote to it."""

    def __init__(self, x: Tensor) -> None:
        self._reference = weakref.ref(x)
        self._version = x._version

    def matches(self, x: Tensor) -> bool:
        return self._reference() is x and self._version == x._version


def find_input_groups(
    decoder: nn.Module,
    modules: Mapping[str, nn.Module],
    features: Mapping[str, int],
    blocks: Mapping[str, int | None],
    ids: Tensor,
) -> list[InputGroup]:
    """Run one forward pass and group the modules that receive the same tensor object.

    Parameters
    ----------
    decoder
        Module to run.
    modules, features, blocks
        Watched modules, their d_in, and the index of their decoder block, by name.
    ids
        Token ids [batch, length]; a few tokens are enough.

    Returns
    -------
    list of InputGroup
        In the order of execution. A module that these tokens did not reach (an expert, for example) forms a group of
        its own at the end.
    """
    members: dict[str, list[str]] = {}
    seen: list[tuple[_SameTensor, str]] = []
    placed: set[str] = set()

    def observer(name: str, x: Tensor) -> None:
        if name in placed:
            return
        placed.add(name)
        for known, key in seen:
            if known.matches(x):
                members[key].append(name)
                return
        members[name] = [name]
        seen.append((_SameTensor(x), name))

    with observe_inputs(modules, observer):
        run_forward(decoder, ids)
    members.update({name: [name] for name in modules if name not in placed})
    return [
        InputGroup(key, tuple(names), features[key], _last_block([blocks[name] for name in names]))
        for key, names in members.items()
    ]


def _last_block(indices: Sequence[int | None]) -> int | None:
    known = [i for i in indices if i is not None]
    return max(known) if len(known) == len(indices) else None


class GramObserver:
    """Adds the input of each group's first member to the group's Gram, and checks that the others got the same one.

    Parameters
    ----------
    groups
        Groups whose Grams are wanted.
    device
        Where the model lies.
    keep_going
        Note an input that is not finite in `failures`, by the group's key, and go on without it.
    """

    def __init__(
        self, groups: Sequence[InputGroup], device: torch.device, *, keep_going: bool = False
    ) -> None:
        self.failures: dict[str, str] = {}
        self._keep_going = keep_going
        self.accumulators = {
            group.key: GramAccumulator(group.key, group.d_in, device) for group in groups
        }
        self._key_of = {name: group.key for group in groups for name in group.members}
        self._latest: dict[str, _SameTensor] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        """Observe one call (see `observe_inputs`)."""
        key = self._key_of[name]
        if name != key:
            latest = self._latest.get(key)
            if latest is None or not latest.matches(x):
                raise CospadiError(
                    f"{name} shared its input with {key} at first and no longer does: calibrate them separately"
                )
            return
        self._latest[key] = _SameTensor(x)
        if key in self.failures:
            return
        with self._noting(key):
            self.accumulators[key].add(x.reshape(-1, x.shape[-1]))

    def mean(self, key: str) -> Tensor:
        """The Gram of a group, which the observer gives up; NaN for an input that was not finite."""
        accumulator = self.accumulators.pop(key)
        if key not in self.failures:
            with self._noting(key):
                return accumulator.mean()
        return torch.full_like(accumulator.total, torch.nan)

    @contextmanager
    def _noting(self, key: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            if not self._keep_going:
                raise
            self.failures[key] = str(error)
