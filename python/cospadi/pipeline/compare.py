"""Methods against each other on one model: every cell of the grid compressed, measured, and put into one report."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cospadi.errors import InputError
from cospadi.learn.budget import check_ratio
from cospadi.model.source import source_fingerprint
from cospadi.pipeline.cell import (
    Cell,
    Evaluation,
    MethodSpec,
    Progress,
    StepError,
    compress_cell,
    evaluate,
    text_name,
)
from cospadi.pipeline.workdir import write_atomic
from cospadi.report.csv import write_csv, write_modules_csv
from cospadi.report.page import write_html
from cospadi.versions import versions

SETTINGS_FILE = "comparison.json"
RESULT_FILE = "results.json"


@dataclass(frozen=True)
class Comparison:
    """What is compared and how.

    Attributes
    ----------
    model : str
        Hugging Face folder, hub id, or GGUF file.
    methods : tuple of MethodSpec
        See `cospadi.pipeline.cell.parse_methods`.
    ratios : tuple of float
        Removed shares of the stored bytes.
    seeds : tuple of int
        Each gives its own calibration sample and random starts; several give a spread.
    common : dict
        Recipe settings of every cell (calibration, samples, ...).
    evaluation : Evaluation
        Texts and tasks.
    title : str
        Heading of the report.
    command : str
        How to repeat it, for the report.
    """

    model: str
    methods: tuple[MethodSpec, ...]
    ratios: tuple[float, ...]
    seeds: tuple[int, ...]
    evaluation: Evaluation
    common: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    command: str = ""

    def cells(self) -> list[Cell]:
        """All cells, ratio by ratio; a method without a ratio comes once per seed, first."""
        fixed = [
            Cell(m, None, seed) for seed in self.seeds for m in self.methods if not m.has_ratio
        ]
        return fixed + [
            Cell(method, ratio, seed)
            for seed in self.seeds
            for ratio in self.ratios
            for method in self.methods
            if method.has_ratio
        ]


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    keep_models: bool = False,
    threads: int | None = None,
    progress: Progress = print,
) -> dict[str, Any]:
    """Run the grid, resumably, and write ``results.json``, two CSV files and ``index.html`` into ``out``.

    The report is renewed after every cell. Finished cells and measurements are found again after an interruption of any
    kind; an interrupted compression goes on where it stopped.

    Parameters
    ----------
    comparison : Comparison
        The grid.
    out : str or Path
        Folder of the comparison; a folder of another comparison is refused, the difference named. More methods, ratios,
        seeds, texts and tasks may be added to an existing one.
    keep_models : bool
        Keep the compressed checkpoints after they have been measured.
    threads : int, optional
        Threads of every command.
    progress : callable
        Receives one line at a time.

    Returns
    -------
    dict
        The data of ``results.json``.

    Raises
    ------
    InputError
        A setting is unusable (before anything runs), or the folder belongs to another comparison.
    """
    _check(comparison)
    folder = Path(out)
    fingerprint = source_fingerprint(comparison.model)
    _claim(folder, comparison, fingerprint)
    grid = _Grid(comparison, folder, fingerprint, keep_models, threads, progress)
    return grid.run()


def _check(comparison: Comparison) -> None:
    for ratio in comparison.ratios:
        check_ratio(ratio)
    for name, values in (
        ("methods", comparison.methods),
        ("ratios", comparison.ratios),
        ("seeds", comparison.seeds),
    ):
        if not values or len(set(map(str, values))) != len(values):
            raise InputError(f"--{name}: expected one or more, each once, got {list(values)}")
    if not comparison.evaluation.texts and not comparison.evaluation.tasks:
        raise InputError("nothing to measure: give --text, --tasks, or both")
    names = [text_name(text) for text in comparison.evaluation.texts]
    if len(set(names)) != len(names):
        raise InputError(f"--text: two texts have the same name: {', '.join(names)}")
    for cell in comparison.cells():
        cell.recipe(comparison.common)


def _claim(folder: Path, comparison: Comparison, fingerprint: str) -> None:
    """Refuse a folder whose finished cells were made under other conditions."""
    evaluation = asdict(comparison.evaluation)
    conditions = {
        "model": fingerprint,
        "common": dict(comparison.common),
        "context": evaluation["context"],
        "windows": evaluation["windows"],
        "task_limit": evaluation["task_limit"],
    }
    conditions = json.loads(json.dumps(conditions))
    file = folder / SETTINGS_FILE
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"{folder}: is not empty and holds no comparison; choose another --out"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be created: {error.strerror or error}") from None
        write_atomic(file, (json.dumps(conditions, indent=1) + "\n").encode())
        return
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        raise InputError(f"{file}: damaged; choose another --out") from None
    for key, value in conditions.items():
        if found.get(key) != value:
            raise InputError(
                f"{folder}: holds a comparison with another {key} ({found.get(key)!r} there, {value!r} now); "
                "choose another --out"
            )


class _Grid:
    """State of one run of `compare`."""

    def __init__(
        self,
        comparison: Comparison,
        folder: Path,
        fingerprint: str,
        keep_models: bool,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self.comparison = comparison
        self.folder = folder
        self.fingerprint = fingerprint
        self.keep_models = keep_models
        self.threads = threads
        self.progress = progress

    def run(self) -> dict[str, Any]:
        cells = self.comparison.cells()
        self.progress(f"dense: measuring {self.comparison.model}")
        dense = evaluate(
            self.comparison.model,
            self.folder / "dense",
            self.comparison.evaluation,
            threads=self.threads,
            progress=self.progress,
        )
        self.progress(_measured("dense", dense))
        runs: list[dict[str, Any]] = []
        started, fresh = time.perf_counter(), 0
        for number, cell in enumerate(cells, 1):
            had_result = self._record(cell).exists()
            if not had_result:
                self.progress(f"[{number}/{len(cells)}] {cell.name}: {self._record(cell).parent}")
            run = self._run_cell(cell)
            runs.append(run)
            fresh += not had_result
            left = "-"
            if fresh:
                minutes = (
                    (time.perf_counter() - started) / fresh * self._pending(cells[number:]) / 60
                )
                left = f"{minutes:.0f} min"
            self.progress(f"[{number}/{len(cells)}] {_summary_line(cell, run)}; {left} left")
            self._write(dense, runs)
        return self._write(dense, runs)

    def _record(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name / "done.json"

    def _pending(self, cells: Sequence[Cell]) -> int:
        return sum(not self._record(cell).exists() for cell in cells)

    def _run_cell(self, cell: Cell) -> dict[str, Any]:
        folder = self.folder / "cells" / cell.name
        head = {
            "method": cell.method.method,
            "label": cell.method.label,
            "ratio_asked": cell.ratio,
            "seed": cell.seed,
        }
        record = self._record(cell)
        if record.exists():
            done = json.loads(record.read_text())
            if self._is_complete(done):
                return {**head, **done}
            if not any((folder / "model").glob("*.safetensors")):
                # A text or task came later and the weights are gone: make them again.
                shutil.rmtree(folder / "model", ignore_errors=True)
                (folder / "compress.json").unlink(missing_ok=True)
        try:
            summary = compress_cell(
                cell,
                self.comparison.model,
                folder,
                self.comparison.common,
                gram_cache=self.folder / "grams",
                threads=self.threads,
                progress=self.progress,
            )
            measured = evaluate(
                folder / "model",
                folder,
                self.comparison.evaluation,
                threads=self.threads,
                progress=self.progress,
            )
        except StepError as error:
            return {**head, "status": f"failed: {error}"}
        status = "partial" if summary["partial"] else "done"
        done = {**summary, **measured, "status": status}
        write_atomic(record, json.dumps(done).encode())
        if not self.keep_models:
            _remove_weights(folder / "model")
        return {**head, **done}

    def _is_complete(self, done: Mapping[str, Any]) -> bool:
        evaluation = self.comparison.evaluation
        return set(evaluation.tasks) <= set(done["tasks"]) and {
            text_name(text) for text in evaluation.texts
        } <= set(done["perplexity"])

    def _write(self, dense: Mapping[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        comparison = self.comparison
        measured = next((run for run in runs if "dense_bytes" in run), {})
        result: dict[str, Any] = {
            "title": comparison.title or f"Compression of {Path(comparison.model).name}",
            "model": {
                "name": Path(comparison.model).name,
                "fingerprint": self.fingerprint,
                "linear_bytes": measured.get("dense_bytes"),
                "model_bytes": measured.get("dense_model_bytes"),
                "n_parameters": measured.get("n_parameters"),
            },
            "calibration": {
                "description": measured.get("calibration", "none"),
                "ids_sha256": measured.get("calibration_sha256"),
            },
            "versions": versions(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "command": comparison.command,
            "evaluation": asdict(comparison.evaluation),
            "dense": dict(dense),
            "texts": [text_name(text) for text in comparison.evaluation.texts],
            "tasks": list(comparison.evaluation.tasks),
            "runs": list(runs),
            "spectra": next((run["spectra"] for run in runs if run.get("spectra")), []),
        }
        write_atomic(self.folder / RESULT_FILE, (json.dumps(result, indent=1) + "\n").encode())
        write_csv(result, self.folder / "results.csv")
        write_modules_csv(result, self.folder / "modules.csv")
        write_html(result, self.folder / "index.html")
        return result


def _remove_weights(model: Path) -> None:
    for file in model.glob("*.safetensors"):
        file.unlink()


def _measured(name: str, measured: Mapping[str, Any]) -> str:
    parts = [f"{text} {value:.3f}" for text, value in measured["perplexity"].items()]
    parts += [f"{task} {value['value']:.4f}" for task, value in measured["tasks"].items()]
    return f"{name}: {', '.join(parts)}"


def _summary_line(cell: Cell, run: Mapping[str, Any]) -> str:
    if "ratio" not in run:
        return f"{cell.name}: {run['status']}"
    return _measured(f"{cell.name}: removed {run['ratio']['stored']:.2%} of bytes", run)


def failed_runs(result: Mapping[str, Any]) -> list[str]:
    """Cells of a result that failed or stayed partial, one line each."""
    return [
        f"{run['label']} {run['ratio_asked']} seed {run['seed']}: {run['status']}"
        for run in result["runs"]
        if run["status"] != "done"
    ]
