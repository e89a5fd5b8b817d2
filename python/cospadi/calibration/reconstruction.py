"""Block-wise reconstruction: all values of a decoder block are tuned together, supports kept, to the original's output.

A fit minimises the error of one linear's output on the original model's activations. What it cannot know is what the
layers before it lost and what the layers after it in the same block can make good. Here the compressed model's hidden
states enter a block with compressed linears, and gradient descent moves their coefficients and atoms towards the
hidden states that the original model has behind that block; then the next block follows. Only values move, so nothing
changes in size.

The hidden states of a batch are hundreds of numbers per token, which is why a hundred thousand tokens determine the
three million values of a block, where the gradients of the model's one loss would not. What is kept is decided on
windows that were held back: a block whose error on them does not fall stays as it was.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cospadi.calibration.blockwise import BlockStream, BlockwiseDecoder
from cospadi.calibration.statistics import Progress
from cospadi.errors import InputError
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.learn.tunable import TunableLinear, is_tunable

BETAS = (0.9, 0.95)
"""Of Adam: there are too few steps for a longer memory."""

WARM_UP = 0.05
"""Share of the steps over which the step size rises to its full length; it falls along a cosine afterwards."""

TINY = 1e-6
"""Below this squared length hidden states do not count as such."""


@dataclass(frozen=True)
class ReconstructionOptions:
    """How blocks are tuned.

    Attributes
    ----------
    epochs : int
        Passes over the windows per block.
    rate : float
        Largest step, as a share of the root mean square of what is stepped (coefficients, atoms).
    batch_size : int
        Windows per step.
    held_back : int
        Windows, the last ones, that only judge.
    seed : int
        Of the order of the batches.
    """

    epochs: int = 4
    rate: float = 0.003
    batch_size: int = 4
    held_back: int = 8
    seed: int = 0


@dataclass(frozen=True)
class BlockResult:
    """One finished block.

    Attributes
    ----------
    block : int
        Its index.
    factors : dict
        The block's factors by module name, rounded to their storage types; those of before where nothing was gained.
    before, after : float
        Error of the block's output on the held-back windows: mean over tokens of the squared distance from the original
        hidden state, relative to that.
    is_kept : bool
        Whether the tuned values were better and have been kept.
    seconds : float
        Wall time.
    """

    block: int
    factors: dict[str, SparseFactor]
    before: float
    after: float
    is_kept: bool
    seconds: float


def reconstruct_blocks(
    model: nn.Module,
    factors: Mapping[str, SparseFactor],
    ids: Tensor,
    options: ReconstructionOptions,
    *,
    shared: Collection[str] = (),
    finished: Mapping[str, SparseFactor] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[BlockResult]:
    """Tune the blocks of a compressed model one after another.

    Parameters
    ----------
    model
        The original model, fp32. It is not changed.
    factors
        Compressed linears by module name. Those that cannot be tuned (`cospadi.learn.tunable.is_tunable`) run as they
        are.
    ids
        Token ids ``[n_samples, length]``.
    options
        See `ReconstructionOptions`.
    shared
        Modules whose dictionary others use: only their coefficients are tuned.
    finished
        Results of an earlier run for the first blocks: they are put in place, and not yielded again.
    folder
        Where hidden states lie as mapped files; None for memory.
    progress
        Called with (finished steps, all steps).

    Yields
    ------
    BlockResult
        For every block that holds a tunable factor, in order.

    Raises
    ------
    InputError
        A number is out of range, or the model has no decoder blocks.
    BlockwiseError
        The model cannot be run block by block.

    Notes
    -----
    Memory beside the model: three streams of hidden states (4 n_samples length features bytes each), two copies of one
    block, four times its dense size for gradients and moments, activations of one batch. Time: about
    ``(3 epochs + 4)`` forward passes of the block over all windows. Deterministic for a given thread count.
    """
    _check(options, ids)
    return _reconstruct(
        model, factors, ids, options, frozenset(shared), dict(finished or {}), folder, progress
    )


def _reconstruct(
    model: nn.Module,
    factors: Mapping[str, SparseFactor],
    ids: Tensor,
    options: ReconstructionOptions,
    shared: frozenset[str],
    finished: dict[str, SparseFactor],
    folder: Path | None,
    progress: Progress | None,
) -> Iterator[BlockResult]:
    was_training = model.training
    model.eval()
    try:
        decoder = BlockwiseDecoder(model)
        members = {
            index: [name for name in factors if name.startswith(f"{block}.")]
            for index, block in enumerate(decoder.names)
        }
        pending = [
            index
            for index, names in members.items()
            if any(is_tunable(factors[name]) and name not in finished for name in names)
        ]
        if not pending:
            return
        original = BlockStream(decoder, ids, batch_size=options.batch_size, folder=folder)
        compressed = original.fork()
        steps = _Steps(len(list(original.batches())), options, len(pending), progress)
        for index in range(pending[-1] + 1):
            block = _Block(decoder.names[index], model, members[index])
            if index in pending:
                start = time.perf_counter()
                tunables = block.place_tunables(factors, shared)
                tuning = _Tuning(block.module, original, compressed, options)
                before = tuning.held_back_error()
                tuning.run(list(tunables.values()), steps)
                tuned = {name: tunable.rounded() for name, tunable in tunables.items()}
                block.place(tuned)
                after = tuning.held_back_error()
                is_kept = after < before
                if not is_kept:
                    block.place({name: factors[name] for name in tuned})
                result = {name: tuned[name] if is_kept else factors[name] for name in tuned}
                seconds = time.perf_counter() - start
                del tuning, tunables
                yield BlockResult(index, result, before, after, is_kept, seconds)
            else:
                block.place({name: finished.get(name, factors[name]) for name in members[index]})
            if index < pending[-1]:
                original.advance()
                compressed.advance(block.module)
    finally:
        model.train(was_training)


def _check(options: ReconstructionOptions, ids: Tensor) -> None:
    if options.epochs < 1:
        raise InputError(f"epochs: expected at least 1, got {options.epochs}")
    if not 0.0 < options.rate < 1.0:
        raise InputError(f"rate: expected a share between 0 and 1, got {options.rate!r}")
    if not 1 <= options.held_back < ids.shape[0]:
        raise InputError(
            f"held_back: expected 1 to {ids.shape[0] - 1} of the {ids.shape[0]} windows, got {options.held_back}"
        )


class _Block:
    """A copy of one decoder block whose linears are replaced by compressed ones."""

    def __init__(self, name: str, model: nn.Module, members: Sequence[str]) -> None:
        self._prefix = f"{name}."
        self._members = members
        self.module = copy.deepcopy(model.get_submodule(name)).requires_grad_(False)
        self._device = next(model.parameters()).device

    def place(self, factors: Mapping[str, SparseFactor]) -> None:
        """Put the dense products of factors in the place of their linears."""
        for name, factor in factors.items():
            self._set(name, dense_linear(factor, self._device))

    def place_tunables(
        self, factors: Mapping[str, SparseFactor], shared: frozenset[str]
    ) -> dict[str, TunableLinear]:
        """Put every member in, and return those that gradients can move."""
        tunables = {}
        for name in self._members:
            if is_tunable(factors[name]):
                tunable = TunableLinear(factors[name], tunes_dictionary=name not in shared)
                tunables[name] = tunable.to(self._device)
                self._set(name, tunables[name])
            else:
                self._set(name, dense_linear(factors[name], self._device))
        return tunables

    def _set(self, name: str, module: nn.Module) -> None:
        self.module.set_submodule(name.removeprefix(self._prefix), module)


def dense_linear(factor: SparseFactor, device: torch.device) -> nn.Linear:
    """Return the dense layer that a factor stands for, float32, on a device."""
    weight = factor.dense_weight(device=device)
    linear = nn.Linear(weight.shape[1], weight.shape[0], factor.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if factor.bias is not None:
        linear.bias = nn.Parameter(factor.bias.to(device, torch.float32), requires_grad=False)
    return linear


class _Steps:
    """Counts steps over all blocks, for the progress."""

    def __init__(
        self,
        n_batches: int,
        options: ReconstructionOptions,
        n_blocks: int,
        progress: Progress | None,
    ) -> None:
        self._total = n_batches * options.epochs * n_blocks
        self._done = 0
        self._progress = progress

    def count(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


class _Tuning:
    """Gradient descent on one block between the two streams."""

    def __init__(
        self,
        block: nn.Module,
        original: BlockStream,
        compressed: BlockStream,
        options: ReconstructionOptions,
    ) -> None:
        self._block = block
        self._compressed = compressed
        self._options = options
        n_samples = original.hidden.shape[0]
        n_tuned = n_samples - options.held_back
        # a batch that holds both kinds of windows only judges
        parts = list(original.batches())
        self._tuned = [part for part in parts if part.stop <= n_tuned]
        self._judges = [part for part in parts if part.stop > n_tuned]
        self._targets = {part.start: original.run(part).float() for part in parts}

    def held_back_error(self) -> float:
        """Mean over held-back tokens of the squared distance, relative."""
        with torch.no_grad():
            errors = [self._errors(part, with_gradients=False).flatten() for part in self._judges]
        return float(torch.cat(errors).double().mean())

    def run(self, tunables: Sequence[TunableLinear], steps: _Steps) -> None:
        """Adam with a warm-up and a cosine, in an order drawn by the seed."""
        sizes = [pair for tunable in tunables for pair in tunable.step_sizes()]
        groups = [{"params": [p], "lr": size * self._options.rate} for p, size in sizes]
        optimizer = torch.optim.Adam(groups, betas=BETAS)
        total = self._options.epochs * len(self._tuned)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: _step_share(step, total)
        )
        generator = torch.Generator().manual_seed(self._options.seed)
        for _ in range(self._options.epochs):
            for i in torch.randperm(len(self._tuned), generator=generator).tolist():
                optimizer.zero_grad()
                self._errors(self._tuned[i], with_gradients=True).mean().backward()
                optimizer.step()
                schedule.step()
                steps.count()

    def _errors(self, part: slice, *, with_gradients: bool) -> Tensor:
        target = self._targets[part.start]
        found = self._compressed.run(part, self._block, with_gradients=with_gradients)
        lost = (found.float() - target).square().sum(-1)
        return lost / target.square().sum(-1).clamp_min(TINY)


def _step_share(step: int, total: int) -> float:
    """Share of the largest step size at one of `total` steps."""
    rise = min(1.0, (step + 1) / max(1.0, WARM_UP * total))
    return rise * 0.5 * (1.0 + math.cos(math.pi * step / total))
