"""Sequential calibration: later layers see the activations of the compressed model, targets stay the original outputs.

Two streams of hidden states run through the decoder block by block: the original one, X, and the one of the compressed
model, X'. At each distinct input the consumer gets the moments of both, compresses the modules of that input, sets them
in the model, and asks for the next: the compressed stream of what follows contains them.

With one-shot calibration every layer is fitted to inputs that the compressed model never sees. The regression that
corrects for the difference, min ||X' W - X W_0||^2, over-fits the calibration tokens (its unshrunk form made a model
worse than one-shot calibration did), therefore `cospadi.calibration.correction` shrinks the correction towards the
original weight, by an amount that can be chosen on windows that were held back.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cospadi.calibration.blockwise import BlockStream, BlockwiseDecoder
from cospadi.calibration.capture import (
    GramAccumulator,
    InputGroup,
    StopForward,
    observe_inputs,
    run_forward,
)
from cospadi.calibration.correction import Moments
from cospadi.calibration.statistics import Progress, decoder_with, input_groups, probe_tokens
from cospadi.errors import InputError
from cospadi.model.discover import TargetLinear


@dataclass(eq=False)
class SequentialInput:
    """One distinct input of a decoder block, at the moment when everything before it has been replaced.

    Attributes
    ----------
    block
        Index of the decoder block.
    members
        Names of the modules that receive this input and are to be replaced now.
    moments
        Moments over the windows that were not held back.
    held_back
        Moments over those that were; None if there are none.
    """

    block: int
    members: list[str]
    moments: Moments
    held_back: Moments | None


def collect_sequential(
    model: nn.Module,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    *,
    batch_size: int = 8,
    held_back: int = 0,
    finished: Mapping[str, nn.Module] | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[SequentialInput]:
    """Yield the moments of each distinct input of the targets, in the order of execution.

    Between two items the consumer replaces the item's members in the model (``model.set_submodule(name, module)``, or
    new values in their weights) by what the compressed model will hold; members left alone count as kept dense. For a
    Llama block the items are the inputs of q/k/v, o, gate/up and down.

    Parameters
    ----------
    model
        The original model. It runs in eval mode while the generator lives.
    targets
        Layers in the decoder blocks.
    ids
        Token ids [n_samples, length], integer.
    batch_size
        Sequences per forward pass.
    held_back
        Number of windows, the last ones, whose moments are kept apart to choose the shrinkage. 0 to n_samples - 1.
    finished
        Replacements that exist already, by name (a resumed run). They are set in the model when their block is
        reached and are not members of any item: put none of them into the model before.
    folder
        Where the hidden states of both streams lie as mapped files; None for memory.
    progress
        Called with (finished batches, all batches) over all inputs.

    Yields
    ------
    SequentialInput

    Raises
    ------
    InputError
        A target lies outside the blocks or does not see every token exactly once (routed experts): its rows in the
        two streams cannot be paired. An activation is not finite. Ids or numbers do not fit.
    BlockwiseError
        The model cannot be run block by block.

    Notes
    -----
    Memory beside the model: two streams of hidden states (4 n_samples length features bytes each), a copy of one
    block, 24 d_in^2 bytes of moments (twice that with windows held back) and as much in gathered rows at most.
    Time: for each input both streams run through the block up to it, and once more to leave the block, about six
    ordinary forward passes in all for four inputs per block. Deterministic for a given thread count.
    """
    if not 0 <= held_back < max(ids.shape[0], 1):
        raise InputError(
            f"held_back must leave a window for the fit: expected 0 to {ids.shape[0] - 1}, got {held_back}"
        )
    for target in targets:
        if target.block is None:
            raise InputError(
                f"{target.name} lies outside the decoder blocks: sequential calibration cannot reach it, ignore it"
            )
    unknown = set(finished or ()) - {target.name for target in targets}
    if unknown:
        raise InputError(f"finished holds {min(unknown)!r}, which is none of the targets")
    if not targets:
        return iter(())
    settings = _Settings(ids, batch_size, ids.shape[0] - held_back, folder)
    return _collect(model, targets, settings, dict(finished or {}), progress)


@dataclass(frozen=True, eq=False)
class _Settings:
    """How the windows are run: in batches, `n_fit` of them for the fit and the others held back."""

    ids: Tensor
    batch_size: int
    n_fit: int
    folder: Path | None


def _collect(
    model: nn.Module,
    targets: Sequence[TargetLinear],
    settings: _Settings,
    finished: dict[str, nn.Module],
    progress: Progress | None,
) -> Iterator[SequentialInput]:
    was_training = model.training
    model.eval()
    try:
        decoder = BlockwiseDecoder(model)
        _check_every_token(model, targets, settings.ids)
        inputs = _inputs_by_block(input_groups(model, targets, settings.ids), targets, finished)
        original = BlockStream(
            decoder, settings.ids, batch_size=settings.batch_size, folder=settings.folder
        )
        compressed = original.fork()
        n_batches = len(list(original.batches()))
        total = n_batches * sum(len(groups) for groups in inputs.values())
        done = 0
        last = max(target.block or 0 for target in targets)
        for index in range(last + 1):
            pair = _StreamPair(original, compressed, decoder.names[index], model)
            for name, module in finished.items():
                if name.startswith(pair.prefix):
                    model.set_submodule(name, module)
            for group in inputs.get(index, ()):
                moments = _PairedMoments(group, settings.n_fit, decoder.device)
                for part in original.batches():
                    moments.add(part, *pair.inputs(group.key, part))
                    done += 1
                    if progress is not None:
                        progress(done, total)
                # yielded at once: a local name would keep the moments alive while the consumer works
                yield SequentialInput(index, list(group.members), *moments.finish())
            if index < last:
                pair.advance()
    finally:
        model.train(was_training)


class _StreamPair:
    """Both streams in front of one block; the original one keeps a copy of it as it is now."""

    def __init__(
        self, original: BlockStream, compressed: BlockStream, name: str, model: nn.Module
    ) -> None:
        self.prefix = name + "."
        self._original = original
        self._compressed = compressed
        self._model = model
        self._copy = copy.deepcopy(model.get_submodule(name))

    def inputs(self, name: str, part: slice) -> tuple[Tensor, Tensor]:
        """Return X and X' that enter a module for one batch, each [samples, length, d_in]."""
        unchanged = self._copy.get_submodule(name.removeprefix(self.prefix))
        current = self._model.get_submodule(name)
        x = _entering(name, unchanged, self._original, part, self._copy)
        compressed_x = _entering(name, current, self._compressed, part, None)
        return x, compressed_x

    def advance(self) -> None:
        """Bring both streams behind the block."""
        self._original.advance(self._copy)
        self._compressed.advance()


def _entering(
    name: str, module: nn.Module, stream: BlockStream, part: slice, block: nn.Module | None
) -> Tensor:
    found: list[Tensor] = []

    def observer(_name: str, x: Tensor) -> None:
        found.append(x)
        raise StopForward

    with observe_inputs({name: module}, observer), suppress(StopForward):
        stream.run(part, block)
    n_samples, length = part.stop - part.start, stream.hidden.shape[1]
    if not found or found[0].shape[:-1].numel() != n_samples * length:
        raise _unpaired(name)
    return found[0].reshape(n_samples, length, -1)


class _PairedMoments:
    """Sums of one input's moments over the batches, of the fit and the held-back windows."""

    def __init__(self, group: InputGroup, n_fit: int, device: torch.device) -> None:
        self._n_fit = n_fit
        self._fit = _MomentSums(group, device)
        self._held_back = _MomentSums(group, device)

    def add(self, part: slice, x: Tensor, compressed_x: Tensor) -> None:
        n_fit = min(max(self._n_fit - part.start, 0), x.shape[0])
        self._fit.add(x[:n_fit], compressed_x[:n_fit])
        self._held_back.add(x[n_fit:], compressed_x[n_fit:])

    def finish(self) -> tuple[Moments, Moments | None]:
        moments = self._fit.finish()
        assert moments is not None  # at least one window is for the fit
        return moments, self._held_back.finish()


class _MomentSums:
    """G', G and the cross moment; allocated by the first tokens."""

    def __init__(self, group: InputGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._sums: tuple[GramAccumulator, GramAccumulator, Tensor] | None = None

    def add(self, x: Tensor, compressed_x: Tensor) -> None:
        if x.shape[0] == 0:
            return
        d_in = self._group.d_in
        if self._sums is None:
            self._sums = (
                GramAccumulator(self._group.key, d_in, self._device),
                GramAccumulator(self._group.key, d_in, self._device),
                torch.zeros(d_in, d_in, dtype=torch.float64, device=self._device),
            )
        gram, original_gram, difference = self._sums
        rows, compressed_rows = x.reshape(-1, d_in).float(), compressed_x.reshape(-1, d_in).float()
        original_gram.add(rows)
        gram.add(compressed_rows)
        # X'^T (X - X') and not X'^T X: the correction is solved from C - G', which keeps its relative accuracy
        # where the streams are close, and is exactly zero where they are equal
        difference += compressed_rows.T @ (rows - compressed_rows)

    def finish(self) -> Moments | None:
        if self._sums is None:
            return None
        sums, self._sums = self._sums, None
        n_tokens = sums[0].n_tokens
        gram = sums[0].mean()
        return Moments(gram, sums[2].div_(n_tokens).add_(gram), sums[1].mean(), n_tokens)


def _inputs_by_block(
    groups: Sequence[InputGroup], targets: Sequence[TargetLinear], finished: Mapping[str, nn.Module]
) -> dict[int, list[InputGroup]]:
    """Sort the groups, without finished members, into their blocks; the order of execution stays."""
    block_of = {target.name: target.block for target in targets}
    inputs: dict[int, list[InputGroup]] = {}
    for group in groups:
        members: dict[int, list[str]] = {}
        for name in group.members:
            block = block_of[name]
            if name not in finished and block is not None:
                members.setdefault(block, []).append(name)
        for block, names in members.items():
            inputs.setdefault(block, []).append(
                InputGroup(names[0], tuple(names), group.d_in, block)
            )
    return inputs


def _check_every_token(model: nn.Module, targets: Sequence[TargetLinear], ids: Tensor) -> None:
    """Refuse targets that see some tokens only, or several times."""
    modules = {target.name: model.get_submodule(target.name) for target in targets}
    rows: dict[str, list[int]] = {name: [] for name in modules}
    tokens = probe_tokens(model, ids)
    with observe_inputs(modules, lambda name, x: rows[name].append(math.prod(x.shape[:-1]))):
        run_forward(decoder_with(model, modules.values()), tokens)
    for name, counts in rows.items():
        if counts != [tokens.numel()]:
            raise _unpaired(name)


def _unpaired(name: str) -> InputError:
    return InputError(
        f"{name} does not see every token exactly once (a routed expert, or a module that is called repeatedly): "
        "sequential calibration cannot pair its inputs; ignore it, or calibrate in one shot"
    )
