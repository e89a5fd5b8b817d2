"""Running tokens backwards: gradients of the model's own prediction with respect to layer outputs.

Labels are drawn from the model, so that the mean of squared gradients is the Fisher information of its prediction and
no label of the text enters. Parameters stay frozen; gradients begin at the embeddings.

Between two decoder blocks a gradient is as large as the hidden states. So only these are kept, each block runs once
more with what its gradients need, and the memory is that of one block (Chen et al., arXiv 1604.06174) and of the
logits of some tokens. That is also how a model runs backwards whose blocks are in files
(`cospadi.calibration.streamed_backward`), to the same bits. Models that do not run block by block run as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from cospadi.calibration.blockwise import BlockwiseDecoder, BlockwiseError
from cospadi.calibration.ids import check_ids
from cospadi.errors import InputError
from cospadi.model.discover import input_embeddings

BATCH_TOKENS = 1024
"""Tokens per backward pass."""

HEAD_VALUES, HEAD_TOKENS = 1 << 21, 32
"""Logits at a time, and tokens at least: the head is read once for all of them."""

LARGE_VOCABULARY = 1 << 18
"""Where a model does not say how large its own is."""

GradientObserver = Callable[[Tensor, Tensor], None]
"""Receives a layer's input ``[tokens, d_in]`` and the gradient at its output ``[tokens, d_out]``."""

Progress = Callable[[int, int], None]


def run_backwards(
    model: nn.Module,
    observers: Mapping[str, GradientObserver],
    ids: Tensor,
    *,
    seed: int,
    progress: Progress | None = None,
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
    batches = backward_batches(model, ids)
    if not observers:
        return
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        decoder = _prepared(model, observers, [ids[batches[0]], ids[batches[-1]]])
        with ExitStack() as hooks:
            if decoder is None:
                _start_at_embeddings(model, hooks)
                hooks.enter_context(watched(model, observers))
            for number, part in enumerate(batches):
                batch = ids[part].to(next(model.parameters()).device)
                if decoder is None:
                    _run_whole(model, batch, generator)
                else:
                    _run_blocks(decoder, observers, batch, generator)
                if progress is not None:
                    progress(number + 1, len(batches))
    finally:
        model.train(was_training)


def backward_batches(model: nn.Module, ids: Tensor) -> list[slice]:
    """Samples of each backward pass over token ids ``[n_samples, length]``; `InputError` as `run_backwards`."""
    if ids.ndim != 2:
        raise InputError(f"calibration ids must be [n_samples, length], got {list(ids.shape)}")
    check_ids(model, ids, length=ids.shape[1])
    size = max(1, BATCH_TOKENS // ids.shape[1])
    return [slice(n, min(n + size, len(ids))) for n in range(0, len(ids), size)]


@contextmanager
def watched(model: nn.Module, observers: Mapping[str, GradientObserver]) -> Iterator[None]:
    """Hand inputs and gradients of modules to their observers in every backward pass while the context lasts."""

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

    with ExitStack() as stack:
        for name, observe in observers.items():
            hook = model.get_submodule(name).register_forward_hook(watch(name, observe))
            stack.callback(hook.remove)
        yield


def head_gradient(
    decoder: BlockwiseDecoder, hidden: Tensor, ids: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient of the summed loss at the hidden states ``[batch, length, features]`` that leave the last block."""
    weight = getattr(input_embeddings(decoder.model), "weight", None)
    vocabulary = LARGE_VOCABULARY if weight is None else weight.shape[0]
    step = max(HEAD_TOKENS, HEAD_VALUES // vocabulary)
    gradient = torch.empty_like(hidden)
    for sample in range(hidden.shape[0]):
        for start in range(0, hidden.shape[1], step):
            place = slice(sample, sample + 1), slice(start, start + step)
            part = hidden[place].detach().clone().requires_grad_()
            with torch.enable_grad():
                _loss(decoder.logits(part, ids[place]), generator).backward()
            assert part.grad is not None
            gradient[place] = part.grad
    return gradient


def block_gradient(
    decoder: BlockwiseDecoder, index: int, hidden: Tensor, gradient: Tensor
) -> Tensor:
    """Gradient at a block's input from that at its output, both ``[batch, length, features]``."""
    start = hidden.detach().requires_grad_()
    with torch.enable_grad():
        # a copy, since the block may write to its input
        output = decoder.run(index, start.clone(), with_gradients=True)
        output.backward(gradient)
    assert start.grad is not None
    return start.grad


def _prepared(
    model: nn.Module, observers: Mapping[str, GradientObserver], batches: list[Tensor]
) -> BlockwiseDecoder | None:
    """The decoder, ready for batches of these shapes; None where the model has to run as a whole."""
    try:
        decoder = BlockwiseDecoder(model)
        inside = tuple(f"{name}." for name in decoder.names)
        if not all(name.startswith(inside) for name in observers):
            return None
        for batch in batches:
            decoder.prepare(batch)
    except (BlockwiseError, InputError):
        return None
    return decoder


def _run_blocks(
    decoder: BlockwiseDecoder,
    observers: Mapping[str, GradientObserver],
    ids: Tensor,
    generator: torch.Generator,
) -> None:
    depths = [decoder.first_hidden(ids)]
    for index in range(len(decoder.names)):
        depths.append(decoder.run(index, depths[index].clone()))
    gradient = head_gradient(decoder, depths.pop(), ids, generator)
    needed = [name for name in decoder.names if any(o.startswith(f"{name}.") for o in observers)]
    with watched(decoder.model, observers):
        for index in range(len(decoder.names) - 1, decoder.names.index(needed[0]) - 1, -1):
            gradient = block_gradient(decoder, index, depths.pop(), gradient)


def _start_at_embeddings(model: nn.Module, hooks: ExitStack) -> None:
    embeddings = input_embeddings(model)
    if embeddings is None:
        raise InputError(f"{type(model).__name__} names no input embeddings to run backwards to")
    start = embeddings.register_forward_hook(
        lambda _module, _inputs, output: output.detach().requires_grad_()
    )
    hooks.callback(start.remove)


def _run_whole(model: nn.Module, ids: Tensor, generator: torch.Generator) -> None:
    with torch.enable_grad():
        _loss(model(input_ids=ids, use_cache=False).logits, generator).backward()


def _loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Summed loss of the logits ``[..., vocabulary]`` for labels drawn from them."""
    logits = logits.reshape(-1, logits.shape[-1]).float()
    # both are NaN where one is; a mask would be as large as the logits
    if not bool(torch.isfinite(logits.amin()) & torch.isfinite(logits.amax())):
        raise InputError("the model's logits are not finite on the calibration text")
    with torch.no_grad():
        drawn = draw_labels(logits, generator)
    return nn.functional.cross_entropy(logits, drawn, reduction="sum")


def draw_labels(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row of finite logits ``[tokens, vocabulary]``, by its probability; int64 ``[tokens]``.

    One uniform number per token, found in the running sum of its probabilities: `torch.multinomial` draws one for every
    word of the vocabulary, which took as long as the logits themselves.
    """
    sums = logits.softmax(-1).double().cumsum_(-1)  # in place: the largest tensors of a pass
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator)
    # above zero, so that no word without probability is found; rounding keeps the last sum from being one
    wanted = (1.0 - uniform).to(sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, wanted)[:, 0]
