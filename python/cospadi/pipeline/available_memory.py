"""Memory that this process takes and may still take: the machine's, less what a control group withholds.

Containers and schedulers bound a job by a control group (cgroup), whose limit /proc/meminfo does not show. The group
is named in /proc/self/cgroup, for version 2 in the one line that starts with ``0::``, for version 1 in the line of the
controller ``memory``; every group above it binds as well. Inside a container the group may be mounted as the root of
/sys/fs/cgroup while /proc still tells its name outside: names that lead nowhere are skipped, the root is always read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """Where a version of control groups keeps its figures."""

    mount: str
    limit: str
    usage: str
    reclaimable: str


_VERSION_1 = _Files(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_VERSION_2 = _Files("", "memory.max", "memory.current", "inactive_file")


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Memory that this machine, or the control groups of this process, can still give."""
    found = list(_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))
    with suppress(OSError, IndexError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]))
    return min(found) if found else 1 << 62


def _left_in_groups(membership: Path, root: Path) -> Iterator[int]:
    """What each control group that binds this process has left, in bytes; groups without a limit are skipped.

    Pages of files that have not been used lately count as left: the kernel drops them before it refuses memory.
    """
    for files, group in _groups(membership, root):
        with suppress(OSError, ValueError):
            limit = int((group / files.limit).read_text())  # "max" without one, in version 2
            used = int((group / files.usage).read_text())
            yield max(0, limit - used + _reclaimable(group / "memory.stat", files.reclaimable))


def _groups(membership: Path, root: Path) -> Iterator[tuple[_Files, Path]]:
    names = []
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            number, controllers, name = line.split(":", 2)
            if number == "0" and not controllers:
                names.append((_VERSION_2, name))
            elif "memory" in controllers.split(","):
                names.append((_VERSION_1, name))
    for files, name in names:
        top = root / files.mount
        group = Path(os.path.normpath(top / name.strip("/")))
        while group != top and top in group.parents:
            yield files, group
            group = group.parent
        yield files, top


def _reclaimable(stat: Path, key: str) -> int:
    with suppress(OSError):
        for line in stat.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0
