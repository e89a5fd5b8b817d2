"""``cospadi verify``."""

from __future__ import annotations

from pathlib import Path

import typer

from cospadi.cli.common import quiet_libraries, set_threads


def verify_command(
    directory: Path = typer.Argument(..., help="Compressed directory."),
    source: str | None = typer.Option(
        None,
        help="The original model: recompute every stated error from the files and its recipe's calibration.",
    ),
    calibration: str | None = typer.Option(
        None, help="Where the calibration text is now, if it moved."
    ),
    threads: int | None = typer.Option(None, help="Threads; all cores by default."),
) -> None:
    """Check hashes, shapes, masks and values of a compressed directory; exit code 4 if something is wrong."""
    quiet_libraries()
    set_threads(threads)
    from cospadi.pipeline.verify import verify_checkpoint, verify_errors

    n_modules = verify_checkpoint(directory)
    typer.echo(f"{directory}: hashes, shapes, masks and values of {n_modules} modules hold")
    if source is not None:
        worst = verify_errors(directory, source, calibration=calibration)
        typer.echo(f"stated errors hold; largest relative difference {worst:.1e}")
