"""``cospadi report``."""

from __future__ import annotations

from pathlib import Path

import typer


def report_command(
    directory: Path = typer.Argument(..., help="Compressed directory."),
    evaluation: list[Path] = typer.Option(
        [],
        "--eval",
        help="JSON file that eval --json wrote, of this model, the dense one or others; repeatable.",
    ),
) -> None:
    """Write the page report.html of a compressed directory again, with measurements made since."""
    from cospadi.pipeline.report import renew_page

    typer.echo(str(renew_page(directory, evaluation)))
