"""Text sources: files, folders, hub data sets, and a text that every Python installation holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from cospadi.errors import InputError
from cospadi.model.locate import one_line, require_hub

Half = Literal["calibration", "evaluation"]

#: Suffixes a folder is searched for, and that make an argument a file rather than a hub id.
TEXT_SUFFIXES = (".txt", ".raw", ".jsonl")


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
    half
        Half of the built-in text.

    Returns
    -------
    name, documents
        A short name without machine paths, and the documents in order. Documents without a visible character are
        left out.

    Raises
    ------
    InputError
        Nothing there, not UTF-8, a line that is no JSON object with a text, or the hub cannot be reached. Errors in
        the content come while iterating.
    """
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
    try:
        if path.is_file() or path.is_dir():
            return path
    except (OSError, ValueError) as error:
        raise InputError(f"text {text[:80]!r} is not a usable path: {one_line(error)}") from error
    suffixes = (*TEXT_SUFFIXES, ".json", ".md", ".safetensors", ".gz", ".parquet")
    if isinstance(source, Path) or text.startswith(("/", ".", "~")) or path.suffix in suffixes:
        raise InputError(f"text {text!r} does not exist")
    return None


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
        raise InputError(f"{name}, line {number} is not valid JSON: {one_line(error)}") from error
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
            f"{spec!r} is no local file; a hub data set needs the package datasets: pip install 'cospadi[datasets]'"
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
