"""How far the coordinator runs ahead of the workers: tasks lie on the disk with their Grams, gigabytes each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cospadi.pipeline.disk import free_bytes

MOST_AHEAD_BYTES = 16 << 30
"""Queued tasks up to which nobody asks whether workers wait for more."""


def disk_share(folder: Path) -> int:
    """What queued tasks may take of a disk: a quarter of what is free there, in bytes."""
    return free_bytes(folder) // 4


def has_room(
    n_bytes: int,
    most_bytes: int,
    n_free: Callable[[], int],
    n_workers: Callable[[], int],
) -> bool:
    """Whether another task may be queued.

    Parameters
    ----------
    n_bytes : int
        Of the queued tasks.
    most_bytes : int
        Bound that holds whatever the workers do (`disk_share`).
    n_free : callable
        Queued tasks that no worker has begun.
    n_workers : callable
        Workers that are there. Beyond `MOST_AHEAD_BYTES` there is room while fewer tasks are free than that: every one
        of them finds its next task, and more would only lie there.
    """
    if n_bytes > most_bytes:
        return False
    return n_bytes <= MOST_AHEAD_BYTES or n_free() < n_workers()
