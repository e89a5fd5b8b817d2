"""The data of a comparison, checked and grouped: what tables and figures read.

`read_result` takes the plain dict that a comparison writes as JSON. A report is renewed while its comparison still
runs, so every measurement may be missing; what is there must have the right type and be finite.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cospadi.errors import InputError
from cospadi.report import plain

DONE, PARTIAL = "done", "partial"

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """Result of a task.

    Attributes
    ----------
    value : float
        Higher is better.
    stderr : float or None
        Standard error over the questions.
    items : tuple of float
        Score of every question, in order; empty if not known.
    items_id : str or None
        Two results with the same id answered the same questions.
    """

    value: float
    stderr: float | None
    items: tuple[float, ...] = ()
    items_id: str | None = None


@dataclass(frozen=True)
class Module:
    """One compressed projection of a run.

    Attributes
    ----------
    relative_error : float or None
        Whitened error of the stored factor as a share of the whitened weight's norm.
    n_atoms, sparsity, stored_bytes : int or None
        Its sizes.
    """

    relative_error: float | None
    n_atoms: int | None
    sparsity: int | None
    stored_bytes: int | None


@dataclass(frozen=True)
class Run:
    """One method at one ratio and seed.

    Attributes
    ----------
    ratio_asked : float or None
        Removed share of the stored bytes that was asked for; None if the method decides its size itself.
    status : str
        ``done``, ``partial`` (some modules stayed dense) or ``failed: reason``.
    ratio, model_ratio : dict
        Removed shares by convention, of the compressed linears and of the whole model.
    seconds : dict
        ``calibration``, ``fit``, ``total``.
    is_resumed : bool
        Whether seconds and memory are those of the last of several processes.
    """

    method: str
    label: str
    ratio_asked: float | None
    seed: int
    status: str
    ratio: dict[str, float]
    model_ratio: dict[str, float]
    stored_bytes: int | None
    file_bytes: int | None
    perplexity: dict[str, float]
    tasks: dict[str, Score]
    seconds: dict[str, float]
    peak_memory_bytes: int | None
    is_resumed: bool
    modules: dict[str, Module]

    @property
    def is_measured(self) -> bool:
        """Whether there is a compressed model with numbers."""
        return self.status in (DONE, PARTIAL)


@dataclass(frozen=True)
class Spread:
    """A measurement over seeds.

    Attributes
    ----------
    mean : float
        Arithmetic mean.
    deviation : float or None
        Standard deviation (n - 1 in the denominator); None for one value.
    low, high : float
        Smallest and largest value.
    n : int
        Number of values.
    """

    mean: float
    deviation: float | None
    low: float
    high: float
    n: int


def spread(values: Iterable[float | None]) -> Spread | None:
    """Summarise the values that are there; None if there is none."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    deviation = statistics.stdev(present) if len(present) > 1 else None
    return Spread(statistics.fmean(present), deviation, min(present), max(present), len(present))


@dataclass(frozen=True)
class Series:
    """Runs that differ in their seed only: a row of the tables and a point of the figures.

    Attributes
    ----------
    name : str
        The label; followed by the method where two methods have the same label.
    runs : tuple of Run
        All of them, failed ones too, in ascending order of the seed.
    """

    method: str
    label: str
    name: str
    ratio_asked: float | None
    runs: tuple[Run, ...]

    @property
    def measured(self) -> tuple[Run, ...]:
        """The runs that numbers come from: the complete ones, or the partial ones if none is complete."""
        done = tuple(run for run in self.runs if run.status == DONE)
        return done or tuple(run for run in self.runs if run.status == PARTIAL)

    @property
    def is_complete(self) -> bool:
        """Whether the numbers come from complete runs."""
        return any(run.status == DONE for run in self.runs)

    def over_seeds(self, value: Callable[[Run], float | None]) -> Spread | None:
        """Summarise one number of the measured runs."""
        return spread(value(run) for run in self.measured)

    def perplexity(self, text: str) -> Spread | None:
        """Perplexity on one text."""
        return self.over_seeds(lambda run: run.perplexity.get(text))

    def task(self, task: str) -> Spread | None:
        """Value of one task."""
        return self.over_seeds(lambda run: run.tasks[task].value if task in run.tasks else None)

    def task_stderr(self, task: str) -> float | None:
        """Standard error of a task over its questions, averaged over seeds (all see the same questions)."""
        errors = spread(run.tasks[task].stderr for run in self.measured if task in run.tasks)
        return errors.mean if errors else None

    def task_items(self, task: str) -> tuple[str, list[float]] | None:
        """Id of a task's questions and the score of each, averaged over seeds; None unless all answered the same."""
        scores = [run.tasks[task] for run in self.measured if task in run.tasks]
        kinds = {(score.items_id, len(score.items)) for score in scores}
        if len(kinds) != 1 or not scores[0].items or scores[0].items_id is None:
            return None
        means = [sum(item) / len(scores) for item in zip(*(s.items for s in scores), strict=True)]
        return scores[0].items_id, means

    def stored_bytes(self) -> Spread | None:
        """Stored bytes of the compressed linears."""
        return self.over_seeds(lambda run: run.stored_bytes)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a module's whitened weight and use of its atoms, in descending order.

    Each is complete, or a choice of evenly spaced points with both ends among them.
    """

    module: str
    singular_values: tuple[float, ...]
    support_use: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """A whole comparison.

    Attributes
    ----------
    model, calibration, evaluation, versions : dict
        Facts for the reader, as they came.
    linear_bytes : int or None
        Bytes of the dense linears in bfloat16; None while no run has finished.
    series : tuple of Series
        All runs, grouped over seeds, in order of their first appearance.
    """

    title: str
    model: dict[str, Any]
    linear_bytes: int | None
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    versions: dict[str, Any]
    machine: str
    command: str
    dense_perplexity: dict[str, float]
    dense_tasks: dict[str, Score]
    texts: tuple[str, ...]
    tasks: tuple[str, ...]
    runs: tuple[Run, ...]
    series: tuple[Series, ...]
    spectra: tuple[Spectrum, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the series, each once, in order of appearance: the lines of the figures."""
        return tuple(dict.fromkeys(series.name for series in self.series))

    def blocks(self) -> list[tuple[float | None, list[Series]]]:
        """Series by ratio asked, ascending; those without one come last."""
        ratios = {series.ratio_asked for series in self.series}
        ordered = sorted(ratios, key=lambda ratio: math.inf if ratio is None else ratio)
        return [(ratio, [s for s in self.series if s.ratio_asked == ratio]) for ratio in ordered]


def read_result(data: Mapping[str, Any]) -> Result:
    """Check the data of a comparison and group its runs over seeds.

    Parameters
    ----------
    data : mapping
        As ``compare`` writes it: ``title``, ``model``, ``calibration``, ``evaluation``, ``versions``, ``machine``,
        ``command``, ``dense``, ``texts``, ``tasks``, ``runs``, ``spectra``.

    Raises
    ------
    InputError
        A missing key, a value of the wrong type or not finite, or a run that occurs twice; the message names the place.
    """
    where = "result"
    model = plain.mapping(plain.required(data, "model", where), "model")
    dense = plain.mapping(plain.required(data, "dense", where), "dense")
    runs = tuple(
        _run(item, f"runs[{i}]")
        for i, item in enumerate(plain.sequence(plain.required(data, "runs", where), "runs"))
    )
    return Result(
        title=plain.text(plain.required(data, "title", where), "title"),
        model=model,
        linear_bytes=plain.count(model, "linear_bytes", "model"),
        calibration=plain.mapping(data.get("calibration"), "calibration"),
        evaluation=plain.mapping(data.get("evaluation"), "evaluation"),
        versions=plain.mapping(data.get("versions"), "versions"),
        machine=plain.text(data.get("machine", ""), "machine"),
        command=plain.text(data.get("command", ""), "command"),
        dense_perplexity=plain.numbers(dense.get("perplexity"), "dense.perplexity"),
        dense_tasks=_scores(dense.get("tasks"), "dense.tasks"),
        texts=plain.names(plain.required(data, "texts", where), "texts"),
        tasks=plain.names(plain.required(data, "tasks", where), "tasks"),
        runs=runs,
        series=_group(runs),
        spectra=tuple(
            _spectrum(item, f"spectra[{i}]")
            for i, item in enumerate(plain.sequence(data.get("spectra", []), "spectra"))
        ),
    )


def _group(runs: Sequence[Run]) -> tuple[Series, ...]:
    groups: dict[tuple[str, str, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.method, run.label, run.ratio_asked), []).append(run)
    methods_of: dict[str, set[str]] = {}
    for method, label, _ in groups:
        methods_of.setdefault(label, set()).add(method)
    series = []
    for (method, label, ratio), members in groups.items():
        seeds = [run.seed for run in members]
        if len(set(seeds)) != len(seeds):
            raise InputError(
                f"runs: {label!r} at ratio {ratio} has a seed more than once ({sorted(seeds)}); "
                "give runs with different settings different labels"
            )
        name = label if len(methods_of[label]) == 1 else f"{label} ({method})"
        ordered = tuple(sorted(members, key=lambda run: run.seed))
        series.append(Series(method, label, name, ratio, ordered))
    return tuple(series)


def _run(item: Any, where: str) -> Run:  # noqa: ANN401
    run = plain.mapping(item, where)
    modules = plain.mapping(run.get("modules"), f"{where}.modules")
    seed = plain.count(run, "seed", where)
    if seed is None:
        raise InputError(f"{where}.seed: expected an integer, got none")
    return Run(
        method=plain.text(plain.required(run, "method", where), f"{where}.method"),
        label=plain.text(plain.required(run, "label", where), f"{where}.label"),
        ratio_asked=plain.number(run.get("ratio_asked"), f"{where}.ratio_asked"),
        seed=seed,
        status=plain.text(plain.required(run, "status", where), f"{where}.status"),
        ratio=plain.numbers(run.get("ratio"), f"{where}.ratio"),
        model_ratio=plain.numbers(run.get("model_ratio"), f"{where}.model_ratio"),
        stored_bytes=plain.count(run, "stored_bytes", where),
        file_bytes=plain.count(run, "file_bytes", where),
        perplexity=plain.numbers(run.get("perplexity"), f"{where}.perplexity"),
        tasks=_scores(run.get("tasks"), f"{where}.tasks"),
        seconds=plain.numbers(run.get("seconds"), f"{where}.seconds"),
        peak_memory_bytes=plain.count(run, "peak_memory_bytes", where),
        is_resumed=bool(run.get("resumed", False)),
        modules={name: _module(m, f"{where}.modules[{name!r}]") for name, m in modules.items()},
    )


def _module(item: Any, where: str) -> Module:  # noqa: ANN401
    module = plain.mapping(item, where)
    return Module(
        relative_error=plain.number(module.get("relative_error"), f"{where}.relative_error"),
        n_atoms=plain.count(module, "n_atoms", where),
        sparsity=plain.count(module, "sparsity", where),
        stored_bytes=plain.count(module, "stored_bytes", where),
    )


def _spectrum(item: Any, where: str) -> Spectrum:  # noqa: ANN401
    spectrum = plain.mapping(item, where)
    columns = []
    for key in ("singular_values", "support_use"):
        place = f"{where}.{key}"
        values = [
            plain.number(v, place)
            for v in plain.sequence(plain.required(spectrum, key, where), place)
        ]
        present = [value for value in values if value is not None]
        if len(present) != len(values) or any(value < 0 for value in present):
            raise InputError(f"{place}: expected numbers of at least 0")
        columns.append(tuple(sorted(present, reverse=True)))
    return Spectrum(
        plain.text(plain.required(spectrum, "module", where), f"{where}.module"), *columns
    )


def _scores(item: Any, where: str) -> dict[str, Score]:  # noqa: ANN401
    scores = {}
    for task, entry in plain.mapping(item, where).items():
        place = f"{where}[{task!r}]"
        score = plain.mapping(entry, place)
        value = plain.number(score.get("value"), f"{place}.value")
        if value is not None:
            items_id = score.get("items_sha256")
            scores[task] = Score(
                value,
                plain.number(score.get("stderr"), f"{place}.stderr"),
                _items(score.get("item_scores", []), f"{place}.item_scores"),
                None if items_id is None else plain.text(items_id, f"{place}.items_sha256"),
            )
    return scores


def _items(value: Any, where: str) -> tuple[float, ...]:  # noqa: ANN401
    """Many numbers, checked by their sum: one test per question and run would take seconds."""
    items = tuple(plain.sequence(value, where))
    try:
        total = math.fsum(items)
    except (TypeError, ValueError, OverflowError):
        total = math.nan
    if not math.isfinite(total):
        raise InputError(f"{where}: expected finite numbers")
    return items
