"""The page of a comparison: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from cospadi.report import figures, tables
from cospadi.report.conventions import CONVENTIONS, RELATIVE_ERROR, conventions_of
from cospadi.report.files import write_text
from cospadi.report.markup import Child, element, extend
from cospadi.report.numbers import MISSING, THIN_SPACE, percent, plural, quantity, size
from cospadi.report.parts import (
    as_text,
    code,
    exact_size,
    facts,
    figure_section,
    page_text,
    section,
    whole,
)
from cospadi.report.ranking import RATIO_TOLERANCE, TIE_ERRORS, is_over_budget
from cospadi.report.result import DONE, PARTIAL, Result, read_result


def write_html(result: Mapping[str, Any], path: str | Path) -> None:
    """Write the page; see `html_text`.

    Raises
    ------
    InputError
        The data is not that of a comparison, or the file cannot be written.
    """
    write_text(path, html_text(result))


def html_text(result: Mapping[str, Any]) -> str:
    """The page as text. It depends on nothing but the data: the same data gives the same bytes."""
    data = read_result(result)
    sections = (
        _header(data),
        _best(data),
        _perplexity(data),
        _main(data),
        _tasks(data),
        _errors(data),
        _spectra(data),
        _failures(data),
        _conditions(data),
    )
    return page_text(data.title, sections)


# ---- Sections --------------------------------------------------------------------------------------------------------


def _header(data: Result) -> ET.Element:
    n_done = sum(run.status == DONE for run in data.runs)
    n_partial = sum(run.status == PARTIAL for run in data.runs)
    n_failed = len(data.runs) - n_done - n_partial
    states = [f"{n_done} complete", f"{n_partial} partial", f"{n_failed} failed"]
    counts = ", ".join(s for s, n in zip(states, (n_done, n_partial, n_failed), strict=True) if n)
    seeds = len({run.seed for run in data.runs})
    what = f"{plural(len(data.names), 'method')}, {plural(seeds, 'seed')}, {plural(len(data.runs), 'run')}"
    lead = element("p", class_="lead")
    extend(lead, f"{data.model.get('name', 'The model')} compressed: {what}")
    extend(lead, f" ({counts})." if data.runs else ". No run has finished yet.")
    if data.linear_bytes is not None:
        extend(
            lead, f" The compressed linears take {size(data.linear_bytes)} when dense (bfloat16);"
        )
        extend(lead, f" the runs removed {tables.size_range(data)}{THIN_SPACE}% of them.")
    dense = [f"{quantity(v)} on {t}" for t in data.texts if (v := data.dense_perplexity.get(t))]
    if dense:
        extend(lead, f" Perplexity of the dense model: {', '.join(dense)}.")
    conditions = facts(
        ("Calibration", _calibration(data)),
        ("Token ids, SHA-256", code(data.calibration.get("ids_sha256"))),
        ("Evaluation", _evaluation(data)),
        ("Command", code(data.command or None, "command")),
    )
    return element("header", element("h1", data.title), lead, conditions)


def _best(data: Result) -> ET.Element | None:
    table = tables.best_table(data)
    if table is None:
        return None
    note = (
        "Ranked are complete runs that store no more bytes than asked, up to "
        f"{percent(RATIO_TOLERANCE)} points of the dense size; positions, scales and padding count."
    )
    return section(
        "Lowest perplexity at equal stored bytes", table, element("p", note, class_="note")
    )


def _perplexity(data: Result) -> ET.Element | None:
    if not data.texts:
        return None
    figure = figures.perplexity_figure(data)
    caption = [
        "Perplexity (logarithmic) against the share of stored bytes removed from the linears; below the share, the "
        "bytes that are left. Down and to the right is better. All panels have the same axes.",
        *figure.notes,
    ]
    return figure_section("Perplexity against stored bytes", "Figure 1.", figure.panels, caption)


def _main(data: Result) -> ET.Element:
    conventions = conventions_of(data)
    notes: list[Child] = ["Within a ratio the rows are ordered by perplexity on the first text. "]
    n_seeds = tables.usual_seeds(data)
    several = n_seeds > 1
    if tables.best_table(data) is not None:
        notes.append("● lowest perplexity of the ratio")
        notes.append("; ○ its range over seeds overlaps that of the lowest. " if several else ". ")
    if several:
        notes.append(
            f"Means over {n_seeds} seeds unless a row has fewer; ± is the standard deviation over seeds; of the peaks, "
            "the highest. "
        )
    if any(is_over_budget(data, series) for series in data.series):
        notes.append("† stores more than was asked for, so it is not ranked. ")
    if any(run.is_resumed for run in data.runs if run.is_measured):
        notes.append(
            "‡ interrupted and resumed: seconds and memory are those of the last process. "
        )
    notes.append(f"{MISSING} not measured.")
    meanings = facts(
        *((CONVENTIONS[key][0], CONVENTIONS[key][1]) for key in conventions if key in CONVENTIONS)
    )
    explained = element(
        "p",
        "What “removed” counts, always against the dense bfloat16 weights (methods are ranked by stored bytes):",
        class_="note",
    )
    return section(
        "Sizes, perplexity and cost",
        element("p", element("b", "Table 1. "), *notes, class_="note"),
        tables.main_table(data),
        *((explained, meanings) if conventions else ()),
        style="across",
    )


def _tasks(data: Result) -> ET.Element | None:
    if not data.tasks:
        return None
    note = (
        "Higher is better. ± is the standard error over a task's questions, as the evaluation harness gives it; in "
        "brackets stands the standard deviation over seeds, if there are several. ● highest of the ratio; ○ within "
        f"{TIE_ERRORS:g} standard errors of the difference from the highest, question by question where the score of "
        "each is known (otherwise as if independent, which is cautious). The mean is unweighted, and given only where "
        "no task is missing."
    )
    caption = element("p", element("b", "Table 2. "), note, class_="note")
    return section("Zero-shot tasks", caption, tables.task_table(data), style="across")


def _errors(data: Result) -> ET.Element | None:
    ratio, runs = figures.chosen_runs(data)
    if not runs:
        return None
    figure = figures.error_figure(data)
    where = "" if ratio is None else f" at ratio {ratio:g}"
    caption = [
        f"{RELATIVE_ERROR}{where}: projections down, layers across; 0 is exact. One colour scale for all maps; numbers "
        "at the right are means of a row.",
        *figure.notes,
    ]
    return figure_section("Error by layer and projection", "Figure 2.", figure.panels, caption)


def _spectra(data: Result) -> ET.Element | None:
    if not data.spectra:
        return None
    figure = figures.spectrum_figure(data)
    caption = [
        "Singular values of the whitened weight, and how often each atom is used, both in descending order: from the "
        "largest (0 %) to the smallest (100 %), as shares of the largest (logarithmic; shares below the axis lie on "
        "it).",
        *figure.notes,
    ]
    return figure_section("Spectrum and use of the atoms", "Figure 3.", figure.panels, caption)


def _failures(data: Result) -> ET.Element | None:
    items = []
    for run in data.runs:
        if run.status != DONE:
            ratio = "" if run.ratio_asked is None else f", ratio {run.ratio_asked:g}"
            name = element("strong", f"{run.label}{ratio}, seed {run.seed}")
            reason = run.status
            if run.status == PARTIAL:
                reason = "partial: some modules stayed dense, so sizes and errors are those of the others"
            items.append(element("li", name, element("pre", reason)))
    if not items:
        return None
    return section("Runs that are not complete", element("ul", *items, class_="failures"))


def _conditions(data: Result) -> ET.Element:
    model = data.model
    conditions = facts(
        ("Model", as_text(model.get("name"))),
        ("Fingerprint of its weights", code(model.get("fingerprint"))),
        ("Parameters", whole(model.get("n_parameters"))),
        ("Dense linears, bfloat16", exact_size(data.linear_bytes)),
        ("Dense model, bfloat16", exact_size(model.get("model_bytes"))),
        ("Seeds", ", ".join(map(str, sorted({run.seed for run in data.runs})))),
        ("Machine", data.machine or None),
        ("Versions", ", ".join(f"{name} {value}" for name, value in data.versions.items()) or None),
    )
    return section("Conditions", conditions)


def _calibration(data: Result) -> str:
    return str(data.calibration.get("description") or "not known yet")


def _evaluation(data: Result) -> str | None:
    evaluation = data.evaluation
    parts = []
    if data.texts:
        context, windows = evaluation.get("context"), evaluation.get("windows")
        part = f"perplexity on {', '.join(data.texts)}"
        if context is not None:
            part += f", {context} tokens of context"
            part += ", all windows" if windows is None else f", first {windows} windows"
        parts.append(part)
    if data.tasks:
        limit = evaluation.get("task_limit")
        part = f"zero-shot {', '.join(data.tasks)}"
        parts.append(part + ("" if limit is None else f", first {limit} questions of each"))
    return "; ".join(parts) or None
