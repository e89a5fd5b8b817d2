"""The tables of the page: sizes, perplexities and costs; zero-shot tasks; the best of each ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from cospadi.report import svg
from cospadi.report.conventions import conventions_of, heading
from cospadi.report.markup import Child, element, extend
from cospadi.report.numbers import (
    MISSING,
    THIN_SPACE,
    byte_unit,
    decimals_of,
    in_unit,
    percent,
    plural,
    quantity,
    seconds,
)
from cospadi.report.ranking import (
    Mark,
    is_over_budget,
    is_ranked,
    mark_perplexity,
    mark_task,
    stored_ratio,
)
from cospadi.report.result import Result, Run, Score, Series, Spread

BRIEF_REASON = 160
"""Characters of a failure's reason that a table shows; the page lists the whole of it below."""

MARKS: dict[Mark, tuple[str, str]] = {
    "best": ("●", "best of this ratio"),
    "tie": ("○", "not told apart from the best"),
}


@dataclass(frozen=True)
class Shown:
    """Content of a cell: the value, and in small below it how well it is known."""

    value: str
    detail: str | None = None


NOTHING = Shown(MISSING)


@dataclass(frozen=True)
class Column:
    """A column below a common heading.

    Attributes
    ----------
    group, name : str
        Upper and lower heading.
    cell : callable
        Content of the cell of a series.
    dense : str
        Content in the row of the dense model.
    mark : callable, optional
        Marks of a block of equal ratio, by name of the series.
    """

    group: str
    name: str
    cell: Callable[[Series], Shown]
    dense: Shown
    mark: Callable[[Sequence[Series]], dict[str, Mark]] | None = None


def main_table(result: Result) -> ET.Element:
    """Sizes in every convention, perplexities, seconds and memory; a block per ratio asked, best perplexity first."""
    columns = [
        _stored_column(result),
        *_perplexity_columns(result),
        *_ratio_columns(result),
        *_cost_columns(result),
    ]
    return _table(result, columns)


def task_table(result: Result) -> ET.Element:
    """Zero-shot tasks with standard errors and their mean; rows as in `main_table`."""
    return _table(result, _task_columns(result))


# ---- Columns ---------------------------------------------------------------------------------------------------------


def _stored_column(result: Result) -> Column:
    sizes = [run.stored_bytes for run in result.runs if run.stored_bytes is not None]
    unit = byte_unit(max(sizes, default=result.linear_bytes or 0))

    def stored(series: Series) -> Shown:
        found = series.stored_bytes()
        if found is None:
            return NOTHING
        ends = dict.fromkeys((in_unit(found.low, unit), in_unit(found.high, unit)))
        over = f"{THIN_SPACE}†" if is_over_budget(result, series) else ""
        return Shown("–".join(ends) + over)

    dense = NOTHING if result.linear_bytes is None else Shown(in_unit(result.linear_bytes, unit))
    return Column("Linears", unit[0], stored, dense)


def _ratio_columns(result: Result) -> list[Column]:
    def columns(group: str, ratios: Callable[[Run], dict[str, float]]) -> list[Column]:
        return [
            Column(group, heading(key), _share(ratios, key), Shown(percent(0.0)))
            for key in conventions_of(result)
        ]

    return [
        *columns("Removed, linears (%)", lambda run: run.ratio),
        *columns("Removed, whole model (%)", lambda run: run.model_ratio),
    ]


def _share(ratios: Callable[[Run], dict[str, float]], key: str) -> Callable[[Series], Shown]:
    def cell(series: Series) -> Shown:
        found = series.over_seeds(lambda run: ratios(run).get(key))
        return NOTHING if found is None else Shown(percent(found.mean))

    return cell


def _perplexity_columns(result: Result) -> list[Column]:
    def column(text: str) -> Column:
        dense = result.dense_perplexity.get(text)
        return Column(
            "Perplexity",
            text,
            lambda series: _perplexity(series.perplexity(text)),
            NOTHING if dense is None else Shown(quantity(dense)),
            lambda block: mark_perplexity(result, block, text),
        )

    return [column(text) for text in result.texts]


def _perplexity(found: Spread | None) -> Shown:
    if found is None:
        return NOTHING
    places = decimals_of(found.mean)
    deviation = "" if found.deviation is None else f" ± {quantity(found.deviation, places)}"
    return Shown(quantity(found.mean, places) + deviation)


def _cost_columns(result: Result) -> list[Column]:
    def time(key: str, name: str) -> Column:
        def cell(series: Series) -> Shown:
            found = series.over_seeds(lambda run: run.seconds.get(key))
            if found is None:
                return NOTHING
            is_resumed = key == "total" and any(run.is_resumed for run in series.measured)
            return Shown(seconds(found.mean) + (f"{THIN_SPACE}‡" if is_resumed else ""))

        return Column("Seconds", name, cell, NOTHING)

    peaks = [run.peak_memory_bytes for run in result.runs if run.peak_memory_bytes is not None]
    unit = byte_unit(max(peaks, default=0))

    def peak(series: Series) -> Shown:
        found = series.over_seeds(lambda run: run.peak_memory_bytes)
        return NOTHING if found is None else Shown(in_unit(found.high, unit))

    return [
        time("calibration", "calibr."),
        time("fit", "fit"),
        time("total", "total"),
        Column("Peak", unit[0], peak, NOTHING),
    ]


def _task_columns(result: Result) -> list[Column]:
    def column(task: str) -> Column:
        def cell(series: Series) -> Shown:
            found = series.task(task)
            if found is None:
                return NOTHING
            return _score(Score(found.mean, series.task_stderr(task)), found.deviation)

        dense = result.dense_tasks.get(task)
        return Column(
            "Task",
            task,
            cell,
            NOTHING if dense is None else _score(dense),
            lambda block: mark_task(result, block, task),
        )

    columns = [column(task) for task in result.tasks]
    if len(columns) > 1:
        dense = [result.dense_tasks[task] for task in result.tasks if task in result.dense_tasks]

        def mean(series: Series) -> Shown:
            return _mean_score(_scores(result, series), len(result.tasks))

        columns.append(Column("All", "mean", mean, _mean_score(dense, len(result.tasks))))
    return columns


def _scores(result: Result, series: Series) -> list[Score]:
    found = [(series.task(task), series.task_stderr(task)) for task in result.tasks]
    return [Score(value.mean, error) for value, error in found if value is not None]


def _score(score: Score, deviation: float | None = None) -> Shown:
    parts = [] if score.stderr is None else [f"± {score.stderr:.3f}"]
    if deviation is not None:
        parts.append(f"[{deviation:.3f}]")
    return Shown(f"{score.value:.3f}".replace("-", "−"), " ".join(parts) or None)


def _mean_score(scores: Sequence[Score], n_tasks: int) -> Shown:
    """Unweighted mean over tasks, if none is missing; the errors of different tasks are independent."""
    if len(scores) < n_tasks:
        return NOTHING
    errors = [score.stderr for score in scores if score.stderr is not None]
    error = math.hypot(*errors) / n_tasks if len(errors) == n_tasks else None
    return _score(Score(sum(score.value for score in scores) / n_tasks, error))


# ---- Table -----------------------------------------------------------------------------------------------------------


def _table(result: Result, columns: Sequence[Column]) -> ET.Element:
    groups: list[tuple[str, int]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    firsts = _first_of_groups(columns)
    head = element(
        "thead",
        element(
            "tr",
            element("th", "Method", rowspan="2", scope="col", class_="name"),
            *(
                element("th", name, colspan=str(n), scope="colgroup", class_="first")
                for name, n in groups
            ),
        ),
        element(
            "tr",
            *(
                element("th", c.name, scope="col", class_="first" if i in firsts else None)
                for i, c in enumerate(columns)
            ),
        ),
    )
    dense_cells = [
        _value_cell(c.dense, None, "first" if i in firsts else None) for i, c in enumerate(columns)
    ]
    dense = element("tr", element("th", "dense", scope="row", class_="name"), *dense_cells)
    table = element("table", head, element("tbody", dense))
    for ratio, block in result.blocks():
        table.append(_block(result, columns, firsts, ratio, block))
    return element("div", table, class_="scroll wide", tabindex="0")


def _first_of_groups(columns: Sequence[Column]) -> set[int]:
    return {i for i, c in enumerate(columns) if i == 0 or columns[i - 1].group != c.group}


def _block(
    result: Result,
    columns: Sequence[Column],
    firsts: set[int],
    ratio: float | None,
    block: Sequence[Series],
) -> ET.Element:
    label = "Size given by the method" if ratio is None else f"Ratio {ratio:g} asked"
    body = element("tbody")
    width = str(1 + len(columns))
    body.append(
        element("tr", element("th", label, colspan=width, scope="rowgroup"), class_="block")
    )
    marks = [column.mark(block) if column.mark else {} for column in columns]
    for series in sorted(block, key=lambda s: _order(result, s)):
        row = element("tr", _name_cell(result, series))
        if series.measured:
            for i, column in enumerate(columns):
                mark = marks[i].get(series.name)
                first = "first" if i in firsts else None
                row.append(_value_cell(column.cell(series), mark, first))
        else:
            reason = _brief(series.runs[0].status)
            row.append(element("td", f"✕ {reason}", colspan=str(len(columns)), class_="failed"))
        body.append(row)
    return body


def _order(result: Result, series: Series) -> tuple[int, float]:
    """Ascending perplexity on the first text; without one, descending mean task value; failures last."""
    if not series.measured:
        return (2, 0.0)
    for text in result.texts[:1]:
        found = series.perplexity(text)
        return (1, 0.0) if found is None else (0, found.mean)
    scores = _scores(result, series)
    return (0, -sum(s.value for s in scores) / len(scores)) if scores else (1, 0.0)


def _name_cell(result: Result, series: Series) -> ET.Element:
    index = result.names.index(series.name)
    key = element("svg", svg.marker(index, 6, 6), viewBox="0 0 12 12", class_="mark-key")
    key.set("aria-hidden", "true")
    cell = element("th", key, element("span", series.name), scope="row", class_="name")
    n_used = len(series.measured)
    remarks = []
    if n_used < usual_seeds(result):
        remarks.append(f"{n_used} of {plural(usual_seeds(result), 'seed')}")
    if series.measured and not series.is_complete:
        remarks.append("partial: not all modules compressed")
    if remarks:
        cell.append(element("small", ", ".join(remarks)))
    return cell


def _value_cell(shown: Shown, mark: Mark | None, style: str | None) -> ET.Element:
    detail = None if shown.detail is None else element("small", shown.detail)
    if mark is None:
        return element("td", shown.value, detail, class_=style)
    sign, meaning = MARKS[mark]
    symbol = element("span", sign, class_="sign", title=meaning, role="img", aria_label=meaning)
    classes = " ".join(filter(None, (style, mark)))
    return element("td", symbol, shown.value, detail, class_=classes)


def usual_seeds(result: Result) -> int:
    """The largest number of seeds of a series; rows with fewer measured runs say so."""
    return max((len(series.runs) for series in result.series), default=1)


def _brief(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= BRIEF_REASON else line[: BRIEF_REASON - 1] + "…"


# ---- Best of each ratio ----------------------------------------------------------------------------------------------


def best_table(result: Result) -> ET.Element | None:
    """Per ratio and text: the lowest perplexity, its multiple of the dense one, and the distance of the next.

    None unless two methods can be compared at one ratio.
    """
    rows = []
    for ratio, block in result.blocks():
        cells = [_best_cell(result, block, text) for text in result.texts]
        if ratio is not None and any(cell is not None for cell in cells):
            row = element("tr", element("th", f"{ratio:g}", scope="row"))
            rows.append(extend(row, *(cell or element("td", MISSING) for cell in cells)))
    if not rows:
        return None
    heads = (element("th", text, scope="col") for text in result.texts)
    head = element("tr", element("th", "Ratio asked", scope="col"), *heads)
    table = element("table", element("thead", head), element("tbody", *rows), class_="best-of")
    return element("div", table, class_="scroll", tabindex="0")


def _best_cell(result: Result, block: Sequence[Series], text: str) -> ET.Element | None:
    ranked = [(s, found) for s in block if is_ranked(result, s) and (found := s.perplexity(text))]
    if len(ranked) < 2:
        return None
    (best, lowest), (second, runner) = sorted(ranked, key=lambda pair: pair[1].mean)[:2]
    dense = result.dense_perplexity.get(text)
    parts: list[Child] = [element("strong", best.name), f" {quantity(lowest.mean)}"]
    if dense:
        parts.append(f" ({quantity(lowest.mean / dense, 2)}{THIN_SPACE}× dense)")
    distance = f"{percent(runner.mean / lowest.mean - 1)}{THIN_SPACE}% above"
    if mark_perplexity(result, block, text).get(second.name) == "tie":
        distance += ", seeds overlap"
    parts.append(element("small", f"next: {second.name}, {distance}"))
    return element("td", *parts)


def size_range(result: Result) -> str:
    """Smallest and largest removed share of stored bytes among the measured series, in percent."""
    shares = [share for s in result.series if (share := stored_ratio(result, s)) is not None]
    if not shares:
        return MISSING
    return "–".join(dict.fromkeys((percent(min(shares)), percent(max(shares)))))
