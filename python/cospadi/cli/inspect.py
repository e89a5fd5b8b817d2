"""``cospadi inspect``."""

from __future__ import annotations

from pathlib import Path

import typer

from cospadi.cli.common import describe_ratio, megabytes, write_json


def inspect_command(
    directory: Path = typer.Argument(..., help="Compressed directory."),
    json_out: Path | None = typer.Option(None, "--json", help="Write as JSON; - for stdout."),
) -> None:
    """Show what is in a compressed directory: per module k, s, shapes and error; three ratios."""
    from cospadi.pipeline.inspect import inspect_checkpoint

    data = inspect_checkpoint(directory)
    write_json(json_out, data)
    if str(json_out) == "-":
        return
    for name, module in data["modules"].items():
        error = module["relative_error"]
        typer.echo(
            f"{name}  {module['d_in']}x{module['d_out']}  k={module['n_atoms']} s={module['sparsity']} "
            f"{module['support']}  error {'?' if error is None else format(error, '.4f')}  "
            f"{module['stored_bytes']:,} bytes"
        )
    for part in ("linears", "model"):
        ratio = data["ratio"][part]
        size = data["bytes"][part]
        typer.echo(
            f"{part}: {megabytes(size['dense'])} -> {megabytes(size['stored'])}; {describe_ratio(ratio)}"
        )
    if data["failed"]:
        typer.echo(f"left dense after a failure: {', '.join(data['failed'])}")
