"""Options that say what a compression is to be: those of ``compress``, which ``plan`` takes, too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

METHOD_HELP = (
    "cospadi, svd-llm, svd, basis-sharing, compot, rocket, magnitude, wanda, sparsegpt, rtn or gptq "
    "[cospadi]."
)

Ratio = Annotated[
    float | None, typer.Option(help="Removed share of the compressed linears, 0 to 1 [0.2].")
]
Bits = Annotated[
    float | None,
    typer.Option(help="Bits per weight of the compressed linears, in place of a ratio."),
]
TargetSize = Annotated[
    str | None,
    typer.Option(help="Bytes of all weights of the result, such as 120MB, in place of a ratio."),
]
RatioConvention = Annotated[
    str | None,
    typer.Option(
        help="What the ratio counts: stored bytes with the mask [stored], or values only (nominal)."
    ),
]
Method = Annotated[str | None, typer.Option(help=METHOD_HELP)]
Preset = Annotated[
    str | None, typer.Option(help="Settings to start from: fast (the defaults), paper, best.")
]
Dictionary = Annotated[
    str | None,
    typer.Option(
        help="Atoms: learned, identity (the inputs), both: augmented, or the best for every linear: auto [augmented; "
        "learned where one of --solver, --iterations, --power-iterations, --k-over-s, --init is given; identity alone "
        "with --bits or --target-size]."
    ),
]
Solver = Annotated[
    str | None,
    typer.Option(help="Sparse coding: auto, omp, ormp, obs, niht, htp or admm [auto]."),
]
Iterations = Annotated[int | None, typer.Option(help="Alternations of coding and atom update [8].")]
PowerIterations = Annotated[
    int | None, typer.Option(help="Power iterations per atom; 0: to convergence [1].")
]
KOverS = Annotated[float | None, typer.Option(help="Atoms per coefficient of a column [2.5].")]
Init = Annotated[str | None, typer.Option(help="First dictionary: svd, columns or random [svd].")]
GroupSize = Annotated[
    int | None, typer.Option(help="Neighbouring layers that share a dictionary [1].")
]
CoeffsDtype = Annotated[
    str | None,
    typer.Option(
        help="Type of stored coefficients: bfloat16, float16, float32, bfloat14, int8, int6, int5, int4, int3, auto "
        "[bfloat16; auto with --bits or --target-size]."
    ),
]
DictionaryDtype = Annotated[
    str | None,
    typer.Option(help="Type of stored dictionaries: bfloat16, float16, float32, int8 [bfloat16]."),
]
Sequential = Annotated[
    bool,
    typer.Option("--sequential", help="Calibrate layers on the compressed layers before them."),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="Text, JSON-lines or token file, hub data set (with a range of documents: "
        "'file.jsonl[:800]'), 'builtin', or 'none' [builtin]."
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration windows [64].")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens per window [1024].")]
Seed = Annotated[int | None, typer.Option(help="Seed of the sample and of random inits [42].")]
Target = Annotated[
    list[str] | None,
    typer.Option(help="Regular expression on module names to compress; repeatable."),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Regular expression on module names to leave; repeatable."),
]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML file with any of these settings.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value, over file and options; repeatable."),
]

KEYS = {"target": "targets", "ignore": "ignore"}
"""Keys of a recipe that are not named as their options."""

SETTINGS = (
    "ratio",
    "bits",
    "target_size",
    "ratio_convention",
    "method",
    "preset",
    "dictionary",
    "solver",
    "iterations",
    "power_iterations",
    "k_over_s",
    "init",
    "group_size",
    "coeffs_dtype",
    "dictionary_dtype",
    "sequential",
    "calibration",
    "samples",
    "sequence_length",
    "seed",
    "target",
    "ignore",
)


def given_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """The recipe's part of a command's arguments, by the recipe's keys; a flag that was not given is None."""
    return {
        KEYS.get(name, name): None if arguments[name] is False else arguments[name]
        for name in SETTINGS
    }
