"""The ``cospadi`` command."""

from __future__ import annotations

import os
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
EXIT_CLOSED_PIPE = 141
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
# One line each in the list of commands, where the first sentence of a docstring would be cut.
for _name, _command, _summary in (
    ("compress", compress.compress_command, "Write a smaller copy of a model."),
    ("compare", compare.compare_command, "Compress by several methods and measure each result."),
    ("eval", evaluate.eval_command, "Measure perplexity and zero-shot accuracy."),
    ("generate", generate.generate_command, "Continue a prompt greedily, with the speed."),
    ("inspect", inspect.inspect_command, "Show what is in a compressed directory."),
    ("report", report.report_command, "Write report and card again, with new measurements."),
    ("verify", verify.verify_command, "Check a compressed directory, its stated errors too."),
    ("export", export.export_command, "Write a dense model, or ONNX."),
    ("bench", bench.bench_command, "Measure speed against dense linears."),
    ("plan", plan.plan_command, "Show sizes, memory and time before compressing."),
    ("worker", worker.worker_command, "Fit matrices of a run that has --workers."),
    ("doctor", doctor.doctor_command, "Print what a bug report needs about this machine."),
):
    app.command(_name, short_help=_summary)(_command)
app.add_typer(recipe.recipe_app, name="recipe", short_help="Write, show and check recipes.")


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

    0 ok, 1 internal, 2 usage or input, 3 partial result, 4 verification failed, 130 interrupted, 141 nobody reads the
    output any more, 143 terminated.
    """
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = _run()
        sys.stdout.flush()  # at the interpreter's exit an error could not be caught
    except BrokenPipeError:
        code = EXIT_CLOSED_PIPE
    except SystemExit as stop:  # what typer makes of it
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        code = EXIT_CLOSED_PIPE
    if code == EXIT_CLOSED_PIPE:
        _drop_output()
    sys.exit(code)


def _drop_output() -> None:
    """Send what is still buffered nowhere, so that the interpreter's exit says nothing of the closed pipe."""
    with suppress(OSError, ValueError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
