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
        False, "--dense", help="Multiply the factors out: an ordinary model. It saves no bytes."
    ),
    onnx: bool = typer.Option(
        False, "--onnx", help="A graph for ONNX Runtime with the operator library of this package."
    ),
    dtype: str = typer.Option("bfloat16", help="With --dense: bfloat16, float16 or float32."),
) -> None:
    """Write a model for tools that do not know this format: dense, or compressed as an ONNX graph."""
    quiet_libraries()
    if dense == onnx:
        raise InputError("export: name one form to write, --dense or --onnx")
    if onnx:
        from cospadi.checkpoint.export_onnx import MODEL_FILE, export_onnx

        export_onnx(model, out)
        typer.echo(
            f"{out / MODEL_FILE}: written; its operator is in the file that "
            "`python -m cospadi --onnx-library` names"
        )
        return
    from cospadi.pipeline.open_model import export_model

    export_model(model, out, dtype=dtype, warn=show_warning)
    typer.echo(f"{out}: dense {dtype} model written")
