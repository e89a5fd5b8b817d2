"""Whether a disk has room for what a run will write to it."""

from __future__ import annotations

import os
from pathlib import Path


def free_bytes(folder: Path) -> int:
    """What this user may still write to the disk of a folder."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


def shortage(folder: Path, n_bytes: int) -> str | None:
    """What to say if a run that keeps its work in a folder may write more than its disk takes; None if it has room.

    Parameters
    ----------
    folder : Path
        The work directory; the output lies beside it. What is in it already, of a run that is resumed, counts.
    n_bytes : int
        Of work and output together.
    """
    free = free_bytes(folder)
    there = sum(file.lstat().st_size for file in folder.rglob("*"))
    if n_bytes - there <= free:
        return None
    return (
        f"disk: up to {max(0, n_bytes - there) / 1e6:.0f} MB will be written to {folder.parent} and "
        f"{free / 1e6:.0f} MB are free there: a run that finds no room ends with an error (finished fits are kept, the "
        "same command goes on)"
    )
