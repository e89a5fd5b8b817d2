"""Which number of a table is the best, and which ones cannot be told from it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from cospadi.report.result import Result, Series

Mark = Literal["best", "tie"]

RATIO_TOLERANCE = 0.005
"""A run may keep this share of the dense bytes more than asked for and still be ranked: sizes come in whole atoms."""

TIE_ERRORS = 2.0
"""Task values closer than this many standard errors of their difference are not told apart."""


def stored_ratio(result: Result, series: Series) -> float | None:
    """Removed share of the stored bytes of the linears; None if unknown."""
    stored = series.stored_bytes()
    if stored is None or not result.linear_bytes:
        return None
    return 1.0 - stored.mean / result.linear_bytes


def is_over_budget(result: Result, series: Series) -> bool:
    """Whether a series stores more bytes than its ratio allows, beyond `RATIO_TOLERANCE`."""
    ratio = stored_ratio(result, series)
    if ratio is None or series.ratio_asked is None:
        return False
    return ratio < series.ratio_asked - RATIO_TOLERANCE


def is_ranked(result: Result, series: Series) -> bool:
    """Whether a series takes part in a ranking: complete, asked for a ratio, and within it."""
    return (
        series.is_complete
        and series.ratio_asked is not None
        and stored_ratio(result, series) is not None
        and not is_over_budget(result, series)
    )


def mark_perplexity(result: Result, block: Sequence[Series], text: str) -> dict[str, Mark]:
    """Mark the lowest mean perplexity of a block of equal ratio.

    A tie is a series whose range over seeds overlaps that of the best; with one seed there is no range, hence no tie
    except equality.

    Returns
    -------
    dict
        ``best`` or ``tie`` by name of the series; empty unless two series are ranked.
    """
    spreads = {s.name: s.perplexity(text) for s in block if is_ranked(result, s)}
    found = {name: value for name, value in spreads.items() if value is not None}
    if len(found) < 2:
        return {}
    best = min(found, key=lambda name: found[name].mean)
    marks: dict[str, Mark] = {
        name: "tie" for name, value in found.items() if value.low <= found[best].high
    }
    return {**marks, best: "best"}


def mark_task(result: Result, block: Sequence[Series], task: str) -> dict[str, Mark]:
    """Mark the highest mean value of a task in a block of equal ratio; ties by `TIE_ERRORS` and `difference_error`."""
    found = {}
    for series in block:
        value = series.task(task)
        if value is not None and is_ranked(result, series):
            found[series.name] = (value.mean, series)
    if len(found) < 2:
        return {}
    best = max(found, key=lambda name: found[name][0])
    top, winner = found[best]
    marks: dict[str, Mark] = {
        name: "tie"
        for name, (value, series) in found.items()
        if top - value <= TIE_ERRORS * difference_error(winner, series, task)
    }
    return {**marks, best: "best"}


def difference_error(a: Series, b: Series, task: str) -> float:
    """Standard error, over the questions, of the difference of two series in a task.

    Paired where both tell their score of every question: two compressions of one model mostly fail at the same
    questions, so the difference is known far better than either value. Otherwise the two standard errors are taken as
    independent, and a tie is called too often rather than too seldom.
    """
    items_a, items_b = a.task_items(task), b.task_items(task)
    if items_a is not None and items_b is not None:
        (id_a, scores_a), (id_b, scores_b) = items_a, items_b
        if id_a == id_b and len(scores_a) == len(scores_b) > 1:
            differences = [x - y for x, y in zip(scores_a, scores_b, strict=True)]
            return statistics.stdev(differences) / math.sqrt(len(differences))
    return math.hypot(a.task_stderr(task) or 0.0, b.task_stderr(task) or 0.0)
