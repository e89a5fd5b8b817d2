"""``cospadi worker``."""

from __future__ import annotations

from pathlib import Path

import typer


def worker_command(
    directory: Path = typer.Argument(
        ..., help="Work directory of a running compression: OUT.work."
    ),
    name: str | None = typer.Option(None, help="Of this worker; must be unique."),
    lease: float = typer.Option(
        60.0, help="Seconds without a sign of life after which a worker has lost its task."
    ),
    beat: float = typer.Option(5.0, help="Seconds between signs of life of this worker."),
    wait: float = typer.Option(600.0, help="Seconds to wait for the run to begin."),
    parent: int | None = typer.Option(None, hidden=True),
) -> None:
    """Fit matrices of a compression that runs with --workers, here or on another machine.

    Any number of workers may join, leave and be killed at any time; the result is the same to the bit. Ends with the
    run. Threads are those of the run.
    """
    from cospadi.pipeline.worker import work

    summary = work(
        directory,
        name=name,
        lease_s=lease,
        beat_s=beat,
        wait_s=wait,
        parent=parent,
        report=typer.echo,
    )
    typer.echo(
        f"{summary.n_done} fitted, {summary.n_failed} cannot be fitted, {summary.n_given_up} given up: {summary.reason}"
    )
