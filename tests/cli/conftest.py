"""The command, and what it compressed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_commands import FAST

from cospadi.cli import app


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cospadi", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def compressed(tiny_model_dir, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "small"
    command = [sys.executable, "-m", "cospadi", "compress", tiny_model_dir("llama"), "--out", out]
    command += ["--ratio", "0.3", "--calibration", tiny_text, *FAST]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return out, done.stdout


@pytest.fixture
def copied(compressed, tmp_path) -> Path:
    return Path(shutil.copytree(compressed[0], tmp_path / "copied"))
