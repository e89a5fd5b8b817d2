"""Perplexities and task scores that were measured after a compression, read from the files of ``cospadi eval``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from xml.etree import ElementTree as ET

from cospadi.errors import InputError
from cospadi.report import plain
from cospadi.report.markup import element
from cospadi.report.numbers import MISSING, THIN_SPACE, percent, quantity

ORIGINAL = "original"
COMPRESSED = "compressed"
ROLES = (ORIGINAL, COMPRESSED)
"""Parts that a measured model may have in a report; any other model goes by its name."""

PERPLEXITY = "perplexity"


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
    role : str, optional
        One of `ROLES`, where it is known.
    """

    model: str
    what: str
    metric: str
    value: float
    stderr: float | None
    protocol: str
    role: str | None = None

    @property
    def label(self) -> str:
        """What readers know the model by."""
        return self.role or self.model

    @property
    def shown_value(self) -> str:
        """The value: a share with four decimals, a perplexity with as many digits as mean something."""
        return quantity(self.value) if self.metric == PERPLEXITY else f"{self.value:.4f}"

    @property
    def heading(self) -> str:
        """Name of the text, without the folder that it lay in, or of the task."""
        return PurePath(self.what).name if self.metric == PERPLEXITY else self.what


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
        scores.append(Score(model, text, PERPLEXITY, perplexity, None, protocol))
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


def kept_scores(value: object, where: str) -> list[Score]:
    """Numbers as `to_plain` gave them, read back from a folder that may come from strangers.

    Raises
    ------
    InputError
        One of them is damaged; the message names the place.
    """
    scores = []
    for i, item in enumerate(plain.sequence(value, where)):
        place = f"{where}[{i}]"
        data = plain.mapping(item, place)
        model, what, metric, protocol = (
            plain.text(plain.required(data, key, place), f"{place}.{key}")
            for key in ("model", "what", "metric", "protocol")
        )
        number = plain.number(plain.required(data, "value", place), f"{place}.value")
        stderr = plain.number(data.get("stderr"), f"{place}.stderr")
        role = data.get("role")
        if number is None or role not in (None, *ROLES):
            raise InputError(f"{place}: expected a value, and no role or one of {', '.join(ROLES)}")
        scores.append(Score(model, what, metric, number, stderr, protocol, role))
    return scores


def to_plain(scores: Iterable[Score]) -> list[dict[str, Any]]:
    """Numbers as plain data."""
    return [dataclasses.asdict(score) for score in scores]


def merged(old: Iterable[Score], new: Iterable[Score]) -> list[Score]:
    """All of them; of the same model on the same text or task only the newest."""
    found: list[Score] = []
    for score in (*old, *new):
        found = [
            other
            for other in found
            if (other.what, other.metric) != (score.what, score.metric)
            or not _is_same_model(other, score)
        ]
        found.append(score)
    return found


def _is_same_model(one: Score, other: Score) -> bool:
    """By role where both have one, else by name: a model may have got its role later."""
    if one.role is not None and other.role is not None:
        return one.role == other.role
    return one.model == other.model


def blocks_of(scores: Sequence[Score]) -> list[list[Score]]:
    """One list per text or task and protocol, so that only what is comparable stands together; the original first."""
    blocks: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores:
        blocks.setdefault((score.what, score.metric, score.protocol), []).append(score)
    order = {ORIGINAL: 0, COMPRESSED: 1}
    return [sorted(block, key=lambda s: order.get(s.label, 2)) for block in blocks.values()]


def original_of(block: Sequence[Score]) -> Score | None:
    """The original model's number of a block."""
    return next((score for score in block if score.role == ORIGINAL), None)


def difference(score: Score, original: Score | None) -> str:
    """How a number differs from the original's: ``+1.28 (+5.6 %)``, for shares ``−0.0123``."""
    if original is None or score is original:
        return MISSING
    change = score.value - original.value
    sign = "+" if change >= 0 else "−"
    if score.metric != PERPLEXITY:
        return f"{sign}{abs(change):.4f}"
    if original.value <= 0:
        return f"{sign}{quantity(abs(change))}"
    relative = percent(abs(change) / original.value)
    return f"{sign}{quantity(abs(change))} ({sign}{relative}{THIN_SPACE}%)"


def before_and_after(scores: Sequence[Score]) -> list[tuple[Score, Score]]:
    """Perplexities of the original and of the compressed model under one protocol."""
    pairs = []
    for block in blocks_of(scores):
        original = original_of(block)
        compressed = next((score for score in block if score.role == COMPRESSED), None)
        if original is not None and compressed is not None and original.metric == PERPLEXITY:
            pairs.append((original, compressed))
    return pairs


def score_table(scores: Sequence[Score]) -> ET.Element:
    """A block of rows per text or task and protocol."""
    heads = ("Model", "value", "± standard error", "difference")
    head = element("tr", *(element("th", name, scope="col") for name in heads))
    table = element("table", element("thead", head), class_="plain")
    for block in blocks_of(scores):
        first, original = block[0], original_of(block)
        label = f"{first.heading}, {first.metric} ({first.protocol})"
        body = element(
            "tbody",
            element("tr", element("th", label, colspan="4", scope="rowgroup"), class_="block"),
        )
        for score in block:
            error = MISSING if score.stderr is None else f"{score.stderr:.4f}"
            values = (score.shown_value, error, difference(score, original))
            cells = (element("td", value) for value in values)
            body.append(element("tr", element("th", score.label, scope="row"), *cells))
        table.append(body)
    return element("div", table, class_="scroll hinted", tabindex="0")
