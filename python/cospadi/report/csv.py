"""The numbers of a comparison as CSV: one row per run, or one row per module of a run."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cospadi.report.conventions import conventions_of
from cospadi.report.files import write_text
from cospadi.report.result import Result, Run, read_result

Cell = str | int | float | None

_KEYS = ("method", "label", "ratio_asked", "seed", "status")


def write_csv(result: Mapping[str, Any], path: str | Path) -> None:
    """Write one row per run with all its numbers; see `csv_text`.

    Raises
    ------
    InputError
        The data is not that of a comparison, or the file cannot be written.
    """
    write_text(path, csv_text(result))


def write_modules_csv(result: Mapping[str, Any], path: str | Path) -> None:
    """Write one row per module of every run: the numbers behind the error maps. Errors as for `write_csv`."""
    write_text(path, modules_csv_text(result))


def csv_text(result: Mapping[str, Any]) -> str:
    """One row per run, failed ones too. Numbers have full precision; what was not measured is empty.

    Ratios are removed shares, sizes bytes. Of the modules' relative errors there are count, mean and maximum.
    """
    data = read_result(result)
    ratios = conventions_of(data)
    columns = [
        *_KEYS,
        *(f"ratio_{key}" for key in ratios),
        *(f"model_ratio_{key}" for key in ratios),
        "stored_bytes",
        "file_bytes",
        "dense_linear_bytes",
        *(f"perplexity {text}" for text in data.texts),
        *(f"{part} {task}" for task in data.tasks for part in ("task", "stderr")),
        *(f"seconds_{key}" for key in ("calibration", "fit", "total")),
        "peak_memory_bytes",
        "resumed",
        "n_modules",
        "relative_error_mean",
        "relative_error_max",
    ]
    return _csv(columns, (_row(data, run, ratios) for run in data.runs))


def modules_csv_text(result: Mapping[str, Any]) -> str:
    """One row per run and module: relative error, atoms, sparsity, stored bytes."""
    data = read_result(result)
    columns = [*_KEYS, "module", "relative_error", "n_atoms", "sparsity", "stored_bytes"]
    rows = (
        [*_key_cells(run), name, m.relative_error, m.n_atoms, m.sparsity, m.stored_bytes]
        for run in data.runs
        for name, m in run.modules.items()
    )
    return _csv(columns, rows)


def _key_cells(run: Run) -> list[Cell]:
    return [run.method, run.label, run.ratio_asked, run.seed, run.status]


def _row(data: Result, run: Run, ratios: Sequence[str]) -> list[Cell]:
    errors = [m.relative_error for m in run.modules.values() if m.relative_error is not None]
    scores = [run.tasks.get(task) for task in data.tasks]
    return [
        *_key_cells(run),
        *(run.ratio.get(key) for key in ratios),
        *(run.model_ratio.get(key) for key in ratios),
        run.stored_bytes,
        run.file_bytes,
        data.linear_bytes,
        *(run.perplexity.get(text) for text in data.texts),
        *(part for s in scores for part in ((s.value, s.stderr) if s else (None, None))),
        *(run.seconds.get(key) for key in ("calibration", "fit", "total")),
        run.peak_memory_bytes,
        int(run.is_resumed),
        len(run.modules),
        statistics.fmean(errors) if errors else None,
        max(errors, default=None),
    ]


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return sink.getvalue()
