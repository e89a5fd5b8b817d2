"""Compress a model under a bound on memory and measure what it took, from outside.

    python bench/soak/memory.py MODEL --above 400 [--address-space] [-- further arguments of cospadi compress]

prints the footprint of the interpreter with torch, sets ``--max-memory`` to it plus ``--above`` MB, and reports the
largest resident set of the run. With ``--address-space`` the kernel refuses more (RLIMIT_AS) than the address space of
that interpreter plus as much.
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
from pathlib import Path

BASELINE = """
import torch
torch.ones(256, 256, dtype=torch.float64) @ torch.ones(256, 256, dtype=torch.float64)
lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(lines["VmHWM"].split()[0], lines["VmPeak"].split()[0])
"""


def baseline() -> tuple[int, int]:
    """Peak resident set and address space, in bytes, of an interpreter that has used torch."""
    done = subprocess.run(
        [sys.executable, "-c", BASELINE], capture_output=True, text=True, check=True
    )
    rss, space = (1024 * int(word) for word in done.stdout.split())
    return rss, space


def main() -> int:
    """Run, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--above", type=float, default=400.0, help="MB above the baseline")
    parser.add_argument("--address-space", action="store_true")
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
        command += ["--max-memory", str(rss + extra), *(word for word in rest if word != "--")]

        def limit() -> None:
            if args.address_space:
                resource.setrlimit(resource.RLIMIT_AS, (space + extra, space + extra))

        start = time.perf_counter()
        process = subprocess.Popen(command, preexec_fn=limit)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    peak = 1024 * usage.ru_maxrss
    result = {
        "exit_code": process.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "baseline_mb": round(rss / 1e6, 1),
        "limit_mb": round((rss + extra) / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
        "above_baseline_mb": round((peak - rss) / 1e6, 1),
        "kept": peak <= rss + extra,
    }
    print(json.dumps(result))
    return 0 if result["kept"] and process.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
