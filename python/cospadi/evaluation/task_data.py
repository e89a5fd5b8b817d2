"""Tasks of lm-evaluation-harness with their data: from the hub, or from JSON-lines files put in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cospadi.errors import InputError
from cospadi.evaluation.harness import harness_log
from cospadi.model.locate import one_line

# Kinds of requests that are scored by the likelihood of given answers.
_LIKELIHOOD = ("multiple_choice", "loglikelihood")


def load_unit(
    manager: Any,  # noqa: ANN401
    name: str,
    *,
    data_dir: Path | None,
    limit: int | None,
) -> dict[str, Any]:
    """Load one task or one group of tasks with its data.

    Parameters
    ----------
    manager
        ``TaskManager`` that knows `name`.
    name
        Task or group.
    data_dir
        Folder with the task's file, or None to load from the hub or its local cache.
    limit
        Items to check in a local file, the first ones; None means all.

    Returns
    -------
    dict
        ``tasks``: tasks by name; ``groups``: groups by name, with that of `name` if it is one.

    Raises
    ------
    InputError
        The data cannot be loaded or does not fit the definition, or there is no zero-shot accuracy by likelihood.
    """
    with harness_log():
        if data_dir is not None:
            unit = _load_local(manager, name, local_file(manager, name, data_dir), limit)
        else:
            try:
                unit = manager.load([name])
            except Exception as error:
                raise InputError(
                    f"task {name!r}: its data cannot be loaded from the hub ({one_line(error)}): connect, or name a "
                    "folder with the task's JSON-lines file (--task-data DIR)"
                ) from error
    for task in unit["tasks"].values():
        _check_zero_shot(task)
        task.set_config("num_fewshot", 0)
    if name in unit["groups"]:
        combined = unit["groups"][name].aggregate_metric_list or []
        if "acc" not in [metric.metric for metric in combined]:
            raise InputError(f"group {name!r} defines no accuracy of its own: name its tasks")
    return unit


def _check_zero_shot(task: Any) -> None:  # noqa: ANN401
    from lm_eval.api.metrics import mean

    shots = task.get_config("num_fewshot")
    reason = None
    if task.OUTPUT_TYPE not in _LIKELIHOOD:
        reason = f"its kind is {task.OUTPUT_TYPE}, not {' or '.join(_LIKELIHOOD)}"
    elif shots:
        reason = f"its definition puts {shots} examples into the prompt"
    elif task.aggregation().get("acc") is not mean:
        reason = "it defines no accuracy as a mean over items"
    elif task.get_config("filter_list") is not None:
        reason = "it filters answers before scoring them"
    if reason is not None:
        raise InputError(
            f"task {task.task_name!r} has no zero-shot accuracy by likelihood: {reason}; "
            "run it with lm-eval itself"
        )


def local_file(manager: Any, name: str, data_dir: Path) -> Path:  # noqa: ANN401
    """Return a task's file in the data folder, ``<task or hub configuration>_<split>.jsonl``.

    Raises
    ------
    InputError
        No such folder or file, or `name` is a group or a task in Python code, which cannot be pointed at a file.
    """
    if not data_dir.is_dir():
        raise InputError(f"task data {str(data_dir)!r} is not a folder")
    entry = manager.task_index[name]
    if entry.kind.name != "TASK":
        kind = "group of tasks" if entry.kind.name == "GROUP" else "task in Python code"
        raise InputError(
            f"{name!r} is a {kind} and cannot read a local file: name single tasks, or leave out the data folder"
        )
    split = _evaluated_split(entry.cfg)
    stems = dict.fromkeys((name, entry.cfg.get("dataset_name") or name))
    candidates = [f"{stem}_{split}.jsonl" for stem in stems]
    for candidate in candidates:
        if (data_dir / candidate).is_file():
            return data_dir / candidate
    there = ", ".join(sorted(path.name for path in data_dir.glob("*.jsonl"))[:12])
    raise InputError(
        f"task {name!r} needs {' or '.join(candidates)} in {data_dir.name}, which holds "
        f"{there or 'no .jsonl file'}"
    )


def _evaluated_split(definition: dict[str, Any]) -> str:
    """The split that the harness evaluates: test if there is one, otherwise validation."""
    split = definition.get("test_split") or definition.get("validation_split")
    if not split:
        raise InputError(f"task {definition['task']!r} defines no split to evaluate")
    return str(split)


def _load_local(
    manager: Any,  # noqa: ANN401
    name: str,
    path: Path,
    limit: int | None,
) -> dict[str, Any]:
    """Load the installed definition of a task with the rows of a file as its data, in memory."""
    import datasets

    definition = manager.task_index[name].cfg
    split = _evaluated_split(definition)
    rows = _read_rows(path)
    try:
        table = datasets.Dataset.from_list(rows)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path.name}: a column must have one type: {one_line(error)}") from error
    data = datasets.DatasetDict({split: table})
    changes: dict[str, Any] = {"task": name, "custom_dataset": lambda **_: data}
    # splits that the file does not hold; zero-shot prompts need none of them
    changes |= {"training_split": None, "fewshot_split": None, "fewshot_config": None}
    if definition.get("test_split"):
        changes["validation_split"] = None
    try:
        # a member of a group may change parts of an installed definition
        task = manager.load({"group": "local", "task": [changes]})["tasks"][name]
        items = task.eval_docs
        # processed rows in place of raw ones: the harness would process all of them at every look
        data[split] = items
        task.set_config("process_docs", None)
    except Exception as error:
        raise _misfit(path.name, name, error) from error
    for number in range(1, 1 + min(len(items), limit or len(items))):
        try:
            _check_item(task, items[number - 1])
        except Exception as error:
            raise _misfit(f"{path.name}, item {number},", name, error) from error
    return {"tasks": {name: task}, "groups": {}}


def _check_item(task: Any, item: dict[str, Any]) -> None:  # noqa: ANN401
    """Ask of an item what the harness will ask: its own failure would not say which item it was, or only log."""
    text, target = task.doc_to_text(item), task.doc_to_target(item)
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    choices = task.doc_to_choice(item)
    if not all(choices):
        raise ValueError("an empty choice")
    right = text if task.multiple_input else target
    for answer in right if isinstance(right, list) else [right]:
        known = 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices
        if not known:
            raise ValueError(f"the right answer {answer!r} is none of the {len(choices)} choices")


def _misfit(where: str, name: str, error: Exception) -> InputError:
    return InputError(
        f"{where} does not fit the definition of {name!r}: {type(error).__name__}: {one_line(error)}"
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines whose objects all have the same keys."""
    rows: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 text: {one_line(error)}") from error
    except OSError as error:
        raise InputError(f"cannot read {path.name}: {error.strerror or one_line(error)}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path.name}, line {number} is not valid JSON: {one_line(error)}"
            ) from error
        if not isinstance(row, dict) or not row:
            raise InputError(f"{path.name}, line {number} must be a JSON object with fields")
        if rows and row.keys() != rows[0].keys():
            raise InputError(
                f"{path.name}, line {number} has the fields {sorted(row)}, the first line {sorted(rows[0])}"
            )
        rows.append(row)
    if not rows:
        raise InputError(f"{path.name} holds no item")
    return rows
