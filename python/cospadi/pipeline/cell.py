"""One cell of a comparison: one method at one ratio and seed, run as commands and measured from outside.

Every step is a process of its own, so that its peak memory and time are its own, a crash costs one cell, and the
numbers are those a user of the commands gets.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cospadi.errors import CospadiError, InputError
from cospadi.learn.methods import METHODS
from cospadi.pipeline.inspect import inspect_checkpoint
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.recipe_file import parse_setting, recipe_from_mapping
from cospadi.pipeline.report import BF16_BYTES, read_report
from cospadi.pipeline.workdir import write_atomic

EXIT_PARTIAL = 3
_LAST_LINES = 3
_POLL_S = 0.1
_TELL_S = 120.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

Progress = Callable[[str], None]
"""Receives a line of text."""


class StepError(CospadiError):
    """A command of a cell failed; the message is its last line."""


@dataclass(frozen=True)
class MethodSpec:
    """One entry of ``--methods``: a method, and settings that hold for it alone.

    Attributes
    ----------
    label : str
        The entry as it was written, blanks tidied: ``cospadi group_size=2``.
    method : str
        Key of `cospadi.learn.methods.METHODS`.
    settings : dict
        Recipe settings.
    """

    label: str
    method: str
    settings: Mapping[str, Any]

    @property
    def has_ratio(self) -> bool:
        """False where the method's storage type alone decides the size."""
        return METHODS[self.method].has_ratio


@dataclass(frozen=True)
class Cell:
    """A method at a ratio (None where the method has none) and a seed."""

    method: MethodSpec
    ratio: float | None
    seed: int

    @property
    def name(self) -> str:
        """Readable, unique within a comparison, usable as a folder."""
        ratio = "" if self.ratio is None else f"-{self.ratio:g}"
        return f"{_slug(self.method.label)}{ratio}-seed{self.seed}"

    def recipe(self, common: Mapping[str, Any]) -> Recipe:
        """The cell's settings over the comparison's; checked."""
        data = {
            "measure_on_calibration": True,
            **common,
            **self.method.settings,
            "method": self.method.method,
            "seed": self.seed,
        }
        if self.ratio is not None:
            data["ratio"] = self.ratio
        return recipe_from_mapping(data, source=self.method.label)


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """Read ``--methods``: entries separated by commas, each a method and blank-separated ``key=value`` settings.

    Raises
    ------
    InputError
        An empty entry, an unknown method, or an entry given twice.
    """
    specs: list[MethodSpec] = []
    for entry in text.split(","):
        words = entry.split()
        if not words:
            raise InputError(f"--methods {text!r}: an entry is empty")
        if words[0] not in METHODS:
            raise InputError(f"--methods: expected one of {', '.join(METHODS)}, got {words[0]!r}")
        settings = dict(parse_setting(word) for word in words[1:])
        specs.append(MethodSpec(" ".join(words), words[0], settings))
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"--methods: {label!r} is given twice")
    return tuple(specs)


@dataclass(frozen=True)
class Evaluation:
    """What is measured on every model of a comparison."""

    texts: tuple[str, ...]
    context: int
    windows: int | None
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    task_limit: int | None = None


@dataclass(frozen=True)
class Step:
    """Seconds and peak memory (bytes, the process's largest resident set) of one command."""

    seconds: float
    peak_bytes: int
    code: int


def run_step(
    arguments: Sequence[object], log: Path, *, threads: int | None, progress: Progress = print
) -> Step:
    """Run ``cospadi`` with these arguments; its output is appended to ``log``, and its last line told now and then.

    The command ends with this process, however that ends.

    Raises
    ------
    StepError
        An exit code other than 0 and 3 (partial); the message ends with what the command said last.
    """
    command = [sys.executable, "-m", "cospadi", *map(str, arguments)]
    if threads is not None:
        command += ["--threads", str(threads)]
    start = time.perf_counter()
    with log.open("ab") as sink:
        sink.write(f"$ cospadi {' '.join(map(str, arguments))}\n".encode())
        sink.flush()
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(_end_with, os.getpid()),
        )
        told = start
        try:
            # wait4 and not wait: it alone gives this child's own peak memory
            while not (found := os.wait4(process.pid, os.WNOHANG))[0]:
                time.sleep(_POLL_S)
                if time.perf_counter() - told > _TELL_S:
                    told = time.perf_counter()
                    progress(f"  {_last_lines(log, 1)}")
        except BaseException:
            process.terminate()
            process.wait()
            raise
    _, status, usage = found
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    if code not in (0, EXIT_PARTIAL):
        said = _last_lines(log, _LAST_LINES)
        raise StepError(f"cospadi {arguments[0]} ended with code {code}: {said}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Step(time.perf_counter() - start, usage.ru_maxrss * unit, code)


def _end_with(parent: int) -> None:
    """In the child, before its program begins: ask the kernel to kill it when its parent ends, SIGKILL included."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(1)


def _last_lines(log: Path, n: int) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " | ".join(lines[-n:])


def evaluate(
    model: str | Path,
    folder: Path,
    evaluation: Evaluation,
    *,
    threads: int | None,
    progress: Progress = print,
) -> dict[str, Any]:
    """Perplexities and task results of one model; finished measurements in ``folder`` are not repeated.

    Returns
    -------
    dict
        ``perplexity`` and ``nll`` by text, ``tasks`` by task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    result: dict[str, Any] = {"perplexity": {}, "nll": {}, "tasks": {}}
    for text in evaluation.texts:
        out = folder / f"text-{_slug(text_name(text))}.json"
        if not out.exists():
            arguments: list[object] = ["eval", model, "--text", text]
            arguments += ["--context", evaluation.context]
            if evaluation.windows is not None:
                arguments += ["--windows", evaluation.windows]
            _measure(arguments, out, log, threads, progress)
        data = json.loads(out.read_text())
        result["perplexity"][text_name(text)] = data["perplexity"]
        result["nll"][text_name(text)] = data["nll_per_token"]
    for task in evaluation.tasks:
        out = folder / f"task-{_slug(task)}.json"
        if not out.exists():
            arguments = ["eval", model, "--tasks", task]
            if evaluation.task_data is not None:
                arguments += ["--task-data", evaluation.task_data]
            if evaluation.task_limit is not None:
                arguments += ["--limit", evaluation.task_limit]
            _measure(arguments, out, log, threads, progress)
        result["tasks"] |= json.loads(out.read_text())["tasks"]
    return result


def text_name(text: str) -> str:
    """What tables call a text: its file name, or the data set."""
    return Path(text).name if "/" in text or Path(text).exists() else text


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", text)


def _measure(
    arguments: list[object], out: Path, log: Path, threads: int | None, progress: Progress
) -> None:
    partial = out.with_name(f".{out.name}.partial")
    run_step([*arguments, "--json", partial], log, threads=threads, progress=progress)
    partial.replace(out)


def compress_cell(
    cell: Cell,
    model: str,
    folder: Path,
    common: Mapping[str, Any],
    *,
    gram_cache: Path,
    threads: int | None,
    progress: Progress = print,
) -> dict[str, Any]:
    """Compress into ``folder/model`` unless that is done; return what was measured.

    An interrupted compression is resumed by the command itself; its time and memory are then those of the last process,
    and ``resumed`` says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, out = folder / "compress.json", folder / "model"
    if not record.exists():
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(cell.recipe(common).to_mapping(), sort_keys=False))
        cost_file = folder / "cost.json"
        cost = json.loads(cost_file.read_text()) if cost_file.exists() else {}
        if not (out / "config.json").exists():
            resumed = out.with_name("model.work").exists()
            arguments = ["compress", model, "--out", out, "--recipe", recipe]
            step = run_step(
                [*arguments, "--gram-cache", gram_cache],
                folder / "log.txt",
                threads=threads,
                progress=progress,
            )
            cost = {
                "seconds": step.seconds,
                "peak_memory_bytes": step.peak_bytes,
                "resumed": resumed,
            }
            write_atomic(cost_file, json.dumps(cost).encode())
        write_atomic(record, json.dumps(_summary(out, cost)).encode())
    summary: dict[str, Any] = json.loads(record.read_text())
    return summary


def _summary(out: Path, cost: Mapping[str, Any]) -> dict[str, Any]:
    data = inspect_checkpoint(out)
    report = read_report(out)
    modules = {
        name: {
            key: module[key] for key in ("relative_error", "n_atoms", "sparsity", "stored_bytes")
        }
        for name, module in data["modules"].items()
    }
    # by the clock, since fits run side by side; added up where the clock began anew, or ran for other things, too
    fit = (report.get("stages") or {}).get("fits")
    if fit is None or cost.get("resumed", True):
        fit = sum(module.get("seconds") or 0.0 for module in report["modules"].values())
    spectra = [
        {"module": name, **module["spectrum"]}
        for name, module in report["modules"].items()
        if module.get("spectrum")
    ]
    return {
        "ratio": data["ratio"]["linears"],
        "model_ratio": data["ratio"]["model"],
        "stored_bytes": data["bytes"]["linears"]["stored"],
        "file_bytes": data["bytes"]["model"]["file"],
        "dense_bytes": data["bytes"]["linears"]["dense"],
        "dense_model_bytes": data["bytes"]["model"]["dense"],
        "n_parameters": data["bytes"]["model"]["dense"] // BF16_BYTES,
        "calibration_sha256": (report["calibration"] or {}).get("ids_sha256"),
        "calibration": (report["calibration"] or {}).get("description", "none"),
        "seconds": {
            "fit": fit,
            "calibration": report.get("calibration_seconds", 0.0),
            "total": cost.get("seconds", report["seconds"]),
        },
        "peak_memory_bytes": cost.get("peak_memory_bytes"),
        "resumed": cost.get("resumed", True),
        "partial": bool(report["failed"]),
        "spectra": spectra,
        "modules": modules,
    }
