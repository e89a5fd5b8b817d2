"""Perplexities and task scores that were measured after a compression, read from the files of ``cospadi eval``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from cospadi.errors import InputError
from cospadi.report import plain
from cospadi.report.markup import element
from cospadi.report.numbers import MISSING, quantity


@dataclass(frozen=True)
class Score:
    """A number that `cospadi eval` measured.

    Attributes
    ----------
    model : str
        As it was called on the command line.
    what : str
        The text or the task.
    metric : str
        ``perplexity``, ``acc``, ``acc_norm``.
    protocol : str
        What must be equal for two numbers to be comparable: windows, context and hash of the ids; items of the task.
    """

    model: str
    what: str
    metric: str
    value: float
    stderr: float | None
    protocol: str


def read_scores(data: Mapping[str, Any], where: str) -> list[Score]:
    """Numbers of one JSON file of ``cospadi eval``.

    Raises
    ------
    InputError
        It is no such file, or damaged.
    """
    model = plain.text(plain.required(data, "model", where), f"{where}: model")
    scores = []
    perplexity = plain.number(data.get("perplexity"), f"{where}: perplexity")
    if perplexity is not None:
        windows = plain.count(data, "windows", where)
        context = plain.count(data, "context", where)
        ids = str(data.get("ids_sha256", "unknown"))
        protocol = f"{windows} windows of {context} tokens, ids {ids[:12]}"
        text = str(data.get("text", "text"))
        scores.append(Score(model, text, "perplexity", perplexity, None, protocol))
    for task, item in plain.mapping(data.get("tasks"), f"{where}: tasks").items():
        entry = plain.mapping(item, f"{where}: tasks[{task!r}]")
        value = plain.number(entry.get("value"), f"{where}: tasks[{task!r}].value")
        if value is not None:
            stderr = plain.number(entry.get("stderr"), f"{where}: tasks[{task!r}].stderr")
            metric, items = str(entry.get("metric", "score")), entry.get("items")
            scores.append(Score(model, task, metric, value, stderr, f"{items} items"))
    if not scores:
        raise InputError(
            f"{where}: holds neither a perplexity nor tasks; pass what eval --json wrote"
        )
    return scores


def score_table(scores: Sequence[Score]) -> ET.Element:
    """A block of rows per text or task and protocol, so that only what is comparable stands together."""
    blocks: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores:
        blocks.setdefault((score.what, score.metric, score.protocol), []).append(score)
    heads = ("Model", "value", "± standard error")
    head = element("tr", *(element("th", name, scope="col") for name in heads))
    table = element("table", element("thead", head), class_="plain")
    for (what, metric, protocol), members in blocks.items():
        label = f"{what}, {metric} ({protocol})"
        body = element(
            "tbody",
            element("tr", element("th", label, colspan="3", scope="rowgroup"), class_="block"),
        )
        for score in members:
            is_share = metric != "perplexity"
            value = f"{score.value:.4f}" if is_share else quantity(score.value)
            error = MISSING if score.stderr is None else f"{score.stderr:.4f}"
            cells = (element("td", value), element("td", error))
            body.append(element("tr", element("th", score.model, scope="row"), *cells))
        table.append(body)
    return element("div", table, class_="scroll", tabindex="0")
