"""``cospadi recipe init | show | validate | schema``."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import typer

from cospadi.errors import InputError

recipe_app = typer.Typer(
    help="Write, show and check recipes: YAML files with the settings of a compression.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@recipe_app.command("init")
def init_command(
    preset: str | None = typer.Option(None, help="Settings to start from: fast, paper, best."),
    out: Path | None = typer.Option(None, "--out", "-o", help="New file [standard output]."),
) -> None:
    """Write a recipe with every setting, its value and what it is for."""
    from cospadi.pipeline.recipe_help import starting_file

    text = starting_file(preset)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        with out.open("x", encoding="utf-8") as sink:
            sink.write(text)
    except FileExistsError:
        raise InputError(f"{out}: exists; choose another --out") from None
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from None
    typer.echo(str(out))


@recipe_app.command("show")
def show_command(
    recipe: str = typer.Argument(..., help="YAML file, or a preset: fast, paper, best."),
) -> None:
    """Print every setting that a recipe or a preset comes to, as YAML."""
    from cospadi.pipeline.presets import PRESETS
    from cospadi.pipeline.recipe_file import read_recipe, recipe_from_mapping

    is_known = recipe in PRESETS
    with suppress(OSError):  # a name that no file can have
        is_known = is_known or Path(recipe).exists()
    if not is_known:
        raise InputError(
            f"recipe {recipe}: cannot be read: no such file, and no preset either: {', '.join(PRESETS)}"
        )
    built = recipe_from_mapping({"preset": recipe}) if recipe in PRESETS else read_recipe(recipe)
    typer.echo(built.to_yaml(), nl=False)


@recipe_app.command(
    "validate", short_help="Check a recipe; an error is named by file, line and key."
)
def validate_command(recipe: Path = typer.Argument(..., help="YAML file.")) -> None:
    """Check a recipe; the first error is named with file, line and key, the next one once it is corrected.

    Exit code 2: it cannot be used.
    """
    from cospadi.pipeline.recipe_file import read_recipe

    read_recipe(recipe)
    typer.echo(f"{recipe}: valid")


@recipe_app.command("schema")
def schema_command() -> None:
    """Print the JSON schema of recipes, for editors."""
    from cospadi.pipeline.recipe_help import schema

    typer.echo(json.dumps(schema(), indent=1))
