"""``cospadi verify``."""

from __future__ import annotations

from pathlib import Path

import typer

from cospadi.checkpoint.strict_json import brief_text
from cospadi.cli.common import quiet_libraries, set_threads
from cospadi.errors import InputError

_MOST_SHOWN = 5


def verify_command(
    directory: Path = typer.Argument(..., help="Compressed directory."),
    source: str | None = typer.Option(
        None,
        help="The original model: recompute every stated error from the files and its recipe's calibration.",
    ),
    calibration: str | None = typer.Option(
        None, help="Where the calibration text is now, if it moved; with --source."
    ),
    perplexity: str | None = typer.Option(
        None,
        help="JSON of eval --text --json for this directory: its perplexity is measured again.",
    ),
    text: str | None = typer.Option(
        None, help="Where the text of --perplexity is now, if it moved."
    ),
    threads: int | None = typer.Option(None, help="Threads; all cores by default."),
) -> None:
    """Check hashes, shapes, masks and values of a compressed directory.

    With --source also its stated errors, and that what was not compressed is the original's; with --perplexity a
    measurement of eval.

    Files that came later are named and not checked.

    Exit codes: 0 everything holds (without a manifest, as save_pretrained leaves it, hashes are not checked: a note
    says so); 2 no compressed directory, one made by a newer version, or a source or calibration that cannot be opened;
    4 something is missing, damaged, cannot be read or contradicts what is stated, or the source is another model.
    """
    quiet_libraries()
    set_threads(threads)
    if calibration is not None and source is None:
        raise InputError("verify: --calibration belongs to --source, which is missing")
    if text is not None and perplexity is None:
        raise InputError("verify: --text belongs to --perplexity, which is missing")
    from cospadi.checkpoint.manifest import MANIFEST_FILE, has_manifest, unlisted_files
    from cospadi.pipeline.verify import verify_checkpoint, verify_errors

    n_modules = verify_checkpoint(directory)
    checked = "shapes, masks and values"
    if has_manifest(directory):
        checked = f"hashes, {checked}"
        unlisted = unlisted_files(directory)
        if unlisted:
            few = ", ".join(brief_text(name) for name in unlisted[:_MOST_SHOWN])
            more = f" and {len(unlisted) - _MOST_SHOWN} more" if len(unlisted) > _MOST_SHOWN else ""
            typer.echo(
                f"note: not checked, as {MANIFEST_FILE} does not list it: {few}{more}", err=True
            )
    else:
        typer.echo(
            f"note: {MANIFEST_FILE} is missing (save_pretrained writes none): hashes were not checked",
            err=True,
        )
    typer.echo(f"{directory}: {checked} of {n_modules} modules hold")
    if source is not None:
        worst = verify_errors(directory, source, calibration=calibration)
        typer.echo(
            f"{n_modules} of {n_modules} stated errors hold; largest relative difference {worst:.1e}"
        )
    if perplexity is not None:
        from cospadi.pipeline.verify_perplexity import verify_perplexity

        stated, found = verify_perplexity(directory, perplexity, text=text)
        typer.echo(f"the stated perplexity holds: {stated:.4f}, measured again {found:.4f}")
