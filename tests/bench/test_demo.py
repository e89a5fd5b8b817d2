"""The demonstration runs from end to end, here with a tiny model in place of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cospadi.pipeline.verify import verify_checkpoint

PROGRAM = Path(__file__).parents[2] / "bench" / "demo" / "run.py"


@pytest.mark.slow
def test_the_demonstration_ends_with_measured_reports(damaged_dir, tmp_path):
    config = json.loads((damaged_dir / "config.json").read_text())
    config["max_position_embeddings"] = 1024  # its texts are that long
    (damaged_dir / "config.json").write_text(json.dumps(config))
    work = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, PROGRAM, work, damaged_dir],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("cospadi", "svd-llm"):
        page, card = work / name / "report.html", work / name / "README.md"
        assert f"report: {page}\nmodel card: {card}\n" in done.stdout
        for file in (page, card):
            text = file.read_text(encoding="utf-8")
            assert "12 windows of 1024 tokens" in text and "original" in text
            assert "Not measured yet" not in text
        assert verify_checkpoint(work / name) > 0
