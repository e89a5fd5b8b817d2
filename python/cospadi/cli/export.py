"""``cospadi export``."""

from __future__ import annotations

from pathlib import Path

import typer

from cospadi.cli.common import quiet_libraries, show_warning
from cospadi.errors import InputError


def export_command(
    model: str = typer.Argument(
        ..., help="Compressed directory, Hugging Face folder, hub id, or GGUF file."
    ),
    out: Path = typer.Option(..., "--out", "-o", help="New directory."),
    dense: bool = typer.Option(
        False, "--dense", help="Multiply the factors out: an ordinary model."
    ),
    dtype: str = typer.Option("bfloat16", help="bfloat16, float16 or float32."),
) -> None:
    """Write an ordinary dense Hugging Face model, for tools that do not know this format. It saves no bytes."""
    quiet_libraries()
    if not dense:
        raise InputError("export: name the form to write; this version offers --dense")
    from cospadi.pipeline.open_model import export_model

    export_model(model, out, dtype=dtype, warn=show_warning)
    typer.echo(f"{out}: dense {dtype} model written")
