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
# 8192 x 1536 inputs on two AVX-512 cores, 256 columns take 0.45 and 0.73 of the time of the whole product;
# 128 to 512 columns lie within 20 % of that.
_PANEL = 256

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

    One batch contributes one fp32 product, whose rounding error does not grow with the number of batches; the sum of
    the batches is exact to fp64.

    Parameters
    ----------
    d_in
        Features of the input.
    device
        Where the inputs lie.
    """

    def __init__(self, d_in: int, device: torch.device) -> None:
        self.n_tokens = 0
        # blocks below the diagonal stay zero until `mean`
        self._total = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> bool:
        """Add X^T X of one batch.

        Parameters
        ----------
        rows
            X, [n_tokens, d_in], any floating dtype.

        Returns
        -------
        bool
            False if the product is not finite; the accumulator is then useless.

        Notes
        -----
        n_tokens * d_in * (d_in + 256) multiply-adds, temporaries of 256 rows of the Gram.
        """
        rows = rows.to(torch.float32)  # no copy for a fp32 model
        d_in = rows.shape[1]
        finite = torch.ones((), dtype=torch.bool, device=rows.device)
        for start in range(0, d_in, _PANEL):
            stop = min(start + _PANEL, d_in)
            product = rows[:, start:stop].T @ rows[:, start:]  # [panel, d_in - start]
            # a NaN or infinity in column j of X makes G[j, j] non-finite: the diagonal is enough
            finite &= torch.isfinite(product.diagonal()).all()
            self._total[start:stop, start:] += product
        self.n_tokens += rows.shape[0]
        return bool(finite)

    def mean(self) -> Tensor:
        """Return X^T X / n_tokens, [d_in, d_in] fp64, exactly symmetric; ends the accumulation."""
        gram = self._total
        for start in range(0, gram.shape[0], _PANEL):
            stop = min(start + _PANEL, gram.shape[0])
            block = gram[start:stop, start:stop]
            block.copy_((block + block.T) / 2)
            gram[stop:, start:stop] = gram[start:stop, stop:].T
        return gram.div_(max(self.n_tokens, 1))


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
    """

    def __init__(self, groups: Sequence[InputGroup], device: torch.device) -> None:
        self.accumulators = {group.key: GramAccumulator(group.d_in, device) for group in groups}
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
        if not self.accumulators[key].add(x.reshape(-1, x.shape[-1])):
            bad = int((~torch.isfinite(x)).sum())
            what = (
                f"{bad} of {x.numel()} values are NaN or infinite"
                if bad
                else "its squares overflow fp32"
            )
            raise InputError(f"the activation that enters {name} is not finite: {what}")
