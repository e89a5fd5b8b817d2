"""What tests of the command line share."""

from __future__ import annotations

FAST = ["--samples", "8", "--sequence-length", "64", "--iterations", "1"]
"""Options of a compression that takes seconds."""


def one_line(stderr: str) -> str:
    """Return what was said on stderr, which must be a single line."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    return lines[0]
