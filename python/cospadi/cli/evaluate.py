"""``cospadi eval``."""

from __future__ import annotations

from pathlib import Path

import typer

from cospadi.cli.common import quiet_libraries, set_threads, write_json


def eval_command(
    model: str = typer.Argument(
        ..., help="Compressed directory, Hugging Face folder, hub id, or GGUF file."
    ),
    text: str = typer.Option(
        ..., help="Text, JSON-lines or token file, or 'builtin' for the held-out half."
    ),
    context: int = typer.Option(1024, help="Tokens per window."),
    windows: int | None = typer.Option(None, help="Use only the first N windows."),
    batch_size: int = typer.Option(1, help="Windows per forward pass."),
    dtype: str = typer.Option("float32", help="Compute in bfloat16, float16 or float32."),
    threads: int | None = typer.Option(None, help="Threads; all cores by default."),
    json_out: Path | None = typer.Option(
        None, "--json", help="Write the result as JSON; - for stdout."
    ),
) -> None:
    """Perplexity of a model, dense or compressed, under one pinned protocol.

    One tokenisation of the whole text, non-overlapping windows, tail dropped, fp32 loss, token-weighted mean; a
    non-finite window is an error.
    """
    quiet_libraries()
    set_threads(threads)
    from cospadi.evaluation.perplexity import evaluate_perplexity, tokenize_text
    from cospadi.pipeline.open_model import open_model

    opened, tokenizer = open_model(model, dtype=dtype)
    ids = tokenize_text(tokenizer, text)
    result = evaluate_perplexity(
        opened, ids, context=context, windows=windows, batch_size=batch_size
    )
    data = result.to_dict() | {"model": model, "text": text}
    write_json(json_out, data)
    if str(json_out) != "-":
        typer.echo(
            f"perplexity {result.perplexity:.4f}  nll/token {result.nll_per_token:.5f}  "
            f"{result.windows} windows of {result.context}  {result.seconds:.0f} s"
        )
