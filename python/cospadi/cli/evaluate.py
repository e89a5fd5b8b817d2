"""``cospadi eval``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cospadi.cli.common import (
    check_json,
    quiet_libraries,
    set_threads,
    show_warning,
    word_list,
    write_json,
)
from cospadi.cli.live import duration
from cospadi.errors import InputError

if TYPE_CHECKING:
    from cospadi.evaluation.tasks import TaskResults


def eval_command(
    model: str = typer.Argument(
        ..., help="Compressed directory, Hugging Face folder, hub id, or GGUF file."
    ),
    text: str | None = typer.Option(
        None,
        help="Measure perplexity on a text, JSON-lines or token file, or 'builtin' for the held-out half.",
    ),
    context: int = typer.Option(1024, help="Tokens per window."),
    windows: int | None = typer.Option(None, help="Use only the first N windows."),
    batch_size: int = typer.Option(1, help="Windows per forward pass."),
    tasks: str | None = typer.Option(
        None,
        help="Measure zero-shot accuracy on comma-separated tasks of lm-evaluation-harness, for example piqa,arc_easy.",
    ),
    task_data: Path | None = typer.Option(
        None,
        help="Folder with <task>_<split>.jsonl files such as piqa_validation.jsonl; no network then [the hub].",
    ),
    limit: int | None = typer.Option(None, help="Use only the first N items of each task."),
    task_batch_size: int = typer.Option(8, help="Task requests per forward pass."),
    dtype: str = typer.Option("float32", help="Compute in bfloat16, float16 or float32."),
    threads: int | None = typer.Option(None, help="Threads; all cores by default."),
    json_out: Path | None = typer.Option(
        None, "--json", help="Write the result as JSON; - for stdout."
    ),
) -> None:
    """Perplexity and zero-shot accuracy of a model, dense or compressed, under pinned protocols.

    Perplexity: one tokenisation of the whole text, non-overlapping windows, tail dropped, fp32 loss, token-weighted
    mean; a non-finite window is an error. Tasks: the definitions of the installed lm-evaluation-harness, no examples
    in the prompt, no chat template; normalised accuracy where a task defines it.
    """
    quiet_libraries()
    set_threads(threads)
    check_json(json_out)
    if text is None and tasks is None:
        raise InputError("eval: nothing to measure: give --text, --tasks, or both")
    if tasks is None and (task_data is not None or limit is not None):
        raise InputError("eval: --task-data and --limit belong to --tasks, which is missing")
    names = word_list("--tasks", tasks) if tasks is not None else []
    if names:
        from cospadi.evaluation.tasks import check_tasks

        check_tasks(names, data_dir=task_data)
    from cospadi.checkpoint.manifest import has_manifest, manifest_sha256
    from cospadi.native.heap import keep_heap
    from cospadi.pipeline.open_model import open_model, require_tokenizer

    keep_heap()
    if names or not str(text).endswith(".safetensors"):  # a file of token ids needs none
        require_tokenizer(model)
    opened, tokenizer = open_model(model, dtype=dtype, warn=show_warning)
    data: dict[str, Any] = {"model": model}
    if has_manifest(model):
        data["manifest_sha256"] = manifest_sha256(model)
    quiet = str(json_out) == "-"
    if text is not None:
        from cospadi.evaluation.perplexity import evaluate_perplexity, tokenize_text

        ids = tokenize_text(tokenizer, text)
        perplexity = evaluate_perplexity(
            opened,
            ids,
            context=context,
            windows=windows,
            batch_size=batch_size,
            progress=_progress_line("perplexity", "windows") if sys.stderr.isatty() else None,
        )
        data |= perplexity.to_dict() | {"text": text}
        if not quiet:
            typer.echo(
                f"perplexity {perplexity.perplexity:.4f}  nll/token {perplexity.nll_per_token:.5f}  "
                f"{perplexity.windows} windows of {perplexity.context}  {perplexity.seconds:.0f} s"
            )
    if names:
        from cospadi.evaluation.tasks import evaluate_tasks

        results = evaluate_tasks(
            opened,
            tokenizer,
            names,
            data_dir=task_data,
            limit=limit,
            batch_size=task_batch_size,
            progress=_task_progress() if sys.stderr.isatty() else None,
        )
        data |= results.to_dict()
        if not quiet:
            _print_tasks(results)
    write_json(json_out, data)


def _progress_line(name: str, unit: str) -> Callable[[int, int], None]:
    """Return what redraws one line of a terminal with the time left, and clears it at the end."""
    start = time.monotonic()

    def show(finished: int, total: int) -> None:
        line = ""
        if finished < total:
            left = (time.monotonic() - start) * (total - finished) / max(finished, 1)
            line = f"{name}: {finished} of {total} {unit}, {duration(left)} left"
        typer.echo(f"\r\x1b[K{line}", nl=False, err=True)

    return show


def _task_progress() -> Callable[[str, int, int], None]:
    """Return a line for each task."""
    lines: dict[str, Callable[[int, int], None]] = {}

    def show(task: str, finished: int, total: int) -> None:
        lines.setdefault(task, _progress_line(task, "requests"))(finished, total)

    return show


def _print_tasks(results: TaskResults) -> None:
    for name, result in results.tasks.items():
        typer.echo(
            f"{name}  {result.metric} {_with_error(result.value, result.stderr)}  "
            f"acc {result.acc:.4f}  {result.items} of {result.items_available} items  {result.seconds:.0f} s"
        )
        if result.perplexity is not None:
            typer.echo(f"{name}  perplexity of the answers {result.perplexity:.4f}")
        for warning in result.warnings:
            typer.echo(f"{name}  harness warning: {warning}", err=True)
    if len(results.tasks) > 1:
        average = _with_error(results.average, results.average_stderr)
        typer.echo(f"average of {len(results.tasks)} tasks  {average}")


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f} ± {'?' if stderr is None else format(stderr, '.4f')}"
