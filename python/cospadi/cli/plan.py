"""``cospadi plan``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cospadi.cli import options
from cospadi.cli.common import (
    build_recipe,
    describe_ratio,
    megabytes,
    quiet_libraries,
    set_threads,
    write_json,
)
from cospadi.cli.live import duration
from cospadi.errors import InputError

if TYPE_CHECKING:
    from cospadi.factor.spec import FactorSpec


def plan_command(
    model: str = typer.Argument(..., help="Hugging Face folder, hub id, or GGUF file."),
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
    max_memory: str | None = typer.Option(
        None, help="Memory of all processes of the run; the plan says how it would be kept."
    ),
    workers: int | None = typer.Option(None, help="Processes that fit."),
    threads: int | None = typer.Option(None, help="Threads of each process; all cores by default."),
    device: str = typer.Option(
        "cpu", help="cpu or cuda, which need not be there: its memory is computed from shapes."
    ),
    json_out: Path | None = typer.Option(
        None, "--json", help="Write the plan as JSON; - for stdout."
    ),
) -> None:
    """Show what compress would do to MODEL: sizes and bytes, what stays dense and why; memory, disk, time.

    Reads no weights. Memory and disk are bounds, interpreter included; time is estimated from this machine's speed now.
    A GPU's memory is computed and was not measured on a card; its time is not estimated.

    Takes the options of compress that say what is to be done. With allocation by loss, or dictionary auto, sizes are
    those of even shares and augmented dictionaries: what linears get is decided by their fits.
    """
    given = options.given_settings(locals())
    quiet_libraries()
    set_threads(threads)
    built = build_recipe(recipe, given, settings or [])
    from cospadi.calibration.ids import check_length
    from cospadi.model.discover import discover
    from cospadi.model.source import source_shapes
    from cospadi.pipeline.plan import make_plan
    from cospadi.pipeline.resources import resources
    from cospadi.pipeline.target_size import with_ratio_for_size

    shapes = source_shapes(model).model
    targets, skipped = discover(shapes, targets=built.targets or None, ignore=built.ignore or None)
    built = with_ratio_for_size(shapes, targets, skipped, built)
    plan = make_plan(targets, skipped, built)
    found = resources(
        model, shapes, targets, plan, built, max_memory=max_memory, workers=workers, device=device
    )
    if built.uses_calibration:
        try:
            check_length(shapes, built.sequence_length)
        except InputError as error:  # sizes hold all the same
            typer.echo(f"note: compress will refuse this: {error}", err=True)
    write_json(json_out, plan.to_mapping() | {"resources": found})
    if str(json_out) == "-":
        return
    kinds = Counter(replace(m.spec, bias=False) for m in plan.modules)
    typer.echo(
        f"{'in':>7} {'out':>7} {'identity':>9} {'atoms':>7} {'s':>6} {'coefficients':>13} {'count':>6} "
        f"{'bytes each':>14}"
    )
    for spec, count in sorted(kinds.items(), key=_size_order):
        note = "" if spec.owns_dictionary else "  dictionary of another layer"
        typer.echo(
            f"{spec.d_in:>7} {spec.d_out:>7} {spec.n_identity:>9} {spec.n_atoms:>7} {spec.sparsity:>6} "
            f"{spec.coeffs_dtype:>13} {count:>6} {spec.stored_bytes:>14,}{note}"
        )
    for item in plan.dense:
        typer.echo(f"left dense: {item.name}: {item.reason}")
    typer.echo(
        f"{len(plan.modules)} linears: {megabytes(plan.dense_bits / 8)} in bfloat16 -> "
        f"{megabytes(plan.stored_bits / 8)}; {describe_ratio(plan.ratio)}"
    )
    shown: tuple[int, ...] | None = None
    for way in found["ways"]:
        figures = way["peak_bytes"], way["work_disk_bytes"], way["output_bytes"]
        if figures == shown and not way["is_chosen"]:
            continue  # smaller batches, say, where something else is the most
        shown = figures
        typer.echo(
            f"{'* ' if way['is_chosen'] else '  '}memory {megabytes(way['peak_bytes'])} {way['how']}; disk "
            f"{megabytes(way['work_disk_bytes'])} while it runs, {megabytes(way['output_bytes'])} in the end"
        )
    typer.echo("* is the way that will be taken")
    if found["device"] is not None:
        _show_device(found["device"])
        return
    seconds = found["seconds"]
    typer.echo(
        f"time, about: {', '.join(f'{stage} {duration(t)}' for stage, t in seconds.items())} with "
        f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
        + (f" in each of {workers} workers" if workers else "")
    )


def _size_order(item: tuple[FactorSpec, int]) -> tuple[int, int, int]:
    spec, _ = item
    return spec.d_in, spec.d_out, spec.stored_bits


def _show_device(gpu: Mapping[str, Any]) -> None:
    """Memory of a GPU."""
    note = "GPU memory, computed and not measured on a card"
    if "not_computed" in gpu:
        typer.echo(f"{note}: not known with {gpu['not_computed']}; the whole model lies there")
        return
    ways = [f"{megabytes(gpu['resident']['peak_bytes'])} with the whole model there"]
    if gpu["by_block"] is not None:
        ways.append(f"{megabytes(gpu['by_block']['peak_bytes'])} one block at a time")
    if not gpu["model_bytes"]:
        ways = [f"{megabytes(gpu['by_block']['peak_bytes'])}, fits alone"]
    typer.echo(f"{note}: {'; '.join(ways)}")
    typer.echo("time on a GPU: not estimated")
