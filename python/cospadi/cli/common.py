"""What several commands share: recipe options, quiet libraries, JSON output."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from cospadi.errors import InputError

if TYPE_CHECKING:
    from cospadi.pipeline.recipe import Recipe

_Number = TypeVar("_Number", int, float)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice out of our output; errors stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="transformers|torch")


def show_warning(text: str) -> None:
    """Print one line about something the user should know that is no error."""
    typer.echo(f"warning: {text}", err=True)


def build_recipe(recipe_file: Path | None, options: dict[str, Any], settings: list[str]) -> Recipe:
    """Recipe from file, then options, then ``--set``; later ones win. Options left at None do not count."""
    from cospadi.pipeline.recipe_file import (
        parse_setting,
        recipe_from_mapping,
        recipe_over_file,
    )

    chosen = {key: value for key, value in options.items() if value not in (None, [])}
    chosen.update(parse_setting(text) for text in settings)
    if recipe_file is None:
        return recipe_from_mapping(chosen, source="settings")
    return recipe_over_file(recipe_file, chosen)


def set_threads(threads: int | None) -> None:
    """Set torch's thread count, which the native kernels follow."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads: expected at least 1, got {threads}")
    import torch

    torch.set_num_threads(threads)


def check_json(path: Path | None) -> None:
    """Refuse a place for ``--json`` that cannot be written, before the work whose result goes there."""
    if path is None or str(path) == "-":
        return
    existed = path.exists()
    try:
        path.open("a", encoding="utf-8").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise InputError(f"--json {path}: cannot be written: {error.strerror or error}") from None


def write_json(path: Path | None, data: object) -> None:
    """Write ``data`` as JSON if a path was given; ``-`` is standard output."""
    if path is None:
        return
    text = json.dumps(data, indent=1, allow_nan=False)
    if str(path) == "-":
        print(text)
        return
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {path}: cannot be written: {error.strerror or error}") from None


def word_list(option: str, text: str) -> list[str]:
    """Comma-separated words; an empty one is an error."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise InputError(f"{option} {text!r}: expected words separated by commas")
    return words


def number_list(option: str, text: str, kind: type[_Number]) -> list[_Number]:
    """Comma-separated numbers of one type."""
    try:
        return [kind(word) for word in word_list(option, text)]
    except ValueError:
        raise InputError(f"{option} {text!r}: expected numbers separated by commas") from None


def describe_ratio(ratio: Mapping[str, float]) -> str:
    """Removed shares in every convention, side by side."""
    text = f"removed {ratio['stored']:.2%} of bytes as stored"
    text += f", {ratio['file']:.2%} of file bytes" if "file" in ratio else ""
    return (
        f"{text}; counted otherwise: {ratio['values']:.2%} of values, {ratio['mask16']:.2%} with mask (Eq. 10), "
        f"{ratio['mask14']:.2%} with mask and 14-bit coefficients (Eq. 11)"
    )


def megabytes(n_bytes: float) -> str:
    """Bytes as MB (10^6): four significant digits, and whole numbers from 1000 on."""
    value = n_bytes / 1e6
    return f"{value:.0f} MB" if value >= 1000 else f"{value:.4g} MB"
