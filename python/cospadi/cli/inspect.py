"""``cospadi inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from cospadi.cli.common import describe_ratio, megabytes, show_warning, write_json
from cospadi.cli.live import atoms_text


def inspect_command(
    directory: Path = typer.Argument(..., help="Compressed directory."),
    json_out: Path | None = typer.Option(None, "--json", help="Write as JSON; - for stdout."),
) -> None:
    """Show what is in a compressed directory: per module k, s, shapes, bits and error; ratios.

    Where the budget was divided by loss: what each module was predicted to cost, and with an even share.
    """
    from cospadi.pipeline.inspect import inspect_checkpoint
    from cospadi.pipeline.report import REPORT_FILE

    data = inspect_checkpoint(directory)
    errors = {name: module["relative_error"] for name, module in data["modules"].items()}
    unknown = [name for name, error in errors.items() if not isinstance(error, (int, float))]
    if unknown:
        report = directory / REPORT_FILE
        state = "damaged or incomplete" if report.exists() else "missing"
        show_warning(
            f"{report} is {state}: the errors of {len(unknown)} of {len(errors)} modules are unknown"
        )
    write_json(json_out, data)
    if str(json_out) == "-":
        return
    for name, module in data["modules"].items():
        error = "?" if name in unknown else format(errors[name], ".4f")
        typer.echo(
            f"{name}  {module['d_in']}x{module['d_out']}  k={atoms_text(module)} s={module['sparsity']} "
            f"{module['support']} {module['coeffs_dtype']}  error {error}  "
            f"{module['stored_bytes']:,} bytes, {module['bits_per_weight']:.2f} bits per weight"
            + _describe_loss(module)
        )
    for part in ("linears", "model"):
        ratio = data["ratio"][part]
        size = data["bytes"][part]
        typer.echo(
            f"{part}: {megabytes(size['dense'])} in bfloat16 -> {megabytes(size['stored'])} stored, "
            f"{megabytes(size['file'])} in files; {describe_ratio(ratio)}"
        )
    if data["failed"]:
        typer.echo(f"left dense after a failure: {', '.join(map(str, data['failed']))}")


def _describe_loss(module: dict[str, Any]) -> str:
    """What the module costs the prediction, where the budget was divided by that."""
    if module["loss"] is None or module["even_loss"] is None:
        return ""
    return f"  predicted loss {module['loss']:.2e} (even share: {module['even_loss']:.2e})"
