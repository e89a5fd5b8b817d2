"""The programs for GPU machines, at toy sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_whole_run(tmp_path):
    """Every stage that needs no GPU runs, is checked, and ends in the table."""
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "BUDGET": "550"}
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu/run.sh"), "--dry-run"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stages = [line.split("\t") for line in (tmp_path / "stages.tsv").read_text().splitlines()]
    assert {"machine", "bench_fit"} <= {stage[0] for stage in stages}
    assert all(stage[2] == "ok" for stage in stages)
    report = json.loads((tmp_path / "fit.json").read_text())
    assert report["failures"] == []
    names = [line["name"] for line in report["lines"]]
    for wanted in ("select", "project", "gradient step", "omp k=48 s=20", "toy q,o float32"):
        assert wanted in names, names
    assert "rise" in report["lines"][names.index("toy q,o float32")]["stages"]
    assert done.stdout.rstrip().splitlines()[-1]


def test_a_stage_that_fails_costs_no_other(tmp_path):
    """Without time nothing starts, and the table says so."""
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable, "BUDGET": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu/run.sh"), "--dry-run"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 1
    assert "not started: the time is up" in done.stdout
