"""A model on another device for a while: all of it, or one decoder block at a time where it does not fit.

The model's own tensors stay where they are and come back when the placement ends, so nothing is copied back. While it
lasts, the embeddings and what else lies outside of the decoder blocks are on the device (a head that only calibration
does without included), and every block is there while it runs; for gradients until they are computed, since the graph
holds what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from cospadi.errors import InputError
from cospadi.model.discover import decoder_blocks

RESIDENT_SHARE = 0.5
"""Share of a GPU's free memory that a model may take and still lie there as a whole: fits need the rest."""


class Placement:
    """What `placed` yields.

    Attributes
    ----------
    device : torch.device
        Where the model computes.
    is_resident : bool
        Whether all of the model lies there at once.
    """

    def __init__(self, device: torch.device, is_resident: bool) -> None:
        self.device = device
        self.is_resident = is_resident
        self._held: nn.Module | None = None
        self._blocks: dict[int, _Moved] = {}

    @contextmanager
    def hold(self, block: nn.Module) -> Iterator[None]:
        """Keep a decoder block on the device while the context lasts, instead of moving it for every call."""
        moved = self._blocks.get(id(block))
        if moved is None:
            yield
            return
        moved.enter()
        self._held = block
        try:
            yield
        finally:
            self._held = None
            moved.leave()

    def _watch(self, block: nn.Module, hooks: ExitStack) -> None:
        moved = self._blocks[id(block)] = _Moved(block, self.device)

        def before(*_: object) -> None:
            if "forward" not in block.__dict__:  # what only hands its input on needs no weights
                moved.enter()

        def after(*_: object) -> None:
            if self._held is not block:
                moved.leave()

        hooks.callback(block.register_forward_pre_hook(before, prepend=True).remove)
        # also after an exception: a pass that stops early must not leave its block behind
        hooks.callback(block.register_forward_hook(after, always_call=True).remove)
        hooks.callback(moved.leave)


class _Moved:
    """Parameters and buffers of a module and of its parts, on a device or in their own place."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._own: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []

    def enter(self, without: frozenset[int] = frozenset()) -> None:
        """Move what is not there yet, but for the modules whose ids are in `without`."""
        if self._own:
            return
        copies: dict[int, torch.Tensor] = {}  # tied weights stay one
        for module in _parts(self._module, without):
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    self._own.append((tensors, name, tensor))  # type: ignore[arg-type]
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copy(tensor, self._device)
                    tensors[name] = copies[id(tensor)]  # type: ignore[assignment]

    def leave(self) -> None:
        for tensors, name, tensor in self._own:
            tensors[name] = tensor
        self._own.clear()


def _parts(module: nn.Module, without: frozenset[int]) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if id(child) not in without:
            yield from _parts(child, without)


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(moved, requires_grad=tensor.requires_grad)
    return moved


@contextmanager
def placed(
    model: nn.Module,
    device: torch.device | None,
    *,
    whole: bool = False,
    free_bytes: int | None = None,
) -> Iterator[Placement]:
    """Let a model compute on a device while the context lasts.

    Parameters
    ----------
    model
        Causal language model. Its modules must not be replaced meanwhile.
    device
        None or the model's own device: nothing happens.
    whole
        Refuse to move block by block: for passes that need all blocks at once.
    free_bytes
        Memory to reckon with; the device's own answer by default, no bound where it has none.

    Yields
    ------
    Placement

    Raises
    ------
    InputError
        The model does not fit as a whole, and `whole` asks for that or it names no decoder blocks.
    """
    own = next(model.parameters()).device
    if device is None or device == own or (device.index is None and device.type == own.type):
        yield Placement(own, True)
        return
    if free_bytes is None and device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(device)[0]
    needed = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    fits = free_bytes is None or needed <= RESIDENT_SHARE * free_bytes
    blocks = [] if fits else [block for _, block in decoder_blocks(model)]
    if not fits and (whole or not blocks):
        raise InputError(
            f"device {device}: the model's {needed} bytes are more than {RESIDENT_SHARE:.0%} of the {free_bytes} that "
            "are free, and this step needs all of it at once; use the CPU, or reconstruction=none without sequential"
        )
    placement = Placement(device, fits)
    rest = _Moved(model, device)
    with ExitStack() as stack:
        stack.callback(rest.leave)
        rest.enter(frozenset(id(block) for block in blocks))
        for block in blocks:
            placement._watch(block, stack)
        yield placement
