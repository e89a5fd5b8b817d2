"""``cospadi compress``."""

from __future__ import annotations

from pathlib import Path

import typer

from cospadi.cli import options
from cospadi.cli.common import build_recipe, describe_ratio, megabytes, quiet_libraries
from cospadi.cli.live import make_listener

EXIT_PARTIAL = 3


def compress_command(
    model: str = typer.Argument(..., help="Hugging Face folder, hub id, or GGUF file."),
    out: Path = typer.Option(..., "--out", "-o", help="New directory for the smaller checkpoint."),
    ratio: options.Ratio = None,
    bits: options.Bits = None,
    target_size: options.TargetSize = None,
    ratio_convention: options.RatioConvention = None,
    method: options.Method = None,
    preset: options.Preset = None,
    dictionary: options.Dictionary = None,
    solver: options.Solver = None,
    iterations: options.Iterations = None,
    power_iterations: options.PowerIterations = None,
    k_over_s: options.KOverS = None,
    init: options.Init = None,
    group_size: options.GroupSize = None,
    coeffs_dtype: options.CoeffsDtype = None,
    dictionary_dtype: options.DictionaryDtype = None,
    sequential: options.Sequential = False,
    calibration: options.Calibration = None,
    samples: options.Samples = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    target: options.Target = None,
    ignore: options.Ignore = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    gram_cache: Path | None = typer.Option(
        None, help="Folder that keeps activation statistics for further runs."
    ),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    products: str = typer.Option(
        "float32", help="On a GPU, of the largest products: float32, tf32x3 or tf32."
    ),
    threads: int | None = typer.Option(
        None, help="Threads of every process; all cores by default, divided among the workers."
    ),
    workers: int | None = typer.Option(
        None, help="Processes that fit; 0: only those that join with 'cospadi worker OUT.work'."
    ),
    max_memory: str | None = typer.Option(
        None, help="Memory of all processes of the run, such as 2GB; what does not fit is streamed."
    ),
    spill: bool = typer.Option(False, "--spill", help="Keep hidden states on disk."),
    executor: str = typer.Option(
        "local", help="local or ray (an existing cluster, or one made here)."
    ),
) -> None:
    """Compress MODEL into the directory --out, a normal Hugging Face folder.

    Finished matrices are kept in OUT.work: after Ctrl-C or a crash the same command resumes. OUT.log.jsonl
    holds one JSON line per event. Exit code 3: some layers had to stay dense.
    """
    given = options.given_settings(locals())
    quiet_libraries()
    built = build_recipe(recipe, given, settings or [])
    from cospadi.native.heap import keep_heap
    from cospadi.pipeline.compress import compress

    if max_memory is None:
        keep_heap()
    with make_listener() as listener:
        result = compress(
            model,
            out,
            built,
            device=device,
            products=products,
            num_threads=threads,
            workers=workers,
            max_memory=max_memory,
            spill=spill,
            executor=executor,  # type: ignore[arg-type]
            gram_cache=gram_cache,
            listener=listener.handle,
        )
    typer.echo(
        f"{result.out_dir}: {len(result.reports)} linears, {megabytes(result.dense_bytes)} in bfloat16 -> "
        f"{megabytes(result.stored_bytes)}; {describe_ratio(result.ratio)}; {result.seconds:.0f} s"
        + (f"; {len(result.dense)} more stayed dense, see above" if result.dense else "")
    )
    if result.failed:
        typer.echo(
            f"partial: {len(result.failed)} layer{'s' if len(result.failed) > 1 else ''} stayed dense: "
            f"{', '.join(result.failed)}",
            err=True,
        )
        raise typer.Exit(EXIT_PARTIAL)
