"""``cospadi generate``."""

from __future__ import annotations

from pathlib import Path

import typer

from cospadi.cli.common import check_json, quiet_libraries, set_threads, show_warning, write_json


def generate_command(
    model: str = typer.Argument(
        ..., help="Compressed directory, Hugging Face folder, hub id, or GGUF file."
    ),
    prompt: str = typer.Option(..., "--prompt", "-p", help="Text to continue."),
    max_new_tokens: int = typer.Option(64, help="Tokens to add."),
    dtype: str | None = typer.Option(
        None, help="bfloat16, float16 or float32 [as stored; GGUF: float32]."
    ),
    threads: int | None = typer.Option(None, help="Threads; all cores by default."),
    json_out: Path | None = typer.Option(
        None, "--json", help="Write text and speed as JSON; - for stdout."
    ),
) -> None:
    """Continue a prompt greedily and print tokens per second of decoding (prefill not counted)."""
    quiet_libraries()
    set_threads(threads)
    check_json(json_out)
    from cospadi.evaluation.generation import generate_text
    from cospadi.pipeline.open_model import open_model, require_tokenizer

    require_tokenizer(model)
    opened, tokenizer = open_model(model, dtype=dtype, warn=show_warning)
    text, speed = generate_text(opened, tokenizer, prompt, max_new_tokens)
    write_json(json_out, {"prompt": prompt, "text": text, "tokens_per_second": speed})
    if str(json_out) != "-":
        typer.echo(text)
        typer.echo(f"[{speed:.1f} tokens/s]", err=True)
