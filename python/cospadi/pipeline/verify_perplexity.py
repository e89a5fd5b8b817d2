"""Measuring again what `cospadi eval` said of a compressed folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cospadi.errors import InputError, VerificationError, brief
from cospadi.evaluation.perplexity import evaluate_perplexity, tokenize_text
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.pipeline.measurements import plain_object
from cospadi.pipeline.open_model import open_model

_Kind = TypeVar("_Kind", float, int, str)

TOLERANCE = 1e-3
"""Relative, of the perplexity: other threads and processors round sums differently."""


def verify_perplexity(
    directory: str | Path,
    stated: str | Path,
    *,
    text: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """Measure a perplexity again: same text, windows and arithmetic.

    Parameters
    ----------
    directory : str or Path
        Compressed directory.
    stated : str or Path
        JSON of ``cospadi eval DIRECTORY --text ... --json``.
    text : str, optional
        Where the text is now, if it moved.
    progress : callable, optional
        Told windows done and in all.

    Returns
    -------
    (float, float)
        The stated perplexity and the measured one.

    Raises
    ------
    InputError
        The file states no perplexity of a text, or the text cannot be read.
    VerificationError
        The text's tokens are others, or the perplexity differs by more than `TOLERANCE`.
    """
    data = plain_object(Path(stated))

    def field(name: str, kind: type[_Kind]) -> _Kind:
        value = data.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(
                f"{stated}: {name}: expected what eval --text --json writes, got {brief(value)}"
            )
        return value

    expected = field("perplexity", float)
    context, windows = field("context", int), field("windows", int)
    dtype, ids_hash = field("dtype", str), field("ids_sha256", str)
    if dtype not in STORAGE_DTYPES or not math.isfinite(expected):
        raise InputError(f"{stated}: dtype {brief(dtype)}, perplexity {expected}: not of eval")
    model, tokenizer = open_model(directory, dtype=dtype)
    ids = tokenize_text(tokenizer, text or field("text", str))
    found = evaluate_perplexity(
        model,
        ids,
        context=context,
        windows=windows,
        progress=progress,
    )
    if found.ids_sha256 != ids_hash:
        raise VerificationError(
            f"{stated}: the tokens of its text hash to {found.ids_sha256} here and to {ids_hash} there: another text "
            "or tokenizer"
        )
    if not abs(found.perplexity - expected) <= TOLERANCE * expected:
        raise VerificationError(
            f"{directory}: perplexity is stated as {expected:.4f} in {stated}, measured {found.perplexity:.4f}"
        )
    return expected, found.perplexity
