"""Kill a compression at random, resume it, and so on; the manifest must be that of an undisturbed run.

    python bench/soak/kills.py MODEL --kills 100 --out report.json [--within S] [further arguments of cospadi compress]

A kill comes at a random moment between 0 and the duration of an undisturbed run, so that opening, calibration, fits and
writing are all hit; the report counts where. With ``--within S`` between 0 and S seconds: a single run then survives as
many as one wants, if S leaves time for opening and little more (calibration that no kill lets finish begins anew every
time: keep Grams with ``--gram-cache``). With ``--workers`` among the further arguments a worker is killed every
other time.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MANIFEST = "cospadi_manifest.json"


def children(process: int) -> list[int]:
    """Direct children of a process."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def stage(out: Path, n_modules: int) -> str:
    """What a run that writes to `out` was at when it was killed, from the files it left."""
    if out.exists():
        return "done"
    work = out.with_name(out.name + ".work")
    if not work.exists():
        return "opening"
    n_done = len(list((work / "modules").glob("[!.]*.json")))
    if n_done >= n_modules:
        return "writing"
    return "fits" if n_done else "calibration and first fit"


def main() -> int:
    """Run, compare, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--within", type=float)
    args, rest = parser.parse_known_args()
    draw = random.Random(args.seed)
    killed_at: dict[str, int] = {}
    report: dict[str, object] = {"kills": 0, "rounds": 0, "equal": 0}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def command(out: Path) -> list[str]:
            return [
                sys.executable, "-m", "cospadi", "compress", args.model, "--out", str(out),
                "--threads", "1", *rest,
            ]  # fmt: skip

        start = time.perf_counter()
        subprocess.run(command(root / "reference"), check=True, capture_output=True)
        duration = time.perf_counter() - start
        expected = (root / "reference" / MANIFEST).read_bytes()
        log = (root / "reference.log.jsonl").read_text().splitlines()
        n_modules = sum(json.loads(line)["event"] == "module" for line in log)
        n_kills = n_rounds = n_equal = 0
        while n_kills < args.kills:
            out = root / f"round-{n_rounds}"
            n_rounds += 1
            while not out.exists():
                process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=-3)
                try:
                    is_last = n_kills >= args.kills
                    latest = duration if args.within is None else args.within
                    process.wait(timeout=None if is_last else draw.uniform(0.0, latest))
                except subprocess.TimeoutExpired:
                    workers = children(process.pid)
                    if workers and n_kills % 2:
                        subprocess.run(["kill", "-9", str(draw.choice(workers))], check=False)
                        process.wait()
                    else:
                        process.send_signal(signal.SIGKILL)
                        process.wait()
                    n_kills += 1
                    where = stage(out, n_modules)
                    killed_at[where] = killed_at.get(where, 0) + 1
                    if n_kills % 10 == 0:
                        print(f"{n_kills} kills: {killed_at}", flush=True)
            n_equal += (out / MANIFEST).read_bytes() == expected
            print(f"{n_kills} kills, {n_equal} of {n_rounds} manifests equal", flush=True)
            report = {
                "kills": n_kills,
                "rounds": n_rounds,
                "equal": n_equal,
                "modules": n_modules,
                "killed_at": killed_at,
                "seconds_undisturbed": round(duration, 1),
                "seconds": round(time.perf_counter() - start, 1),
            }
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if n_equal == n_rounds else 1


if __name__ == "__main__":
    sys.exit(main())
