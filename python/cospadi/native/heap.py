"""What becomes of freed memory: glibc returns large blocks to the system, and fresh pages cost time."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # <malloc.h>
_MOST_FROM_HEAP = 32 << 20
"""Largest threshold that glibc takes (half of HEAP_MAX_SIZE)."""


def bound_heap() -> None:
    """Let freed tensors go back to the system: glibc otherwise keeps what lies below its growing threshold."""
    _set(_M_ARENA_MAX, 1)
    _set(_M_MMAP_THRESHOLD, 1 << 20)
    _set(_M_TRIM_THRESHOLD, 128 << 10)
    _set(_M_TOP_PAD, 128 << 10)


def trim_heap() -> None:
    """Give back what small blocks left behind: between parts of a streamed run, tens of megabytes in milliseconds."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def keep_heap() -> None:
    """Keep freed tensors of up to 32 MiB for the next ones of this process.

    Activations of four windows are 25 MB and come and go at every layer; with pages fresh from the system each time a
    calibration pass took 8 to 12 % longer (SmolLM2-135M, one core of a virtual machine) and fits 3 %. Threads share one
    heap: the others that glibc makes for them give back what they can.
    """
    _set(_M_ARENA_MAX, 1)
    _set(_M_MMAP_THRESHOLD, _MOST_FROM_HEAP)
    _set(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    _set(_M_TOP_PAD, 64 << 20)


def _set(parameter: int, value: int) -> None:
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(parameter, value)
