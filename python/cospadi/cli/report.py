"""``cospadi report``."""

from __future__ import annotations

from pathlib import Path

import typer


def report_command(
    directory: Path = typer.Argument(..., help="Compressed directory."),
    evaluation: list[Path] = typer.Option(
        [],
        "--eval",
        help="JSON file that eval --json wrote, of this model, the original or others; repeatable.",
    ),
    original: list[Path] = typer.Option(
        [],
        "--original",
        help="The same of the original model, where its name does not tell; repeatable.",
    ),
) -> None:
    """Write report.html and the model card of a compressed directory again, with measurements made since.

    Measurements stay in the directory: a later one of the same model on the same text or task replaces the earlier.
    """
    from cospadi.pipeline.measurements import unknown_models
    from cospadi.pipeline.report import renew_page

    typer.echo(str(renew_page(directory, evaluation, original)))
    for name in unknown_models(directory):
        typer.echo(
            f"note: {name}: neither this folder nor its original by name, so nothing is compared with it; "
            "--original FILE says that a measurement is the original's",
            err=True,
        )
