"""``cospadi compare``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import typer

from cospadi.cli.common import number_list, quiet_libraries, word_list

EXIT_PARTIAL = 3


def compare_command(
    model: str = typer.Argument(..., help="Hugging Face folder, hub id, or GGUF file."),
    out: Path = typer.Option(
        ..., "--out", "-o", help="Folder of the comparison; run again to go on."
    ),
    methods: str = typer.Option(
        "cospadi,svd-llm",
        help="Comma-separated methods, each with blank-separated settings of its own: "
        "'cospadi,cospadi group_size=2,svd-llm'.",
    ),
    ratios: str = typer.Option("0.2,0.3,0.4", help="Comma-separated removed shares of the bytes."),
    seeds: str = typer.Option("42", help="Comma-separated seeds; several give a spread."),
    calibration: str = typer.Option("builtin", help="Calibration text, the same for all."),
    samples: int = typer.Option(64, help="Calibration windows."),
    sequence_length: int = typer.Option(1024, help="Tokens per window."),
    text: list[str] = typer.Option(
        [], help="Text for perplexity; repeatable [builtin unless --tasks is given]."
    ),
    context: int = typer.Option(1024, help="Tokens per window of the perplexity."),
    windows: int | None = typer.Option(None, help="Use only the first N windows of each text."),
    tasks: str = typer.Option("", help="Comma-separated zero-shot tasks, as in `eval --tasks`."),
    task_data: str | None = typer.Option(None, help="Folder with the tasks' JSON-lines files."),
    task_limit: int | None = typer.Option(None, help="Use only the first N items of each task."),
    recipe: Path | None = typer.Option(None, help="YAML file with settings of all cells."),
    settings: list[str] = typer.Option([], "--set", help="key=value for all cells; repeatable."),
    title: str = typer.Option("", help="Heading of the report."),
    keep_models: bool = typer.Option(
        False, "--keep-models", help="Keep the compressed weights after measuring them."
    ),
    threads: int | None = typer.Option(None, help="Threads of every command."),
) -> None:
    """Compress MODEL by several methods at several ratios, measure all, and write one report.

    OUT/index.html is the report, OUT/results.csv and OUT/results.json hold its numbers; all three are renewed after
    every cell. Run the same command again after an interruption. Exit code 3: a cell failed or stayed partial.
    """
    quiet_libraries()
    from cospadi.pipeline.cell import Evaluation, parse_methods
    from cospadi.pipeline.compare import Comparison, compare, failed_runs
    from cospadi.pipeline.recipe_file import load_recipe, parse_setting

    common = load_recipe(recipe) if recipe is not None else {}
    common |= {
        "calibration": calibration,
        "samples": samples,
        "sequence_length": sequence_length,
        **dict(parse_setting(item) for item in settings),
    }
    task_names = tuple(word_list("--tasks", tasks)) if tasks else ()
    evaluation = Evaluation(
        texts=tuple(text) or (() if task_names else ("builtin",)),
        context=context,
        windows=windows,
        tasks=task_names,
        task_data=task_data,
        task_limit=task_limit,
    )
    comparison = Comparison(
        model=model,
        methods=parse_methods(methods),
        ratios=tuple(number_list("--ratios", ratios, float)),
        seeds=tuple(number_list("--seeds", seeds, int)),
        evaluation=evaluation,
        common=common,
        title=title,
        command=shlex.join(["cospadi", *sys.argv[1:]]),
    )
    result = compare(comparison, out, keep_models=keep_models, threads=threads, progress=typer.echo)
    typer.echo(f"{out / 'index.html'}: {len(result['runs'])} runs")
    failed = failed_runs(result)
    for line in failed:
        typer.echo(f"not complete: {line}", err=True)
    if failed:
        raise typer.Exit(EXIT_PARTIAL)
