"""Fisher information of layer outputs: what an error of an output costs the model's prediction.

For a layer ``y = x W`` and a change ``dW`` of its weight, the Kullback-Leibler divergence of the changed model's next
token from the original's is, to second order and with the usual factorisation (K-FAC: Martens and Grosse, arXiv
1503.05671), per token::

    1/2 trace(F dW G dW^T)        dW [d_out, d_in],  G = mean x x^T,  F = mean g g^T,

g being the gradient of the summed loss with respect to y, for labels drawn from the model itself (the true Fisher: no
label of the text enters). The activation Gram alone takes F to be the identity; F knows in addition which outputs, and
which mixtures of them, later layers listen to.

The factorisation takes inputs and gradients for independent. Where a few tokens carry most of the gradient they are
not: values of attention sinks (the first token of a text) are read by every later token, their inputs look like no
other's, and both averages are dominated by the wrong tokens (three value projections of SmolLM2-135M: 40 to 500 of
20,000 tokens have as much gradient as would be even; the other projections looked at: a quarter of them or more). For
such layers the two factors are the first step of the power iteration towards the best Kronecker approximation instead:
``mean |g|^2 x x^T`` and ``mean (x^T G x) g g^T`` (Tseng et al., arXiv 2505.22988, iterate on whole sequences).

The diagonal of F alone is a thousandth of the memory, needs no matrix product, and is known from fewer tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cospadi.calibration.backward import BATCH_TOKENS, GradientObserver, run_backwards
from cospadi.calibration.cache import GramCache, gram_fingerprint
from cospadi.calibration.capture import InputGroup
from cospadi.calibration.statistics import ActivationGram, Progress, plan_passes
from cospadi.calibration.streamed_backward import StreamedBackward
from cospadi.errors import CheckpointError, InputError
from cospadi.model.discover import TargetLinear
from cospadi.model.streamed import StreamedSource

VERSION = 3
"""Of the way matrices are computed: a change is a new number, so that stored ones are not used."""

CONCENTRATED = 0.1
"""A gradient is concentrated where less than this share of the tokens, if they were even, would have as much of it."""


@dataclass(eq=False)
class FisherPass:
    """Result of one pass over the tokens.

    Attributes
    ----------
    index, n_passes
        Number of this pass (from 0) and of all passes.
    matrices
        ``F [d_out, d_out]`` float32 by module name, or its diagonal ``[d_out]`` where that was asked for: sum of
        ``g g^T`` over all tokens that reached the module, divided by `n_tokens`; with weights ``x^T G x`` of mean one
        where the gradient is concentrated.
    weighted_grams
        ``[d_in, d_in]`` float32 sum of ``|g|^2 x x^T`` divided by `n_tokens`, of the modules where it is.
    n_tokens
        Tokens of the pass.
    seconds
        Duration.
    """

    index: int
    n_passes: int
    matrices: dict[str, Tensor]
    weighted_grams: dict[str, Tensor]
    n_tokens: int
    seconds: float


def collect_fisher(
    model: nn.Module | StreamedSource,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    *,
    seed: int = 0,
    is_diagonal: bool = False,
    max_bytes: int | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[FisherPass]:
    """Run tokens forwards and backwards through the model and collect the Fisher matrices of the targets' outputs.

    Parameters
    ----------
    model
        Causal language model with frozen parameters, or one in files (`StreamedBackward`): to the same bits.
    targets
        Layers whose outputs are wanted.
    ids
        Token ids [n_samples, length], integer.
    seed
        Of the labels drawn from the model.
    is_diagonal
        Whether diagonals are enough.
    max_bytes
        Bound on the matrices held at a time; above it the tokens are streamed several times. None means one pass, or on
        a GPU a quarter of its free memory.
    folder
        Existing folder for the hidden states of a model in files.
    progress
        Called with (finished batches, all batches of all passes).

    Yields
    ------
    FisherPass
        Together they name every target once; a target that no token reached has a zero matrix.

    Raises
    ------
    InputError
        A gradient is not finite (names the module), ids do not fit the model, one matrix exceeds `max_bytes`, or
        `folder` cannot hold the hidden states.
    """
    if not targets:
        return
    if isinstance(model, StreamedSource):
        assert folder is not None
        yield from _collect_streamed(
            model, targets, ids, seed, is_diagonal, max_bytes, folder, progress
        )
        return
    device = next(model.parameters()).device
    if max_bytes is None and device.type == "cuda":
        max_bytes = torch.cuda.mem_get_info(device)[0] // 4
    passes = _passes(targets, is_diagonal, max_bytes)

    def offset(index: int) -> Progress | None:
        if progress is None:
            return None
        return lambda done, total: progress(index * total + done, len(passes) * total)

    for index, part in enumerate(passes):
        sums = _Sums(part, device, is_diagonal=is_diagonal)
        run_backwards(model, sums.observers, ids, seed=seed, progress=offset(index))
        yield sums.finished(index, len(passes), ids.numel())
        del sums


def _collect_streamed(
    source: StreamedSource,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    seed: int,
    is_diagonal: bool,
    max_bytes: int | None,
    folder: Path,
    progress: Progress | None,
) -> Iterator[FisherPass]:
    """Matrices of the last block first; a block whose matrices are too many at a time runs several times."""
    outside = next((target.name for target in targets if target.block is None), None)
    if outside is not None:
        raise InputError(f"{outside} lies outside the decoder blocks: ignore it")
    passes = {
        index: _passes([t for t in targets if t.block == index], is_diagonal, max_bytes)
        for index in {target.block for target in targets}
    }
    first, n_passes, n_done = min(i or 0 for i in passes), sum(map(len, passes.values())), 0
    with StreamedBackward(source, ids, seed=seed, folder=folder, progress=progress) as backward:
        for index in range(backward.n_blocks - 1, first - 1, -1):
            parts = passes.get(index, [[]])
            for number, part in enumerate(parts):
                sums = _Sums(part, torch.device("cpu"), is_diagonal=is_diagonal)
                backward.run(sums.observers, moves_on=number == len(parts) - 1 and index > first)
                if part:
                    yield sums.finished(n_done, n_passes, ids.numel())
                    n_done += 1
                del sums


def _passes(
    targets: Sequence[TargetLinear], is_diagonal: bool, max_bytes: int | None
) -> list[list[TargetLinear]]:
    """Targets whose matrices are held at a time."""
    by_name = {target.name: target for target in targets}
    passes = plan_passes(
        # beside its diagonal a matrix takes nothing, but the Gram of its input may be needed
        [_group(t, t.d_in if is_diagonal else t.d_out) for t in targets],
        None if max_bytes is None else 2 * max_bytes,  # the planner counts fp64
    )
    return [[by_name[group.key] for group in part] for part in passes]


class _Sums:
    """Of the targets of a pass."""

    def __init__(
        self, targets: Sequence[TargetLinear], device: torch.device, *, is_diagonal: bool
    ) -> None:
        self._started = time.perf_counter()
        self._found = {
            t.name: _Accumulator(t.d_out, device, is_diagonal=is_diagonal) for t in targets
        }

    @property
    def observers(self) -> dict[str, GradientObserver]:
        return {name: item.observe for name, item in self._found.items()}

    def finished(self, index: int, n_passes: int, n_tokens: int) -> FisherPass:
        found = self._found
        return FisherPass(
            index,
            n_passes,
            {name: item.matrix.div_(n_tokens) for name, item in found.items()},
            {n: item.gram.div_(n_tokens) for n, item in found.items() if item.gram is not None},
            n_tokens,
            time.perf_counter() - self._started,
        )


class _Accumulator:
    """Sums over the tokens of one module; the first batch decides whether its gradient is concentrated."""

    def __init__(
        self, d_out: int, device: torch.device | None = None, *, is_diagonal: bool = False
    ) -> None:
        shape = (d_out,) if is_diagonal else (d_out, d_out)
        self.matrix = torch.zeros(shape, dtype=torch.float32, device=device)
        self.gram: Tensor | None = None
        self._started = False

    def observe(self, rows: Tensor, gradient: Tensor) -> None:
        """Add a batch: inputs ``[tokens, d_in]`` and gradients ``[tokens, d_out]``."""
        rows = rows.float()
        energies = gradient.square().sum(1)
        if not self._started:
            self._started = True
            even = float(energies.sum() ** 2 / energies.square().sum().clamp_min(1e-38))
            if even < CONCENTRATED * rows.shape[0]:
                self.gram = rows.new_zeros((rows.shape[1], rows.shape[1]))
        if self.gram is None:
            self._add(gradient, gradient)
            return
        self.gram.addmm_((rows * energies[:, None]).T, rows)
        typical = ((rows @ (rows.T @ rows)) * rows).sum(1)
        typical /= typical.mean().clamp_min(1e-38)
        self._add(gradient * typical[:, None], gradient)

    def _add(self, weighted: Tensor, gradient: Tensor) -> None:
        if self.matrix.ndim == 1:
            self.matrix.add_((weighted * gradient).sum(0))
        else:
            self.matrix.addmm_(weighted.T, gradient)


class FisherStore:
    """Fisher matrices of one model and token sample on disk, made once and read one by one.

    Parameters
    ----------
    folder
        Made if absent; may be that of the Gram cache.
    model, ids
        As for `collect_fisher`.
    weights
        What identifies the model's weights: ``SourceModel.fingerprint``.
    seed
        Of the labels.
    is_diagonal
        Whether only diagonals are collected and kept.
    spill
        `folder` of `collect_fisher`.

    Raises
    ------
    InputError
        The folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module | StreamedSource,
        ids: Tensor,
        *,
        weights: str,
        seed: int,
        is_diagonal: bool = False,
        spill: Path | None = None,
    ) -> None:
        self._model, self._ids, self._seed, self._spill = model, ids, seed, spill
        self._is_diagonal = is_diagonal
        is_streamed = isinstance(model, StreamedSource)
        fingerprint = gram_fingerprint(
            model.model if isinstance(model, StreamedSource) else model,
            ids,
            weights=weights,
            batch_size=BATCH_TOKENS,
            device=torch.device("cpu") if is_streamed else None,
        )
        kind = f"fisher {VERSION}{' diagonal' if is_diagonal else ''}"
        self._cache = GramCache(folder, f"{kind} {seed} {fingerprint}")

    def prepare(
        self,
        targets: Sequence[TargetLinear],
        *,
        max_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> float:
        """Collect and store what is missing; returns the seconds it took. Errors as `collect_fisher`, and OSError."""
        missing = [target for target in targets if not self._readable(target)]
        seconds = 0.0
        for finished in collect_fisher(
            self._model,
            missing,
            self._ids,
            seed=self._seed,
            is_diagonal=self._is_diagonal,
            max_bytes=max_bytes,
            folder=self._spill,
            progress=progress,
        ):
            seconds += finished.seconds
            for name in list(finished.matrices):
                # the weighted Gram first: where the Fisher matrix is, both are
                if name in finished.weighted_grams:
                    gram = finished.weighted_grams.pop(name).double()
                    key = _weighted_key(name)
                    self._cache.write(ActivationGram(gram, finished.n_tokens, 0, [key]))
                matrix = finished.matrices.pop(name).double()
                if self._is_diagonal:
                    self._cache.write_vector(name, matrix, finished.n_tokens)
                else:
                    self._cache.write(ActivationGram(matrix, finished.n_tokens, 0, [name]))
        return seconds

    def load(self, target: TargetLinear) -> Tensor:
        """``F [d_out, d_out]`` float64 of a prepared target; `CheckpointError` if its file is damaged or absent."""
        return self._cache.read(_group(target, target.d_out), torch.device("cpu")).gram

    def load_diagonal(self, target: TargetLinear) -> Tensor:
        """F's diagonal ``[d_out]`` float64 of a prepared target; errors as `load`."""
        if self._is_diagonal:
            return self._cache.read_vector(target.name, target.d_out)
        return self.load(target).diagonal()

    def load_weighted_gram(self, target: TargetLinear) -> Tensor | None:
        """``[d_in, d_in]`` float64 Gram weighted by the gradient, of a target where that is concentrated, else None."""
        key = _weighted_key(target.name)
        group = InputGroup(key, (key,), target.d_in, target.block)
        if not self._cache.holds(group):
            return None
        return self._cache.read(group, torch.device("cpu")).gram

    def _readable(self, target: TargetLinear) -> bool:
        if not self._cache.holds(_group(target, target.d_out)):
            return False
        try:
            self.load_diagonal(target)
            self.load_weighted_gram(target)
        except CheckpointError:
            return False
        return True


def _group(target: TargetLinear, size: int) -> InputGroup:
    """A matrix ``[size, size]`` of the target in the shape that the Gram cache and the planner of passes know."""
    return InputGroup(target.name, (target.name,), size, target.block)


def _weighted_key(name: str) -> str:
    return f"{name} weighted input"
