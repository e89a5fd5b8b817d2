"""The benchmark of CUDA inference, dry: its own logic on the CPU at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "bench" / "gpu" / "bench_inference.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments], capture_output=True, text=True, check=False
    )


def test_dry_run_checks_and_reports_everything(tmp_path):
    path = tmp_path / "bench.json"
    done = run("--dry-run", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["failures"] == []
    names = {(line["shape"], line["rows"], line["name"]) for line in report["lines"]}
    assert ("tiny, odd", 1, "layer") in names
    assert ("tiny", 40, "S expanded") in names
    assert ("tiny", 4, "S int4") in names
    for line in report["lines"]:
        assert line["median"] > 0
        assert line["error"] is None or line["error"] < 1e-2
    assert "x dense" in done.stdout


def test_running_out_of_time_is_a_failure():
    done = run("--dry-run", "--seconds", "0")
    assert done.returncode == 1
    assert "out of time" in done.stdout
