"""Perplexities and task scores that were measured after a compression, read from the files of ``cospadi eval``."""

from __future__ import annotations

import dataclasses
import math
import statistics
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
    parts : tuple of float
        Loss per token of every window, or score of every question: what differences are paired over. May be missing.
    """

    model: str
    what: str
    metric: str
    value: float
    stderr: float | None
    protocol: str
    role: str | None = None
    parts: tuple[float, ...] = ()

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

    @property
    def shown_error(self) -> str:
        """The standard error like the value; MISSING where it is not known."""
        if self.stderr is None:
            return MISSING
        return quantity(self.stderr) if self.metric == PERPLEXITY else f"{self.stderr:.4f}"


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
        windows, context = _whole(data, "windows", where), _whole(data, "context", where)
        ids, text = _text(data, "ids_sha256", where), _text(data, "text", where)
        protocol = f"{windows} windows of {context} tokens, ids {ids[:12]}"
        losses = _parts(data, "window_nll", windows, where)
        error = _mean_error(losses)  # of the mean loss; that of its exponential to first order
        stderr = None if error is None else perplexity * error
        scores.append(Score(model, text, PERPLEXITY, perplexity, stderr, protocol, None, losses))
    for task, item in plain.mapping(data.get("tasks"), f"{where}: tasks").items():
        place = f"{where}: tasks[{task!r}]"
        entry = plain.mapping(item, place)
        value = plain.number(plain.required(entry, "value", place), f"{place}.value")
        if value is None:
            raise InputError(f"{place}.value: expected a number, got null")
        stderr = plain.number(entry.get("stderr"), f"{place}.stderr")
        metric, items = _text(entry, "metric", place), _whole(entry, "items", place)
        protocol = f"{items} items, questions {_text(entry, 'items_sha256', place)[:12]}"
        answers = _parts(entry, "item_scores", items, place)
        scores.append(Score(model, task, metric, value, stderr, protocol, None, answers))
    if not scores:
        raise InputError(
            f"{where}: holds neither a perplexity nor tasks; pass what eval --json wrote"
        )
    return scores


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    return plain.text(plain.required(data, key, where), f"{where}: {key}")


def _whole(data: Mapping[str, Any], key: str, where: str) -> int:
    found = plain.count(data, key, where)
    if found is None:
        raise InputError(f"{where}: {key} is missing; pass what eval --json wrote")
    return found


def _parts(data: Mapping[str, Any], key: str, count: int, where: str) -> tuple[float, ...]:
    """Values of all windows or questions; none where the file does not have them."""
    place = f"{where}: {key}"
    found = plain.number_list(data.get(key, ()), place)
    if found and len(found) != count:
        raise InputError(f"{place}: expected {count} numbers, got {len(found)}")
    return found


def _mean_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean; None of fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


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
        parts = plain.number_list(data.get("parts", ()), f"{place}.parts")
        scores.append(Score(model, what, metric, number, stderr, protocol, role, parts))
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
    """How a number differs from the original's: ``+1.28 (+5.6 ± 0.4 %)``, for shares ``−0.0123 ± 0.0040``.

    The standard error is that of the differences window by window, or question by question.
    """
    if original is None or score is original:
        return MISSING
    change = score.value - original.value
    sign = "+" if change >= 0 else "−"
    error = None
    if len(score.parts) == len(original.parts):
        error = _mean_error([x - y for x, y in zip(score.parts, original.parts, strict=True)])
    if score.metric != PERPLEXITY:
        return f"{sign}{abs(change):.4f}" + ("" if error is None else f" ± {error:.4f}")
    if original.value <= 0:
        return f"{sign}{quantity(abs(change))}"
    relative = percent(abs(change) / original.value)
    if error is not None:
        relative += f" ± {percent(score.value / original.value * error)}"
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
            values = (score.shown_value, score.shown_error, difference(score, original))
            cells = (element("td", value) for value in values)
            body.append(element("tr", element("th", score.label, scope="row"), *cells))
        table.append(body)
    return element("div", table, class_="scroll hinted", tabindex="0")
