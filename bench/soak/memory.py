"""Compress a model under a bound on memory and measure what it took, from outside.

    python bench/soak/memory.py MODEL --above 400 [--address-space | --cgroup] [-- arguments of cospadi compress]

prints the footprint of the interpreter with torch, sets ``--max-memory`` to it plus ``--above`` MB, and reports the
largest resident set of the run. With ``--address-space`` the kernel refuses more (RLIMIT_AS) than the address space of
that interpreter plus as much; with ``--cgroup`` (root) it kills the run where a control group of its own takes more
than that interpreter took in one, plus as much, and ``--max-memory`` is left to the program, which reads the group.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BASELINE = """
import torch
torch.ones(256, 256, dtype=torch.float64) @ torch.ones(256, 256, dtype=torch.float64)
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(lines["VmHWM"].split()[0], lines["VmPeak"].split()[0])
"""


GROUPS = (
    # Folder of a version of control groups, and its files of limit and peak.
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)


class Group:
    """A control group of its own for a child process."""

    def __init__(self, folder: Path, limit: str, peak: str) -> None:
        self._folder, self._limit, self._peak = folder, limit, peak

    def bound(self, most: int) -> None:
        """Let the group take ``most`` bytes."""
        (self._folder / self._limit).write_text(str(most))

    def enter(self) -> None:
        """Move the calling process into the group."""
        (self._folder / "cgroup.procs").write_text("0")

    def peak(self) -> int:
        """Bytes that the group took at most, cached pages of files included."""
        return int((self._folder / self._peak).read_text())

    def kills(self) -> int:
        """Processes of the group that were killed for memory."""
        for name in ("memory.events", "memory.oom_control"):
            if (self._folder / name).exists():
                lines = (self._folder / name).read_text().splitlines()
                return int(dict(line.split() for line in lines)["oom_kill"])
        raise SystemExit(f"{self._folder} does not tell its kills")


@contextmanager
def control_group() -> Iterator[Group]:
    """Make a group, version 1 or 2; end where neither can be had."""
    for parent, limit, peak in GROUPS:
        folder = parent / f"cospadi-soak-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / limit).exists() and (folder / peak).exists():
                yield Group(folder, limit, peak)
                return
        finally:
            folder.rmdir()
    raise SystemExit("no control group of memory can be made here: --cgroup needs root")


def baseline(enter: Callable[[], None] | None = None) -> tuple[int, int]:
    """Peak resident set and address space, in bytes, of an interpreter that has used torch."""
    done = subprocess.run(
        [sys.executable, "-c", BASELINE],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=enter,
    )
    rss, space = (1024 * int(word) for word in done.stdout.split())
    return rss, space


def baseline_in_a_group() -> int:
    """Bytes charged to a group of that interpreter alone; its libraries are in the machine's cache by then."""
    baseline()
    with control_group() as group:
        baseline(group.enter)
        return group.peak()


def run(command: list[str], prepare: Callable[[], None]) -> tuple[int, float, int]:
    """Exit code, seconds and peak resident set of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, preexec_fn=prepare)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, round(time.perf_counter() - start, 1), 1024 * usage.ru_maxrss


def main() -> int:
    """Run, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--above", type=float, default=400.0, help="MB above the baseline")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--address-space", action="store_true")
    how.add_argument("--cgroup", action="store_true")
    parser.add_argument("--out", type=Path, help="keep the result here")
    args, rest = parser.parse_known_args()
    rss, space = baseline()
    extra = int(args.above * 1e6)
    print(
        f"baseline: {rss / 1e6:.0f} MB resident, {space / 1e6:.0f} MB of address space", flush=True
    )
    with tempfile.TemporaryDirectory() as folder:
        out = args.out or Path(folder) / "out"
        command = [sys.executable, "-m", "cospadi", "compress", args.model, "--out", str(out)]
        command += [word for word in rest if word != "--"]
        enforced: dict[str, float] = {}
        if args.cgroup:
            charged = baseline_in_a_group()
            print(f"baseline: {charged / 1e6:.0f} MB charged to a control group", flush=True)
            with control_group() as group:
                group.bound(charged + extra)
                code, seconds, peak = run(command, group.enter)
                enforced = {
                    "group_baseline_mb": round(charged / 1e6, 1),
                    "group_limit_mb": round((charged + extra) / 1e6, 1),
                    "group_peak_mb": round(group.peak() / 1e6, 1),
                    "kills": group.kills(),
                }
        else:
            command += ["--max-memory", str(rss + extra)]

            def limit() -> None:
                if args.address_space:
                    resource.setrlimit(resource.RLIMIT_AS, (space + extra, space + extra))

            code, seconds, peak = run(command, limit)
    kept = peak <= rss + extra
    result = {
        "exit_code": code,
        "seconds": seconds,
        "baseline_mb": round(rss / 1e6, 1),
        "limit_mb": round((rss + extra) / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
        "above_baseline_mb": round((peak - rss) / 1e6, 1),
        "kept": kept,
        **enforced,
    }
    print(json.dumps(result))
    return 0 if (kept or args.cgroup) and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
