"""The Python and command-line blocks of docs/serving.md run as pasted; tests/serving runs those of the server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
COMMANDS = re.findall(r"```sh\n(cospadi .*?)\n```", DOCUMENT, re.DOTALL)


@pytest.fixture
def place(stored, tmp_path) -> Path:
    """A folder in which ``small`` is a compressed model."""
    (tmp_path / "small").symlink_to(stored["llama"])
    return tmp_path


@pytest.mark.parametrize("index", range(len(PROGRAMS)))
def test_program(place, index):
    if "peft" in PROGRAMS[index]:
        pytest.importorskip("peft")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[index]],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("index", range(len(COMMANDS)))
def test_command(place, index):
    command = [str(Path(sys.executable).with_name("cospadi")), *COMMANDS[index].split()[1:]]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_document_has_blocks():
    assert len(PROGRAMS) == 3
    assert len(COMMANDS) == 1
