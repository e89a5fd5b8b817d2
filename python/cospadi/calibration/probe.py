"""What a change of a weight does to the model's prediction, measured layer by layer.

To second order the Kullback-Leibler divergence of the changed model's next token from the original's is half the mean
square of ``<gradient, change of the outputs>``. Here every token's part of it is squared by itself: what several tokens
do together to one prediction is left out (2 to 10 % of the sum on SmolLM2-135M), which makes a few ten thousand tokens
enough, and no factorisation is assumed. One backward pass serves all layers and several changes of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from cospadi.calibration.backward import GradientObserver, run_backwards
from cospadi.calibration.streamed_backward import run_streamed_backwards
from cospadi.model.streamed import StreamedSource

PROBE_BYTES = 4 << 30
"""Most bytes of changes (bfloat16) that are held for one backward pass."""


def measure_losses(
    model: nn.Module | StreamedSource,
    changes: Mapping[str, Sequence[Tensor]],
    ids: Tensor,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Loss that each change of each weight would cause alone, to second order.

    Parameters
    ----------
    model
        Causal language model with frozen parameters, or one in files.
    changes
        By module name: changes ``[d_out, d_in]`` of its weight, any floating type. They are asked for batch by batch,
        those of one decoder block after those of another.
    ids
        Token ids [n_samples, length], integer.
    seed
        Of the labels drawn from the model.
    folder
        Existing folder for the hidden states of a model in files.
    progress
        Called with (finished batches, all batches).

    Returns
    -------
    dict
        Nats per token, in the order of the changes.

    Raises
    ------
    InputError
        A gradient is not finite, or ids do not fit the model.
    """
    sums: dict[str, list[float]] = {}

    def observer(name: str) -> GradientObserver:
        def observe(rows: Tensor, gradient: Tensor) -> None:
            sums.setdefault(name, [0.0] * len(changes[name]))
            for index, change in enumerate(changes[name]):
                moved = rows.float() @ change.to(rows.device).float().T
                sums[name][index] += float((moved * gradient).sum(1).double().square().sum())

        return observe

    observers = {name: observer(name) for name in changes}
    if isinstance(model, StreamedSource):
        assert folder is not None
        run_streamed_backwards(model, observers, ids, seed=seed, folder=folder, progress=progress)
    else:
        run_backwards(model, observers, ids, seed=seed, progress=progress)
    # what no token reached costs nothing
    found = {name: sums.get(name) or [0.0] * len(changes[name]) for name in changes}
    return {name: [0.5 * value / ids.numel() for value in values] for name, values in found.items()}
