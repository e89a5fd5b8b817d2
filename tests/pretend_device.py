"""Tensors that say they lie on another device and are computed on the CPU: device mistakes show where there is no GPU.

`pretended_device` opens a mode in which ``torch.device("pretend")`` works. A tensor there wraps a CPU tensor, and every
operator runs on what is wrapped. As on a GPU it is an error to mix such tensors with CPU tensors (of one dimension or
more); every value that Python reads from the device is counted, and so are the bytes of its tensors. torch's build for
the CPU has no device guard for ``cuda``, so the device is torch's place for back ends from outside; the code under test
asks for CPU or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return False  # nobody but these tests shall find the device

    def has_primary_context(self, dev_id: int) -> bool:
        return True

    def is_built(self) -> bool:
        return False


class _Module:
    """What ``torch.pretend`` is."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 0


_setup_privateuseone_for_python_backend(NAME, _Module(), _Hooks())
DEVICE = torch.device(NAME, 0)

_aten = torch.ops.aten
_MOVES = {_aten.copy_.default, _aten._to_copy.default}
_READS = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
}


class DeviceMistake(RuntimeError):
    """Something that fails on a GPU."""


class PretendTensor(torch.Tensor):
    """A tensor on the pretended device; `inner` holds its values on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendTensor:  # noqa: D102
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # a printed tensor must not read from the device
        return f"PretendTensor({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        copied = PretendTensor(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=self.requires_grad)
        memo[id(self)] = copied
        return copied

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise DeviceMistake(f"{func} outside of pretended_device")


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.peak_bytes = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}

    def hold(self, tensor: torch.Tensor) -> PretendTensor:
        """Place a CPU tensor on the device as it is; its storage counts until nobody has it any more."""
        storage = tensor.untyped_storage()
        known = self._held.get(storage._cdata)
        if known is None or known[0].expired():
            self._held = {k: item for k, item in self._held.items() if not item[0].expired()}
            self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._held.values()))
        return PretendTensor(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == NAME:
            kwargs["device"] = torch.device("cpu")
            kwargs["pin_memory"] = None
            on_device = True
        else:
            on_device = None if wanted is None else False
        wrappers: dict[int, PretendTensor] = {}
        plain: list[torch.Tensor] = []

        def unwrap(value):
            if isinstance(value, PretendTensor):
                wrappers[id(value.inner)] = value
                return value.inner
            if isinstance(value, torch.Tensor):
                plain.append(value)
            return value

        inner_args, inner_kwargs = tree_map(unwrap, (args, kwargs))
        if wrappers and func not in _MOVES:
            for tensor in plain:
                if tensor.dim():
                    raise DeviceMistake(
                        f"{func}: a CPU tensor {list(tensor.shape)} among tensors on {DEVICE}"
                    )
        if wrappers:
            self.calls[str(func)] += 1
            if func in _READS:
                self.reads[str(func)] += 1
        result = func(*inner_args, **inner_kwargs)
        is_fetched = func is _aten._to_copy.default and on_device is False
        if wrappers and (
            is_fetched or (func is _aten.copy_.default and type(args[0]) is torch.Tensor)
        ):
            self.reads[f"{func} to the CPU"] += 1
        if func is _aten.copy_.default:
            return args[0]
        if on_device is None:
            on_device = bool(wrappers)

        def wrap(value):
            if not isinstance(value, torch.Tensor):
                return value
            known = wrappers.get(id(value))
            if known is not None:  # written in place
                if known.shape != value.shape:
                    raise DeviceMistake(f"{func}: changes the shape in place")
                return known
            return self.hold(value) if on_device else value

        return tree_map(wrap, result)


@contextmanager
def pretended_device() -> Iterator[_Mode]:
    """Open the mode.

    Its ``reads`` counts by operator how often values were read from the device; ``peak_bytes`` is the most that its
    tensors held at a time, workspaces inside of an operator not counted.
    """
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    mode = _Mode()
    try:
        with mode:
            yield mode
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def to_device(value: torch.Tensor) -> torch.Tensor:
    """Return a copy on the pretended device."""
    return PretendTensor(value.clone())
