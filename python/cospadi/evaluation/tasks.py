"""Zero-shot accuracy through lm-evaluation-harness, on data from the hub or from local files."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi.errors import CospadiError, InputError
from cospadi.evaluation.harness import (
    TaskProgress,
    harness_log,
    harness_versions,
    language_model,
    require_harness,
    task_manager,
)
from cospadi.evaluation.task_data import load_unit, local_file
from cospadi.model.locate import one_line
from cospadi.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Score = tuple[float, float | None]
"""An accuracy and its standard error."""


@dataclass(frozen=True)
class TaskResult:
    """Accuracy of one task, or of one group of tasks such as mmlu.

    Attributes
    ----------
    value, stderr
        Accuracy by `metric`, and its standard error: the sample standard deviation of the item scores divided by the
        root of their number. None with fewer than two items.
    metric
        ``"acc_norm"`` where the task defines it, otherwise ``"acc"``: the convention of the published tables.
    acc, acc_stderr
        Share of items whose right answer has the highest log likelihood; for tasks with one answer (LAMBADA), share of
        answers that greedy decoding gives.
    acc_norm, acc_norm_stderr
        The same with each log likelihood divided by the number of characters of the answer, or None.
    perplexity
        exp of the mean negative log likelihood of the answers, for tasks that define it (LAMBADA), or None.
    items, items_available
        Evaluated items, and items of the task.
    version
        Version of the task's definition.
    items_sha256
        Hash of every prompt, answer and target, in order: equal hashes mean the same questions.
    seconds
        Duration.
    warnings
        What the harness complained about, for example prompts cut to the model's context.
    item_scores
        Score of each item by `metric`, in order, for paired comparisons.
    """

    value: float
    stderr: float | None
    metric: str
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    perplexity: float | None
    items: int
    items_available: int
    version: str
    items_sha256: str
    seconds: float
    warnings: tuple[str, ...]
    item_scores: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self) | {
            "warnings": list(self.warnings),
            "item_scores": list(self.item_scores),
        }


@dataclass(frozen=True)
class TaskResults:
    """Results of several tasks, with everything needed to repeat them.

    Attributes
    ----------
    tasks
        Results by name, in the order of the request.
    average, average_stderr
        Mean of the values, each task counting once, and its standard error for independent tasks.
    limit
        Items per task at most (the first ones), or None for all.
    batch_size
        Requests per forward pass. Padding changes the last digits of log likelihoods.
    data
        ``"hub"``, or the name of the local folder.
    dtype
        Of the model's parameters.
    versions
        Versions of cospadi, torch, transformers, Python, lm-eval and datasets.
    """

    tasks: dict[str, TaskResult]
    average: float
    average_stderr: float | None
    limit: int | None
    batch_size: int
    data: str
    dtype: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values under names that do not collide with those of a perplexity in the same file."""
        return {
            "tasks": {name: result.to_dict() for name, result in self.tasks.items()},
            "task_average": self.average,
            "task_average_stderr": self.average_stderr,
            "task_limit": self.limit,
            "task_batch_size": self.batch_size,
            "task_data": self.data,
            "dtype": self.dtype,
            "versions": self.versions,
        }


def check_tasks(tasks: Sequence[str], *, data_dir: str | Path | None = None) -> tuple[str, ...]:
    """Check task names and data files, before anything expensive starts.

    Parameters
    ----------
    tasks
        Names of tasks, groups or tags of lm-evaluation-harness.
    data_dir
        See `evaluate_tasks`.

    Returns
    -------
    tuple of str
        The names, with each tag replaced by the tasks that carry it.

    Raises
    ------
    InputError
        lm-eval is not installed; no name, one twice or an unknown one (lists near matches); a task without its file.
    """
    require_harness()
    if isinstance(tasks, str) or not tasks:
        raise InputError(f"tasks: expected a sequence of at least one task name, got {tasks!r}")
    manager = task_manager(tuple(tasks))
    names: list[str] = []
    for name in tasks:
        entry = manager.task_index.get(name)
        if entry is None:
            near = get_close_matches(name, manager.all_tasks, n=6)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
            raise InputError(f"lm-evaluation-harness has no task {name!r}: {hint}")
        names += sorted(entry.tags) if entry.kind.name == "TAG" else [name]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"tasks: expected each task once, got {', '.join(repeated)} again")
    if data_dir is not None:
        for name in names:
            local_file(manager, name, Path(data_dir))
    return tuple(names)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    progress: TaskProgress | None = None,
) -> TaskResults:
    """Measure zero-shot accuracies with the installed task definitions of lm-evaluation-harness.

    No chat template, no examples in the prompt, log likelihoods in fp32, nothing random.

    Parameters
    ----------
    model, tokenizer
        Causal language model, dense or compressed, and its tokenizer. Neither is changed.
    tasks
        Names of tasks, groups or tags; a tag stands for its tasks, a group (mmlu) counts as one.
    data_dir
        Folder with a JSON-lines file for each task; the network is not used then. The file is called
        ``<task>_<split>.jsonl`` or ``<hub configuration>_<split>.jsonl``, with the split that the definition
        evaluates: ``piqa_validation.jsonl``, ``arc_easy_test.jsonl``, ``winogrande_xl_validation.jsonl``. Its rows
        have the columns of the hub's data set. None: the data are loaded from the hub or its local cache.
    limit
        Items per task at most, the first ones; in a group, of each of its tasks.
    batch_size
        Requests per forward pass.
    progress
        Called after every forward pass.

    Raises
    ------
    InputError
        As `check_tasks`; or data that cannot be loaded or do not fit the definition, a task that has no zero-shot
        accuracy by likelihood, a `limit` or `batch_size` below 1.
    CospadiError
        The model gives a log likelihood that is not finite, or the harness fails.

    References
    ----------
    Gao et al., "The Language Model Evaluation Harness", https://zenodo.org/records/12608602.
    """
    for option, count in (("limit", limit), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise InputError(f"{option}: expected at least 1, got {count}")
    names = check_tasks(tasks, data_dir=data_dir)
    manager = task_manager(tuple(tasks))
    folder = Path(data_dir) if data_dir is not None else None
    units = {name: load_unit(manager, name, data_dir=folder, limit=limit) for name in names}
    was_training = model.training
    try:
        harness = language_model(model, tokenizer, batch_size=batch_size, progress=progress)
        results = {name: _measure(harness, name, unit, limit) for name, unit in units.items()}
    finally:
        model.train(was_training)
    average, average_stderr = _unweighted([(r.value, r.stderr) for r in results.values()])
    return TaskResults(
        tasks=results,
        average=average,
        average_stderr=average_stderr,
        limit=limit,
        batch_size=batch_size,
        data="hub" if folder is None else folder.resolve().name,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        versions=versions() | harness_versions(),
    )


def _measure(
    harness: Any,  # noqa: ANN401
    name: str,
    unit: dict[str, Any],
    limit: int | None,
) -> TaskResult:
    """Evaluate one task or group; ``unit`` is from `load_unit`."""
    import lm_eval

    tasks, group = unit["tasks"], unit["groups"].get(name)
    harness.task = name
    started = time.perf_counter()
    with harness_log() as warnings:
        try:
            # not simple_evaluate: that seeds the caller's generators and asks the hub about the model
            raw = lm_eval.evaluate(
                lm=harness,
                task_dict={"tasks": tasks, "groups": {}},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        except CospadiError:
            raise
        except Exception as error:
            raise CospadiError(
                f"task {name!r}: lm-evaluation-harness failed: {type(error).__name__}: {one_line(error)}"
            ) from error
        samples = raw["samples"]
        metrics = [
            metric
            for metric in ("acc", "acc_norm")
            if all(metric in task.aggregation() for task in tasks.values())
        ]
        scores = {m: {t: [float(item[m]) for item in samples[t]] for t in tasks} for m in metrics}
        if group is None:
            found = {metric: _mean(scores[metric][name]) for metric in metrics}
        else:
            found = _group_means(group, scores)
    metric = "acc_norm" if "acc_norm" in found else "acc"
    norm = found.get("acc_norm", (None, None))
    perplexity = raw["results"].get(name, {}).get("perplexity,none")
    counts = [raw["n-samples"][task] for task in tasks]
    return TaskResult(
        value=found[metric][0],
        stderr=found[metric][1],
        metric=metric,
        acc=found["acc"][0],
        acc_stderr=found["acc"][1],
        acc_norm=norm[0],
        acc_norm_stderr=norm[1],
        perplexity=None if perplexity is None else float(perplexity),
        items=sum(count["effective"] for count in counts),
        items_available=sum(count["original"] for count in counts),
        version=str(tasks[name].VERSION if group is None else group.version),
        items_sha256=_items_sha256(item for task in tasks for item in samples[task]),
        seconds=time.perf_counter() - started,
        warnings=tuple(warnings),
        item_scores=tuple(score for task in tasks for score in scores[metric][task]),
    )


def _mean(values: Sequence[float]) -> _Score:
    """Mean, and the sample standard deviation over the root of the number."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _unweighted(scores: Sequence[_Score]) -> _Score:
    """Mean of independent scores, each counting once."""
    mean = math.fsum(value for value, _ in scores) / len(scores)
    errors = [error for _, error in scores if error is not None]
    if len(errors) < len(scores):
        return mean, None
    return mean, math.hypot(*errors) / len(errors)


def _group_means(
    group: Any,  # noqa: ANN401
    scores: dict[str, dict[str, list[float]]],
) -> dict[str, _Score]:
    """Combine the tasks of a group as its definition says: weighted by their items, or not."""
    members: dict[str, dict[str, Any]] = {}
    for metric, by_task in scores.items():
        for task, values in by_task.items():
            member = members.setdefault(task, {"sample_len": len(values)})
            member[f"{metric},none"], member[f"{metric}_stderr,none"] = _mean(values)
    combined = group.aggregate(members)
    found: dict[str, _Score] = {}
    for metric in scores:
        if f"{metric},none" in combined:
            error = combined[f"{metric}_stderr,none"]
            known = isinstance(error, float)  # otherwise "N/A"
            found[metric] = float(combined[f"{metric},none"]), float(error) if known else None
    return found


def _items_sha256(items: Iterable[dict[str, Any]]) -> str:
    """Hash prompts, answers and targets in order."""
    digest = hashlib.sha256()
    for item in items:
        content = [item["arguments"], item["target"]]
        digest.update(json.dumps(content, default=str).encode("ascii") + b"\n")
    return digest.hexdigest()
