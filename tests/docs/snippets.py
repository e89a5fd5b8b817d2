"""The fenced blocks of README.md and docs/*.md, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.document}:{self.line}"


def blocks_of(document: str, text: str | None = None) -> list[Block]:
    """The fenced blocks of a document of the repository, in order."""
    if text is None:
        text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(document, line, match[1], match[2]))
    fences = len(re.findall(r"^\s*```", text, re.MULTILINE))
    assert fences == 2 * len(found), f"{document}: a fence is indented, open or has a strange name"
    return found


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, one by one: without comments, continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    # a shell takes a # for a comment at the beginning of a word only, outside of quotes
    bare = (
        re.sub(r"""^((?:[^#'"]|'[^']*'|"[^"]*"|(?<=\S)\#)*?)(?:(?<=\s)|^)\#.*""", r"\1", line)
        for line in lines
    )
    return [line.strip() for line in bare if line.strip()]


def words_of(command: str) -> list[str]:
    """The words of a command without shell syntax beyond quotes."""
    return shlex.split(command)
