"""The ``cospadi`` command."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from typing import NoReturn

import typer

from cospadi.cli import (
    bench,
    compare,
    compress,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    plan,
    recipe,
    report,
    verify,
    worker,
)
from cospadi.errors import CospadiError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

_RESUMABLE = ("compress", "compare")
# click's UsageError, the base of all that the parser raises; newer versions of typer carry a click of their own, out of
# which they publish this subclass only.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


class _Terminated(BaseException):
    """SIGTERM came."""


app = typer.Typer(
    name="cospadi",
    help="Shrink a large language model to a byte budget by calibration-guided sparse dictionaries.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("compress")(compress.compress_command)
app.command("compare")(compare.compare_command)
app.command("eval")(evaluate.eval_command)
app.command("generate")(generate.generate_command)
app.command("inspect")(inspect.inspect_command)
app.add_typer(recipe.recipe_app, name="recipe")
app.command("report")(report.report_command)
app.command("verify")(verify.verify_command)
app.command("export")(export.export_command)
app.command("bench")(bench.bench_command)
app.command("plan")(plan.plan_command)
app.command("worker")(worker.worker_command)
app.command("doctor")(doctor.doctor_command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from cospadi import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(EXIT_USAGE)


def main() -> None:
    """Entry point: errors become one line on stderr and the documented exit code.

    0 ok, 1 internal, 2 usage or input, 3 partial result, 4 verification failed, 130 interrupted, 143 terminated.
    """
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run())


def _terminate(_number: int, _frame: object) -> NoReturn:
    """Turn a scheduler's SIGTERM into an exception, so that workers and half-written files are cleared away."""
    raise _Terminated


def _run() -> int:
    """Run the command of ``sys.argv`` and return the exit code."""
    try:
        # typer's own handling of errors prints several lines, and nothing at all for Ctrl-C
        result = app(standalone_mode=False)
    except CospadiError as error:
        return _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        result = EXIT_INTERRUPTED
    except _Terminated:
        return _say_ended("terminated", EXIT_TERMINATED)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "cospadi"
        return _report(f"{error.format_message().rstrip('.')} (see {command} --help)", EXIT_USAGE)
    # the code of a typer.Exit, to which typer turns Ctrl-C too; None from a command that ran to its end
    code = result if isinstance(result, int) else 0
    return _say_ended("interrupted", code) if code == EXIT_INTERRUPTED else code


def _say_ended(how: str, code: int) -> int:
    resumes = any(argument in _RESUMABLE for argument in sys.argv[1:2])
    kept = "; what is finished is kept, the same command resumes" if resumes else ""
    typer.echo(f"{how}{kept}", err=True)
    return code


def _report(text: str, code: int) -> int:
    typer.echo(f"error: {' '.join(text.split())}", err=True)
    return code


if __name__ == "__main__":
    main()
