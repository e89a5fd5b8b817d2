"""``cospadi compress``."""

from __future__ import annotations

from pathlib import Path

import typer

from cospadi.cli.common import build_recipe, describe_ratio, megabytes, quiet_libraries
from cospadi.cli.live import make_listener

EXIT_PARTIAL = 3
METHOD_HELP = (
    "cospadi, svd-llm, svd, basis-sharing, compot, rocket, magnitude, wanda, sparsegpt, rtn or gptq "
    "[cospadi]."
)


def compress_command(
    model: str = typer.Argument(..., help="Hugging Face folder, hub id, or GGUF file."),
    out: Path = typer.Option(..., "--out", "-o", help="New directory for the smaller checkpoint."),
    ratio: float | None = typer.Option(
        None, help="Removed share of the compressed linears, 0 to 1 [0.2]."
    ),
    bits: float | None = typer.Option(
        None, help="Bits per weight of the compressed linears, in place of a ratio."
    ),
    target_size: str | None = typer.Option(
        None, help="Bytes of all weights of the result, such as 120MB, in place of a ratio."
    ),
    ratio_convention: str | None = typer.Option(
        None,
        help="What the ratio counts: stored bytes with the mask [stored], or values only (nominal).",
    ),
    method: str | None = typer.Option(None, help=METHOD_HELP),
    preset: str | None = typer.Option(
        None, help="Settings to start from: fast (the defaults), paper, best."
    ),
    dictionary: str | None = typer.Option(
        None,
        help="Atoms: learned, identity (the inputs), both: augmented, or the best for every linear: auto [augmented; "
        "learned where one of --solver, --iterations, --power-iterations, --k-over-s, --init is given].",
    ),
    solver: str | None = typer.Option(
        None, help="Sparse coding: auto, omp, ormp, obs, niht, htp or admm [auto]."
    ),
    iterations: int | None = typer.Option(None, help="Alternations of coding and atom update [8]."),
    power_iterations: int | None = typer.Option(
        None, help="Power iterations per atom; 0: to convergence [1]."
    ),
    k_over_s: float | None = typer.Option(None, help="Atoms per coefficient of a column [2.0]."),
    init: str | None = typer.Option(None, help="First dictionary: svd, columns or random [svd]."),
    group_size: int | None = typer.Option(
        None, help="Neighbouring layers that share a dictionary [1]."
    ),
    coeffs_dtype: str | None = typer.Option(
        None,
        help="Type of stored coefficients: bfloat16, bfloat14, int8, int4, ..., auto [bfloat16; auto with --bits or "
        "--target-size].",
    ),
    dictionary_dtype: str | None = typer.Option(
        None, help="Type of stored dictionaries: bfloat16, int8, ... [bfloat16]."
    ),
    sequential: bool = typer.Option(
        False, "--sequential", help="Calibrate layers on the compressed layers before them."
    ),
    calibration: str | None = typer.Option(
        None,
        help="Text, JSON-lines or token file, hub data set (with a range of documents: "
        "'file.jsonl[:800]'), 'builtin', or 'none' [builtin].",
    ),
    samples: int | None = typer.Option(None, help="Calibration windows [64]."),
    sequence_length: int | None = typer.Option(None, help="Tokens per window [1024]."),
    seed: int | None = typer.Option(None, help="Seed of the sample and of random inits [42]."),
    target: list[str] = typer.Option(
        [], help="Regular expression on module names to compress; repeatable."
    ),
    ignore: list[str] = typer.Option(
        [], help="Regular expression on module names to leave; repeatable."
    ),
    recipe: Path | None = typer.Option(None, help="YAML file with any of these settings."),
    settings: list[str] = typer.Option(
        [], "--set", help="key=value, over file and options; repeatable."
    ),
    gram_cache: Path | None = typer.Option(
        None, help="Folder that keeps activation statistics for further runs."
    ),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    threads: int | None = typer.Option(None, help="Threads; all cores by default."),
) -> None:
    """Compress MODEL into the directory --out, a normal Hugging Face folder.

    Finished matrices are kept in OUT.work: after Ctrl-C or a crash the same command resumes. OUT.log.jsonl
    holds one JSON line per event. Exit code 3: some layers had to stay dense.
    """
    quiet_libraries()
    options = {
        "ratio": ratio,
        "bits": bits,
        "target_size": target_size,
        "ratio_convention": ratio_convention,
        "method": method,
        "preset": preset,
        "group_size": group_size,
        "coeffs_dtype": coeffs_dtype,
        "dictionary_dtype": dictionary_dtype,
        "sequential": sequential or None,
        "dictionary": dictionary,
        "solver": solver,
        "iterations": iterations,
        "power_iterations": power_iterations,
        "k_over_s": k_over_s,
        "init": init,
        "calibration": calibration,
        "samples": samples,
        "sequence_length": sequence_length,
        "seed": seed,
        "targets": target,
        "ignore": ignore,
    }
    built = build_recipe(recipe, options, settings)
    from cospadi.pipeline.compress import compress

    with make_listener() as listener:
        result = compress(
            model,
            out,
            built,
            device=device,
            num_threads=threads,
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
            f"partial: {len(result.failed)} layers stayed dense: {', '.join(result.failed)}",
            err=True,
        )
        raise typer.Exit(EXIT_PARTIAL)
