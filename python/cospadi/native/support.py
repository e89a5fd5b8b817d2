"""Checks and error translation shared by the native functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cospadi.errors import InputError, NativeError


@contextmanager
def native_errors(function: str) -> Iterator[None]:
    """Map the extension's exceptions to cospadi's; MemoryError passes as it is."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{function}: {error}") from error
    except RuntimeError as error:
        raise NativeError(f"{function}: {error}") from error


def check_tensor(
    function: str,
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
    *,
    any_device: bool = False,
) -> None:
    """Raise `InputError` unless `tensor` is strided, has this shape (None: any size) and dtype, and is on `device`.

    Without `device`, on the CPU.
    """
    if not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{function}: {name}: expected a torch.Tensor, got {type(tensor).__name__}"
        )
    if device is not None:
        if tensor.device != device or tensor.layout != torch.strided:
            raise InputError(
                f"{function}: {name}: expected a strided tensor on {device}, got {tensor.layout} on {tensor.device}"
            )
    elif (
        not (tensor.is_cpu or (any_device and not tensor.is_meta)) or tensor.layout != torch.strided
    ):
        raise InputError(
            f"{function}: {name}: expected a strided CPU tensor, got {tensor.layout} on {tensor.device}; call .cpu()"
        )
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"{function}: {name}: expected {names}, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    matches = tensor.dim() == len(shape) and all(
        wanted is None or wanted == got for wanted, got in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        wanted_text = ", ".join("*" if size is None else str(size) for size in shape)
        raise InputError(
            f"{function}: {name}: expected shape [{wanted_text}], got {list(tensor.shape)}"
        )


def unit_stride_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` detached and with unit inner stride; a copy only where the layout asks for one."""
    tensor = tensor.detach()
    if (
        tensor.dim() == 2
        and tensor.numel() > 0
        and (tensor.stride(1) != 1 or tensor.stride(0) < tensor.shape[1])
    ):
        return tensor.contiguous()
    return tensor if tensor.dim() == 2 else tensor.contiguous()


def row_stride(tensor: torch.Tensor) -> int:
    """Row stride in elements; a single row may carry any stride, so it gets its length."""
    return max(tensor.stride(0), tensor.shape[1]) if tensor.shape[0] > 1 else tensor.shape[1]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set the threads of torch, which the native kernels follow, for a while and for this thread of Python alone."""
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def thread_count(num_threads: int | None) -> int:
    """Threads of a call: the caller's number, or torch's setting for None."""
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise InputError(f"num_threads: expected at least 1 or None, got {num_threads}")
    return num_threads
