"""Text sources: files, folders, hub data sets, and a text that every Python installation holds."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from cospadi.errors import InputError, install_command
from cospadi.model.locate import one_line, require_hub

Half = Literal["calibration", "evaluation"]

#: Suffixes a folder is searched for, and that make an argument a file rather than a hub id.
TEXT_SUFFIXES = (".txt", ".raw", ".jsonl")

# What is meant as a range; whether it is a valid one is checked afterwards, so that "[-5:]" is an error and no name.
_RANGE = re.compile(r"(?P<base>.+)\[(?P<range>[-+\d\s:]*)\]", re.DOTALL)


@dataclass(frozen=True)
class DocumentRange:
    """Documents `start` to `stop` (exclusive, None for all that follow) of a text source, counted from 0.

    ``str`` gives the form it is written in, such as ``[800:]``.
    """

    start: int
    stop: int | None

    def __str__(self) -> str:
        return f"[{self.start or ''}:{'' if self.stop is None else self.stop}]"

    def select(self, documents: Iterator[str], name: str) -> Iterator[str]:
        """Yield the documents of the range; later ones are never read.

        Raises
        ------
        InputError
            The source ends before the range does: a text that is shorter than its description would go unnoticed.
        """
        count = 0
        while self.stop is None or count < self.stop:
            document = next(documents, None)
            if document is None:
                break
            count += 1
            if count > self.start:
                yield document
        if count <= self.start or (self.stop is not None and count < self.stop):
            raise InputError(
                f"document range {self} of {name}: it holds {count} documents; choose a range within them"
            )


def split_range(source: str | Path) -> tuple[str | Path, DocumentRange | None]:
    """Separate a text source from the document range behind it, ``SOURCE[start:stop]``.

    Parameters
    ----------
    source
        A text source. Something that exists under its whole name has no range, whatever its name ends with.

    Returns
    -------
    source, documents
        The source alone, of the type that was given; the range, or None for all documents.

    Raises
    ------
    InputError
        The brackets hold no range of documents: a single number, a negative number, a step, or nothing selected.
    """
    base, written = _split_brackets(source)
    if written is None:
        return source, None
    parts = [part.strip() for part in written.split(":")]
    if len(parts) != 2 or not all(part == "" or part.isdecimal() for part in parts):
        raise InputError(
            f"document range of {source!s}: expected [start:stop] with numbers from 0, or one of them left out, "
            f"got [{written}]"
        )
    start, stop = int(parts[0] or 0), int(parts[1]) if parts[1] else None
    if stop is not None and stop <= start:
        raise InputError(
            f"document range of {source!s}: [{written}] selects no document; stop must exceed start"
        )
    return base, DocumentRange(start, stop)


def is_path(source: str | Path) -> bool:
    """Tell whether a text source, without its document range, is a file or folder that exists.

    Raises
    ------
    InputError
        It looks like a path and nothing is there.
    """
    return existing_path(_split_brackets(source)[0]) is not None


def _split_brackets(source: str | Path) -> tuple[str | Path, str | None]:
    """Return the source without the brackets at its end, and what they hold."""
    match = _RANGE.fullmatch(str(source))
    if match is None or _exists(source):
        return source, None
    base = match["base"]
    return (Path(base) if isinstance(source, Path) else base), match["range"]


def builtin_text(half: Half) -> str:
    """Return one half of the language reference that CPython carries for its ``help()``.

    The topics of ``pydoc_data.topics``, sorted by name, alternate between the halves: the first, third, ... are for
    calibration, the second, fourth, ... for evaluation. Topics are joined by a blank line.

    Parameters
    ----------
    half
        ``"calibration"`` or ``"evaluation"``.

    Returns
    -------
    str
        With CPython 3.11.7: 40 topics and 253,461 characters for calibration (61,785 SmolLM2 tokens), 39 topics and
        211,663 characters for evaluation (51,322 tokens). Other Python versions differ: compare hashes.

    Raises
    ------
    InputError
        This Python has no ``pydoc_data``.
    """
    return "\n\n".join(_builtin_documents(half))


def _builtin_documents(half: Half) -> list[str]:
    if half not in ("calibration", "evaluation"):
        raise InputError(
            f"the built-in text has the halves 'calibration' and 'evaluation', got {half!r}"
        )
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise InputError(
            "this Python has no pydoc_data.topics for the built-in text: name a text file"
        ) from error
    first = 0 if half == "calibration" else 1
    return [topics[name] for name in sorted(topics)[first::2]]


def read_documents(source: str | Path, *, half: Half = "calibration") -> tuple[str, Iterator[str]]:
    """Open a text source.

    Parameters
    ----------
    source
        - ``"builtin"``: see `builtin_text`;
        - a ``.jsonl`` file: one object per line, its ``text`` field is one document;
        - a ``.raw`` file (WikiText): one document, see `wikitext_rows`;
        - any other file: UTF-8, one document, as it is;
        - a folder: its .txt, .raw and .jsonl files at any depth, ordered by path;
        - otherwise a hub data set ``name[:config[:split]]`` (split ``train`` unless given) with a ``text`` column,
          streamed in its own order.

        Behind any of them a range of documents, ``[start:stop]`` as in Python with numbers from 0: ``c4.jsonl[:800]``
        is its first 800 documents, ``c4.jsonl[800:]`` all others. Documents are counted as they come out, without
        those left out.
    half
        Half of the built-in text.

    Returns
    -------
    name, documents
        A short name without machine paths but with the range, and the documents in order. Documents without a visible
        character are left out.

    Raises
    ------
    InputError
        Nothing there, not UTF-8, a line that is no JSON object with a text, the hub cannot be reached, or a range
        beyond the documents there are. Errors in the content, and the last one, come while iterating.
    """
    base, selected = split_range(source)
    name, documents = _all_documents(base, half)
    if selected is None:
        return name, documents
    if str(base).endswith(".safetensors"):
        raise InputError(
            f"document range {selected} of {name}: token ids have no documents; choose rows by the number of samples"
        )
    return f"{name}{selected}", selected.select(documents, name)


def _all_documents(source: str | Path, half: Half) -> tuple[str, Iterator[str]]:
    if source == "builtin":
        version = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
        name = f"builtin ({half} topics of pydoc_data, Python {version})"
        return name, iter(_builtin_documents(half))
    path = existing_path(source)
    if path is None:
        return str(source), _hub_documents(str(source))
    if path.is_file():
        return path.name, _file_documents(path)
    files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
    if not files:
        raise InputError(f"{path.name} holds no {', '.join(TEXT_SUFFIXES)} file")
    return path.resolve().name, (text for file in files for text in _file_documents(file))


def existing_path(source: str | Path) -> Path | None:
    """Return the path of a text source, or None if it must be a hub id.

    Raises
    ------
    InputError
        It looks like a path and nothing is there.
    """
    text = str(source)
    path = Path(text).expanduser()
    if _exists(source):
        return path
    suffixes = (*TEXT_SUFFIXES, ".json", ".md", ".safetensors", ".gz", ".parquet")
    if isinstance(source, Path) or text.startswith(("/", ".", "~")) or path.suffix in suffixes:
        raise InputError(f"text {text!r} does not exist")
    return None


def _exists(source: str | Path) -> bool:
    path = Path(source).expanduser()
    try:
        return path.is_file() or path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(
            f"text {str(source)[:80]!r} is not a usable path: {one_line(error)}"
        ) from error


def wikitext_rows(raw: str) -> str:
    r"""Join the rows of a raw WikiText file the way published perplexities do.

    The data set's rows are the lines with their line end, and empty strings for lines without a visible character;
    rows are joined by a blank line. For ``wiki.test.raw`` this is the text of ``"\n\n".join(dataset["text"])``.
    """
    lines = raw.split("\n")
    if lines[-1] == "":
        lines.pop()
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def _file_documents(path: Path) -> Iterator[str]:
    try:
        # newline="": the text as it is, with the line ends the file has
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".jsonl":
                for number, line in enumerate(stream, 1):
                    if line.strip() and (text := _json_text(line, path.name, number)).strip():
                        yield text
                return
            text = stream.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 text: {one_line(error)}") from error
    except OSError as error:
        raise InputError(f"cannot read {path.name}: {error.strerror or one_line(error)}") from error
    if path.suffix == ".raw":
        text = wikitext_rows(text)
    if text.strip():
        yield text


def _json_text(line: str, name: str, number: int) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        # its own line number is that within this one line
        reason = getattr(error, "msg", None) or one_line(error)
        raise InputError(f"{name}, line {number} is not valid JSON: {reason}") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{name}, line {number} must be a JSON object with a string field "text"')
    return text


def _hub_documents(spec: str) -> Iterator[str]:
    name, config, split, *rest = (*spec.split(":"), "", "") if ":" in spec else (spec, "", "")
    if any(rest) or not name:
        raise InputError(f"data set {spec!r} is not of the form name[:config[:split]]")
    if find_spec("datasets") is None:
        raise InputError(
            f"{spec!r} is no local file; a hub data set needs the package datasets: {install_command('datasets')}"
        )
    if not require_hub(name, repo_type="dataset"):
        raise InputError(
            f"text {spec!r} is no local file, and the hub cannot be reached to look for a data set: "
            "give a file, or 'builtin'"
        )
    import datasets

    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            text = row.get("text")
            if not isinstance(text, str):
                raise InputError(f"data set {spec!r} has no text column, got {sorted(row)[:8]}")
            if text.strip():
                yield text
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot read data set {spec!r}: {one_line(error)}") from error
