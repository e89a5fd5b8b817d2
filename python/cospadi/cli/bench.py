"""``cospadi bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cospadi.cli.common import (
    check_json,
    megabytes,
    number_list,
    quiet_libraries,
    word_list,
    write_json,
)
from cospadi.errors import InputError

if TYPE_CHECKING:
    from cospadi.evaluation.linear_speed import LinearSpeed
    from cospadi.evaluation.model_speed import ModelSpeed


def bench_command(
    model: Path | None = typer.Argument(
        None, help="Compressed directory; without one, single linears are measured."
    ),
    shapes: str = typer.Option(
        "llama-3.2-1b",
        help="Linears: names of models, or sizes like 2048x8192 (inputs x outputs), by commas.",
    ),
    rows: str = typer.Option("1,4,16,128,1024", help="Linears: rows of the input."),
    ratios: str = typer.Option("0.2,0.4", help="Linears: removed shares of the bytes."),
    coeffs: str = typer.Option(
        "bfloat16,int8", help="Linears: types of the coefficients, at the same K and s."
    ),
    prompt_tokens: int = typer.Option(128, help="Models: length of the prompt."),
    new_tokens: int = typer.Option(16, help="Models: tokens decoded behind it."),
    repeats: int = typer.Option(9, help="Rounds, in each of which every contender has its turn."),
    memory_mb: int = typer.Option(
        256, help="Linears: copies of a matrix taken in turn; more than the caches together."
    ),
    threads: int | None = typer.Option(None, help="Threads; all cores by default."),
    json_out: Path | None = typer.Option(None, "--json", help="Write as JSON; - for stdout."),
) -> None:
    """Measure speed against dense linears in the same run, faster or slower.

    Without a model: compressed linears of real shapes with random values against torch's dense ones. With one: tokens
    per second of the checkpoint and of its dense self.
    """
    quiet_libraries()
    check_json(json_out)
    import torch

    count = torch.get_num_threads() if threads is None else threads
    if count < 1 or repeats < 1 or memory_mb < 0:
        raise InputError("--threads and --repeats: expected at least 1; --memory-mb: at least 0")
    quiet = str(json_out) == "-"
    torch.manual_seed(0)
    if model is not None:
        _bench_model(model, prompt_tokens, new_tokens, repeats, count, json_out, quiet)
        return
    from cospadi import native
    from cospadi.evaluation.linear_speed import measure_linears
    from cospadi.evaluation.timing import gemm_peak, read_peak
    from cospadi.versions import versions

    chosen = _chosen_shapes(shapes)
    row_counts = number_list("--rows", rows, int)
    kinds = tuple(word_list("--coeffs", coeffs))
    allowed = ("bfloat16", *native.CODE_FORMATS)
    if min(row_counts) < 1 or any(kind not in allowed for kind in kinds):
        raise InputError(
            f"--rows: expected at least 1; --coeffs: expected {', '.join(allowed)}; got {rows}; {coeffs}"
        )
    peaks = {
        "read_bytes_per_s": read_peak(count),
        "gemm_bf16_flops_per_s": gemm_peak(torch.bfloat16, count),
        "gemm_fp32_flops_per_s": gemm_peak(torch.float32, count),
    }
    if not quiet:
        info = native.runtime_info()
        typer.echo(
            f"{count} threads, {info['isa']}; this machine reads {peaks['read_bytes_per_s'] / 1e9:.1f} GB/s and "
            f"multiplies {peaks['gemm_bf16_flops_per_s'] / 1e9:.0f} (bf16) and "
            f"{peaks['gemm_fp32_flops_per_s'] / 1e9:.0f} (fp32) GFLOP/s"
        )
    found: list[dict[str, object]] = []
    for ratio in number_list("--ratios", ratios, float):
        for d_in, d_out in chosen:
            for row_count in row_counts:
                results = measure_linears(
                    d_in,
                    d_out,
                    ratio=ratio,
                    rows=row_count,
                    coeffs=kinds,
                    threads=count,
                    repeats=repeats,
                    megabytes=memory_mb,
                )
                found += [{"ratio": ratio, **one.as_json()} for one in results]
                if not quiet:
                    _show_linears(ratio, results, peaks)
    write_json(
        json_out,
        {
            "versions": versions(),
            "runtime": native.runtime_info(),
            "peaks": peaks,
            "linears": found,
        },
    )


def _chosen_shapes(text: str) -> list[tuple[int, int]]:
    from cospadi.evaluation.linear_speed import SHAPES

    chosen: list[tuple[int, int]] = []
    for word in word_list("--shapes", text):
        if word in SHAPES:
            chosen += SHAPES[word]
            continue
        sizes = word.split("x")
        if len(sizes) != 2 or not all(size.isdigit() and int(size) > 0 for size in sizes):
            raise InputError(
                f"--shapes {word!r}: expected sizes like 2048x8192 or one of {', '.join(SHAPES)}"
            )
        chosen.append((int(sizes[0]), int(sizes[1])))
    return list(dict.fromkeys(chosen))


def _show_linears(ratio: float, results: list[LinearSpeed], peaks: dict[str, float]) -> None:
    from cospadi.evaluation.linear_speed import OWN_DENSE, TORCH_BF16

    by_name = {one.variant: one.timing.median for one in results}
    first = results[0]
    typer.echo(
        f"\n{first.d_in} x {first.d_out}, {ratio:.0%} of bytes removed (K = {first.n_atoms}, s = {first.sparsity}), "
        f"{first.rows} row{'s' if first.rows > 1 else ''}, from memory"
    )
    typer.echo(
        f"  {'':24} {'ms (quartiles)':>24} {'MB':>7} {'GB/s':>6} {'of read':>8} {'GFLOP/s':>8} "
        f"{'x torch bf16':>13} {'x our dense':>12}"
    )
    for one in results:
        timing = one.timing
        spread = (
            f"{1e3 * timing.median:.3f} ({1e3 * timing.lower_quartile:.3f}-"
            f"{1e3 * timing.upper_quartile:.3f})"
        )
        factor = by_name[TORCH_BF16] / timing.median
        verdict = "" if one.n_atoms == 0 and one.sparsity == one.d_in else _verdict(factor)
        typer.echo(
            f"  {one.variant:24} {spread:>24} {one.bytes / 1e6:7.2f} {one.byte_rate / 1e9:6.1f} "
            f"{one.byte_rate / peaks['read_bytes_per_s']:8.0%} {one.flop_rate / 1e9:8.0f} {factor:13.2f} "
            f"{by_name[OWN_DENSE] / timing.median:12.2f}{verdict}"
        )


def _verdict(factor: float) -> str:
    return "  faster" if factor > 1 else "  SLOWER than dense"


def _bench_model(
    path: Path,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    threads: int,
    json_out: Path | None,
    quiet: bool,
) -> None:
    from cospadi.evaluation.model_speed import measure_models
    from cospadi.versions import versions

    compressed, dense = measure_models(
        path, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, threads=threads
    )
    write_json(
        json_out,
        {
            "versions": versions(),
            "threads": threads,
            "models": [compressed.as_json(), dense.as_json()],
        },
    )
    if quiet:
        return
    typer.echo(f"{path}, bfloat16, batch 1, {threads} threads, {prompt_tokens} tokens of prompt")
    for one in (compressed, dense):
        typer.echo(_model_line(one))
    decode = compressed.tokens_per_second / dense.tokens_per_second
    prefill = compressed.prompt_tokens_per_second / dense.prompt_tokens_per_second
    by_bytes = dense.linear_bytes / compressed.linear_bytes
    typer.echo(
        f"decoding {decode:.2f} times as fast as dense{_verdict(decode)} (the linears' bytes alone would give "
        f"{by_bytes:.2f}), prompt {prefill:.2f}{_verdict(prefill)}"
    )


def _model_line(one: ModelSpeed) -> str:
    decode = one.decode
    return (
        f"  {one.variant:11} {one.tokens_per_second:8.2f} tokens/s ({1 / decode.upper_quartile:.2f}-"
        f"{1 / decode.lower_quartile:.2f}) decoding, {one.prompt_tokens_per_second:8.1f} tokens/s of the prompt, "
        f"linears {megabytes(one.linear_bytes)}"
    )
