"""The ``cospadi`` command."""

from __future__ import annotations

import sys

import typer

from cospadi.cli import compare, compress, doctor, evaluate, export, generate, inspect, plan, verify
from cospadi.errors import CospadiError

EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="cospadi",
    help="Shrink a large language model to a byte budget by calibration-guided sparse dictionaries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("compress")(compress.compress_command)
app.command("compare")(compare.compare_command)
app.command("eval")(evaluate.eval_command)
app.command("generate")(generate.generate_command)
app.command("inspect")(inspect.inspect_command)
app.command("verify")(verify.verify_command)
app.command("export")(export.export_command)
app.command("plan")(plan.plan_command)
app.command("doctor")(doctor.doctor_command)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from cospadi import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: errors become one line on stderr and the documented exit code.

    0 ok, 1 internal, 2 usage or input, 3 partial result, 4 verification failed, 130 interrupted.
    """
    try:
        app()
    except CospadiError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted; finished matrices are kept, the same command resumes", err=True)
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
