"""Weights of compressed layers in huge pages: a decoder reads all of them for every token.

With pages of 4 KiB the processor looks up an address for every 4 KiB that it reads, which virtual machines make dear:
linears of 2048 x 2048 and 8192 x 2048 took 1.3 times as long as from pages of 2 MiB.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator

import torch
from torch import nn

_PAGE_BYTES = 2 << 20
_LINE_BYTES = 64
_CHUNK_BYTES = 64 << 20
LEAST_BYTES = 16 << 20
"""Less than this is within reach of the processor's tables of small pages."""


def use_huge_pages(modules: Iterable[nn.Module], *, least_bytes: int = LEAST_BYTES) -> int:
    """Move the tensors of modules on the CPU into memory that the system may back by huge pages.

    Parameters
    ----------
    modules : iterable of nn.Module
        Their own parameters and buffers are moved, not those of modules inside. The tensors stay the same objects,
        with storages of their own; tied ones stay tied. Values do not change.
    least_bytes : int
        If there is less in all, nothing is done.

    Returns
    -------
    int
        Bytes moved; 0 where the system has no such pages (anything but Linux, or no memory for them).

    Notes
    -----
    Memory grows by some 64 MiB while it works. Tensors that share a storage with others are left where they are.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    tensors = list(_movable(modules))
    if sum(tensor.nbytes for tensor in tensors) < least_bytes:
        return 0
    return sum(_move(chunk) for chunk in _chunks(tensors))


def _movable(modules: Iterable[nn.Module]) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    for module in modules:
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        for tensor in own:
            is_whole = (
                tensor.device.type == "cpu"
                and tensor.is_contiguous()
                and 0 < tensor.nbytes == tensor.untyped_storage().nbytes()
            )
            if is_whole and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _chunks(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if chunk and size + tensor.nbytes > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += tensor.nbytes
    if chunk:
        yield chunk


def _move(tensors: list[torch.Tensor]) -> int:
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.nbytes // _LINE_BYTES) * _LINE_BYTES
    try:
        memory = mmap.mmap(-1, end + 2 * _PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # not enough memory, or a kernel without huge pages
        return 0
    view = memoryview(memory)
    start = -torch.frombuffer(view, dtype=torch.uint8).data_ptr() % _PAGE_BYTES
    for tensor, offset in zip(tensors, offsets, strict=True):
        begin = start + offset
        values = torch.frombuffer(view[begin : begin + tensor.nbytes], dtype=tensor.dtype)
        tensor.data = values.view(tensor.shape).copy_(tensor.detach())
    return sum(tensor.nbytes for tensor in tensors)
