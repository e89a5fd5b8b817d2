"""Machine fingerprint and result schema shared by the benchmark programs; the timing rules are the package's own.

Rates are given next to the peaks measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from cospadi import native
from cospadi.evaluation.timing import (
    Timing,
    copy_peak,
    gemm_peak,
    measure,
    measure_in_turn,
    read_peak,
    summarise,
)

__all__ = [
    "Result",
    "Timing",
    "argument_parser",
    "copy_peak",
    "fingerprint",
    "gemm_peak",
    "measure",
    "measure_in_turn",
    "peak_memory_bytes",
    "print_results",
    "read_peak",
    "reset_peak_memory",
    "single_threaded_blas",
    "summarise",
    "write_json",
]

SCHEMA_VERSION = 1


@dataclass
class Result:
    """One line of a report.

    Attributes
    ----------
    name : str
        Variant or library.
    shape : dict
        Sizes of the problem.
    threads : int
        Threads used.
    timing : Timing
        Seconds per call.
    items : float
        Units of work per call (signals, tokens, calls), for the rate.
    flops, bytes : float
        Work per call by the formulas in the program, 0 if not stated.
    extra : dict
        Checks, memory and other figures.
    """

    name: str
    shape: dict[str, int]
    threads: int
    timing: Timing
    items: float = 1.0
    flops: float = 0.0
    bytes: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the fields and the rates derived from the median."""
        seconds = self.timing.median
        rates = {
            "items_per_s": self.items / seconds,
            "gflops": self.flops / seconds / 1e9,
            "gbytes_per_s": self.bytes / seconds / 1e9,
        }
        return asdict(self) | {"rates": rates}


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Keep the BLAS of other libraries to the calling thread, whose CPU time is what is measured."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(1, user_api="blas"):
        yield


def reset_peak_memory() -> None:
    """Start a new high-water mark of this process' resident memory, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Return the resident high-water mark since `reset_peak_memory`, 0 where it is unknown."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def fingerprint() -> dict[str, Any]:
    """Describe the machine and the software, so that results can be compared honestly."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name)
            for name in ("cospadi", "torch", "numpy", "scikit-learn", "spams-bin")
        },
        "commit": _commit(),
        "runtime": native.runtime_info(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options every program has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--refcheck",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the results of all variants (default on); a difference exits with 1",
    )
    return parser


def print_results(title: str, results: list[Result], unit: str) -> None:
    """Print one table: rate, spread, flop and byte rates, checks."""
    print(title)
    header = f"  {'variant':28s} {'threads':>7s} {unit + '/s':>12s} {'median ms':>10s} {'quartiles ms':>19s}"
    print(header + f" {'GFLOP/s':>8s} {'GB/s':>6s}")
    for result in results:
        timing = result.timing
        rates = result.as_json()["rates"]
        quartiles = f"{timing.lower_quartile * 1e3:.2f}..{timing.upper_quartile * 1e3:.2f}"
        print(
            f"  {result.name:28s} {result.threads:7d} {rates['items_per_s']:12.1f} {timing.median * 1e3:10.2f} "
            f"{quartiles:>19s} {rates['gflops']:8.1f} {rates['gbytes_per_s']:6.1f}"
            + "".join(f"  {key}={value}" for key, value in result.extra.items())
        )


def write_json(
    path: Path | None,
    program: str,
    arguments: argparse.Namespace,
    results: list[Result],
    **more: object,
) -> None:
    """Write the report: schema_version, program, arguments, fingerprint, results and what else is given."""
    if path is None:
        return
    report = {
        "schema_version": SCHEMA_VERSION,
        "program": program,
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "fingerprint": fingerprint(),
        **more,
        "results": [result.as_json() for result in results],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
