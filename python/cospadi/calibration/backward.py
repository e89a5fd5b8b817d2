"""Running tokens backwards: gradients of the model's own prediction with respect to layer outputs.

Labels are drawn from the model, so that the mean of squared gradients is the Fisher information of its prediction and
no label of the text enters. Parameters stay frozen; gradients begin at the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from cospadi.calibration.ids import check_ids
from cospadi.errors import InputError

BATCH_TOKENS = 1024
"""Tokens per backward pass: its memory is that of the logits and of all activations."""

GradientObserver = Callable[[Tensor, Tensor], None]
"""Receives a layer's input ``[tokens, d_in]`` and the gradient at its output ``[tokens, d_out]``."""


def run_backwards(
    model: nn.Module,
    observers: Mapping[str, GradientObserver],
    ids: Tensor,
    *,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run all tokens forwards and backwards, and hand inputs and output gradients of modules to their observers.

    Parameters
    ----------
    model
        Causal language model with frozen parameters.
    observers
        By module name. The loss is summed over tokens, so gradients are those of single labels.
    ids
        Token ids [n_samples, length], integer.
    seed
        Of the labels.
    progress
        Called with (finished batches, all batches).

    Raises
    ------
    InputError
        A gradient (names the module) or a logit is not finite, ids do not fit the model, or it names no embeddings.
    """
    if ids.ndim != 2:
        raise InputError(f"calibration ids must be [n_samples, length], got {list(ids.shape)}")
    check_ids(model, ids, length=ids.shape[1])
    batches = torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with _watched(model, observers):
            for number, batch in enumerate(batches):
                _run_batch(model, batch, generator)
                if progress is not None:
                    progress(number + 1, len(batches))
    finally:
        model.train(was_training)


@contextmanager
def _watched(model: nn.Module, observers: Mapping[str, GradientObserver]) -> Iterator[None]:
    def watch(name: str, observe: GradientObserver) -> Callable[[nn.Module, object, Tensor], None]:
        def on_forward(_module: nn.Module, inputs: object, output: Tensor) -> None:
            assert isinstance(inputs, tuple)
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

            def on_gradient(gradient: Tensor) -> None:
                flat = gradient.detach().reshape(-1, gradient.shape[-1]).float()
                if not bool(torch.isfinite(flat).all()):
                    raise InputError(f"{name}: the gradient at its output is not finite")
                observe(rows, flat)

            output.register_hook(on_gradient)

        return on_forward

    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    if not isinstance(embeddings, nn.Module):
        raise InputError(f"{type(model).__name__} names no input embeddings to run backwards to")
    with ExitStack() as stack:
        start = embeddings.register_forward_hook(
            lambda _module, _inputs, output: output.detach().requires_grad_()
        )
        stack.callback(start.remove)
        for name, observe in observers.items():
            hook = model.get_submodule(name).register_forward_hook(watch(name, observe))
            stack.callback(hook.remove)
        yield


def _run_batch(model: nn.Module, ids: Tensor, generator: torch.Generator) -> None:
    device = next(model.parameters()).device
    with torch.enable_grad():
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1]).float()
        if not bool(torch.isfinite(logits).all()):
            raise InputError("the model's logits are not finite on the calibration text")
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, drawn.to(device), reduction="sum")
        loss.backward()
