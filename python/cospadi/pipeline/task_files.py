"""Tasks as files: tensors in a safetensors file, all else as JSON. Both are data; nothing in them is executed.

A worker may be pointed at a directory that somebody else can write to. Names, settings and tensors are therefore
checked like those of a checkpoint before they are used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save as save_tensors

from cospadi.checkpoint.safetensors_file import read_header, read_tensor
from cospadi.checkpoint.strict_json import read_json_object
from cospadi.errors import CheckpointError, CospadiError, brief
from cospadi.factor.spec import STORAGE_DTYPES, dtype_name
from cospadi.learn.fit import FitSettings
from cospadi.learn.methods import METHODS, FactorSize
from cospadi.learn.options import LearnOptions
from cospadi.learn.output_metric import OutputMetric, RowScales
from cospadi.learn.quantize import StorageTypes
from cospadi.pipeline.fit_task import CPU, FitTask, InputMetric, Statistics, TaskMember

TASK_VERSION = 3

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_][A-Za-z0-9_-]*)*", re.ASCII)
_MOST_NAME = 200
_MEMBER_TENSORS = ("weight", "bias", "gram", "metric", "weighted", "target", "output", "row_scales")
_NEEDED = ("weight",)
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class TaskHead:
    """What is known about a task without its tensors."""

    name: str
    names: tuple[str, ...]
    cost: float
    fingerprint: str


def is_safe_name(name: object) -> bool:
    """Whether a module name may become part of a file name."""
    return isinstance(name, str) and len(name) <= _MOST_NAME and bool(_NAME.fullmatch(name))


def task_data(task: FitTask, fingerprint: str) -> tuple[dict[str, Any], bytes]:
    """A task as plain data and the bytes of a safetensors file; tensors that are one object are stored once."""
    tensors: dict[str, torch.Tensor] = {}
    known: dict[int, str] = {}

    def key(tensor: torch.Tensor | None) -> str | None:
        if tensor is None:
            return None
        if id(tensor) not in known:
            known[id(tensor)] = f"t{len(known)}"
            tensors[known[id(tensor)]] = tensor.to(CPU).contiguous()
        return known[id(tensor)]

    members = []
    for member in task.members:
        s = member.statistics
        members.append(
            {
                "name": member.name,
                "weight": key(member.weight),
                "bias": key(member.bias),
                "gram": key(s.gram),
                "metric": key(s.metric.gram),
                "metric_name": s.metric.name,
                "weighted": key(s.metric.weighted),
                "target": key(s.target),
                "output": key(s.output.matrix) if isinstance(s.output, OutputMetric) else None,
                "output_scale": s.output.scale if isinstance(s.output, OutputMetric) else None,
                "row_scales": key(s.output.scales) if isinstance(s.output, RowScales) else None,
                "with_spectrum": member.with_spectrum,
                "n_tokens": s.n_tokens,
            }
        )
    settings = dataclasses.asdict(task.settings)
    settings["bias_dtype"] = dtype_name(task.settings.bias_dtype)
    data = save_tensors(tensors)
    record = {
        "task_version": TASK_VERSION,
        "fingerprint": fingerprint,
        "cost": task.cost,
        "on_one_thread": task.on_one_thread,
        "sha256": hashlib.sha256(data).hexdigest(),
        "members": members,
        "settings": settings,
    }
    return record, data


def read_head(path: Path) -> TaskHead:
    """Names, cost and run of the task in a JSON file.

    Raises
    ------
    CheckpointError
        It is damaged or of another version.
    """
    return _head(read_json_object(path), path)


def read_task(record_file: Path, tensor_file: Path) -> FitTask:
    """A task from its two files.

    Raises
    ------
    CheckpointError
        One is damaged, they do not belong together, or a setting or a tensor is unusable.
    """
    record = read_json_object(record_file)
    _head(record, record_file)
    digest = hashlib.sha256()
    try:
        if not stat.S_ISREG(tensor_file.lstat().st_mode):  # a device would never end
            raise CheckpointError(f"{tensor_file}: not a regular file")
        with tensor_file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(
            f"{tensor_file}: cannot be read ({error.strerror or error})"
        ) from None
    if digest.hexdigest() != record.get("sha256"):
        raise CheckpointError(f"{tensor_file}: its SHA-256 differs from the task's")
    header = read_header(tensor_file)
    loaded: dict[str, torch.Tensor] = {}

    def tensor(member: dict[str, Any], part: str) -> torch.Tensor | None:
        name = member.get(part)
        if name is None and part not in _NEEDED:
            return None
        if not isinstance(name, str) or name not in header:
            raise CheckpointError(
                f"{record_file}: {part}: expected a tensor's name, got {brief(name)}"
            )
        if name not in loaded:
            # a copy, because the file's bytes lie at any address and sums depend on it
            loaded[name] = read_tensor(header[name], name).clone()
        return loaded[name]

    metrics: dict[tuple[str | None, str | None], InputMetric] = {}
    members = []
    for item in record["members"]:
        parts = {part: tensor(item, part) for part in _MEMBER_TENSORS}
        weight = parts["weight"]
        assert weight is not None
        _check_shapes(parts, record_file)
        metric = metrics.setdefault(
            (item.get("metric"), item.get("weighted")),
            InputMetric(str(item.get("metric_name")), parts["metric"], parts["weighted"]),
        )
        output: OutputMetric | RowScales | None = None
        if parts["row_scales"] is not None:
            if not bool(
                (parts["row_scales"] >= 1.0).all() & torch.isfinite(parts["row_scales"]).all()
            ):
                raise CheckpointError(
                    f"{record_file}: row_scales: expected numbers of at least one"
                )
            output = RowScales(parts["row_scales"])
        if parts["output"] is not None:
            scale = item.get("output_scale")
            if not isinstance(scale, float) or not scale > 0.0:
                raise CheckpointError(f"{record_file}: output_scale: got {brief(scale)}")
            output = OutputMetric(parts["output"], scale)
        n_tokens = item.get("n_tokens")
        if n_tokens is not None and (type(n_tokens) is not int or n_tokens < 1):
            raise CheckpointError(f"{record_file}: n_tokens: got {brief(n_tokens)}")
        statistics = Statistics(parts["gram"], metric, parts["target"], output, n_tokens)
        members.append(
            TaskMember(
                item["name"], weight, parts["bias"], statistics, bool(item.get("with_spectrum"))
            )
        )
    settings = _settings(record.get("settings"), f"{record_file}: settings")
    on_one_thread = record.get("on_one_thread")
    if not isinstance(on_one_thread, bool):
        raise CheckpointError(f"{record_file}: on_one_thread: got {brief(on_one_thread)}")
    return FitTask(tuple(members), settings, float(record["cost"]), on_one_thread)


def _head(record: dict[str, Any], path: Path) -> TaskHead:
    if record.get("task_version") != TASK_VERSION:
        raise CheckpointError(
            f"{path}: task_version: expected {TASK_VERSION}, got {brief(record.get('task_version'))}"
        )
    members, cost, run = (record.get(key) for key in ("members", "cost", "fingerprint"))
    if not isinstance(members, list) or not all(isinstance(item, dict) for item in members):
        raise CheckpointError(f"{path}: members: expected a list of objects")
    names = tuple(item.get("name") for item in members)
    if not names or not all(is_safe_name(name) for name in names):
        raise CheckpointError(f"{path}: members: expected module names, got {brief(names)}")
    if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not 0.0 <= cost < 1e30:
        raise CheckpointError(f"{path}: cost: expected a number, got {brief(cost)}")
    if not isinstance(run, str):
        raise CheckpointError(f"{path}: fingerprint: expected text, got {brief(run)}")
    return TaskHead(str(names[0]), tuple(map(str, names)), float(cost), run)


def _check_shapes(parts: dict[str, torch.Tensor | None], path: Path) -> None:
    weight = parts["weight"]
    if weight is None or weight.ndim != 2 or weight.dtype != torch.float32:
        raise CheckpointError(f"{path}: weight: expected a float32 matrix")
    d_out, d_in = weight.shape
    square = (torch.float64, (d_in, d_in))
    expected = {
        "bias": (torch.float32, (d_out,)),
        "gram": square,
        "metric": square,
        "weighted": square,
        "target": (None, (d_out, d_in)),
        "output": (torch.float64, (d_out, d_out)),
        "row_scales": (torch.float64, (d_out,)),
    }
    for part, (dtype, shape) in expected.items():
        found = parts[part]
        if found is None:
            continue
        if tuple(found.shape) != shape or dtype not in (None, found.dtype):
            raise CheckpointError(
                f"{path}: {part}: expected {list(shape)} of {dtype}, got {list(found.shape)} of {found.dtype}"
            )


def _settings(data: object, where: str) -> FitSettings:
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: expected an object, got {brief(data)}")
    fields = dict(data)
    bias_dtype, method = fields.pop("bias_dtype", None), fields.get("method")
    if bias_dtype not in STORAGE_DTYPES or method not in METHODS:
        raise CheckpointError(
            f"{where}: got method {brief(method)}, bias_dtype {brief(bias_dtype)}"
        )
    candidates = fields.pop("candidates", [])
    if not isinstance(candidates, list):
        raise CheckpointError(f"{where}: candidates: expected a list, got {brief(candidates)}")
    fields["size"] = _made(FactorSize, fields.get("size"), f"{where}.size")
    fields["types"] = _made(StorageTypes, fields.get("types"), f"{where}.types")
    fields["options"] = _made(LearnOptions, fields.get("options"), f"{where}.options")
    fields["candidates"] = tuple(
        _made(FactorSize, item, f"{where}.candidates") for item in candidates
    )
    fields["bias_dtype"] = STORAGE_DTYPES[bias_dtype]
    return _made(FitSettings, fields, where)


def _made(kind: type[_Made], data: object, where: str) -> _Made:
    """A dataclass from an object with exactly its fields."""
    wanted = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(data, dict) or data.keys() != wanted:
        raise CheckpointError(f"{where}: expected {', '.join(sorted(wanted))}, got {brief(data)}")
    for key, value in data.items():
        if isinstance(value, (list, dict)):
            raise CheckpointError(f"{where}.{key}: got {brief(value)}")
    try:
        return kind(**data)
    except (CospadiError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
