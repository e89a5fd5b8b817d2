"""``cospadi plan``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import typer

from cospadi.cli.common import (
    build_recipe,
    describe_ratio,
    megabytes,
    quiet_libraries,
    write_json,
)


def plan_command(
    model: str = typer.Argument(..., help="Hugging Face folder, hub id, or GGUF file."),
    ratio: float | None = typer.Option(
        None, help="Removed share of the compressed linears, 0 to 1 [0.2]."
    ),
    bits: float | None = typer.Option(
        None, help="Bits per weight of the compressed linears, in place of a ratio."
    ),
    target_size: str | None = typer.Option(
        None, help="Bytes of all weights of the result, such as 120MB, in place of a ratio."
    ),
    ratio_convention: str | None = typer.Option(None, help="stored or nominal [stored]."),
    method: str | None = typer.Option(None, help="As in compress [cospadi]."),
    preset: str | None = typer.Option(None, help="As in compress [fast]."),
    k_over_s: float | None = typer.Option(None, help="Atoms per coefficient of a column [2.0]."),
    target: list[str] = typer.Option(
        [], help="Regular expression on module names to compress; repeatable."
    ),
    ignore: list[str] = typer.Option(
        [], help="Regular expression on module names to leave; repeatable."
    ),
    recipe: Path | None = typer.Option(None, help="YAML file with any of these settings."),
    settings: list[str] = typer.Option([], "--set", help="key=value; repeatable."),
    json_out: Path | None = typer.Option(
        None, "--json", help="Write the plan as JSON; - for stdout."
    ),
) -> None:
    """Show what compress would do to MODEL: sizes and bytes, what stays dense and why. Reads no weights."""
    quiet_libraries()
    options = {
        "ratio": ratio,
        "bits": bits,
        "target_size": target_size,
        "ratio_convention": ratio_convention,
        "method": method,
        "preset": preset,
        "k_over_s": k_over_s,
        "targets": target,
        "ignore": ignore,
    }
    built = build_recipe(recipe, options, settings)
    from cospadi.model.discover import discover
    from cospadi.model.source import source_shapes
    from cospadi.pipeline.plan import make_plan
    from cospadi.pipeline.target_size import with_ratio_for_size

    shapes = source_shapes(model).model
    targets, skipped = discover(shapes, targets=built.targets or None, ignore=built.ignore or None)
    built = with_ratio_for_size(shapes, targets, skipped, built)
    plan = make_plan(targets, skipped, built)
    write_json(json_out, plan.to_mapping())
    if str(json_out) == "-":
        return
    kinds = Counter(m.spec for m in plan.modules)
    typer.echo(
        f"{'in':>7} {'out':>7} {'identity':>9} {'atoms':>7} {'s':>6} {'count':>6} {'bytes each':>14}"
    )
    for spec, count in sorted(kinds.items(), key=lambda item: (item[0].d_in, item[0].d_out)):
        note = "" if spec.owns_dictionary else "  dictionary of another layer"
        typer.echo(
            f"{spec.d_in:>7} {spec.d_out:>7} {spec.n_identity:>9} {spec.n_atoms:>7} {spec.sparsity:>6} {count:>6} "
            f"{spec.stored_bytes:>14,}{note}"
        )
    for item in plan.dense:
        typer.echo(f"left dense: {item.name}: {item.reason}")
    typer.echo(
        f"{len(plan.modules)} linears: {megabytes(plan.dense_bits / 8)} in bfloat16 -> "
        f"{megabytes(plan.stored_bits / 8)}; {describe_ratio(plan.ratio)}"
    )
