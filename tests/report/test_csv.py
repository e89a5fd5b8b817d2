"""The CSV files hold every number of the data, exactly."""

from __future__ import annotations

import csv
import io

import pytest
from made_up import TASKS, TEXTS, comparison, failed, large, run

from cospadi.errors import InputError
from cospadi.report.csv import csv_text, modules_csv_text, write_csv, write_modules_csv


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_one_row_per_run_with_exact_numbers():
    data = large()
    rows = rows_of(csv_text(data))
    assert len(rows) == len(data["runs"])
    for row, item in zip(rows, data["runs"], strict=True):
        asked = "" if item["ratio_asked"] is None else str(item["ratio_asked"])
        assert (row["label"], row["ratio_asked"]) == (item["label"], asked)
        assert (int(row["seed"]), row["status"]) == (item["seed"], item["status"])
        if item["status"].startswith("failed"):
            assert all(row[f"perplexity {text}"] == "" for text in TEXTS)
            assert row["stored_bytes"] == "" and row["relative_error_mean"] == ""
            continue
        for key, value in item["ratio"].items():
            assert float(row[f"ratio_{key}"]) == value
            assert float(row[f"model_ratio_{key}"]) == item["model_ratio"][key]
        for text in TEXTS:
            assert float(row[f"perplexity {text}"]) == item["perplexity"][text]
        for task in TASKS:
            assert float(row[f"task {task}"]) == item["tasks"][task]["value"]
            assert float(row[f"stderr {task}"]) == item["tasks"][task]["stderr"]
        for key, value in item["seconds"].items():
            assert float(row[f"seconds_{key}"]) == value
        for key in ("stored_bytes", "file_bytes", "peak_memory_bytes"):
            assert int(row[key]) == item[key]
        errors = [module["relative_error"] for module in item["modules"].values()]
        assert int(row["n_modules"]) == len(errors)
        assert float(row["relative_error_max"]) == max(errors)
        assert float(row["relative_error_mean"]) == pytest.approx(sum(errors) / len(errors))


def test_odd_names_survive():
    label = 'a,b "c"\nd; é 漢字 \u202e'
    item = run("m", label, 0.2, 1, quality=3.0, seconds=1, layers=1)
    lost = failed("m", label, 0.3, 1, 'said "no",\nthen died')
    rows = rows_of(csv_text(comparison([item, lost], layers=1)))
    assert [row["label"] for row in rows] == [label, label]
    assert rows[1]["status"] == lost["status"]


def test_missing_measurements_are_empty():
    item = run("m", "m", 0.2, 1, quality=3.0, seconds=1, layers=1)
    del item["perplexity"][TEXTS[1]], item["tasks"]["piqa"], item["peak_memory_bytes"]
    item["ratio"]["values"] = None
    row = rows_of(csv_text(comparison([item], layers=1)))[0]
    for column in (f"perplexity {TEXTS[1]}", "task piqa", "peak_memory_bytes", "ratio_values"):
        assert row[column] == "", column
    assert float(row["task hellaswag"]) == item["tasks"]["hellaswag"]["value"]


def test_one_row_per_module():
    items = [run("m", "m", ratio, 1, quality=3.0, seconds=1, layers=2) for ratio in (0.2, 0.3)]
    rows = rows_of(modules_csv_text(comparison(items, layers=2)))
    assert len(rows) == 2 * 2 * 7
    for row in rows:
        item = next(i for i in items if i["ratio_asked"] == float(row["ratio_asked"]))
        module = item["modules"][row["module"]]
        assert float(row["relative_error"]) == module["relative_error"]
        for key in ("n_atoms", "sparsity", "stored_bytes"):
            assert int(row[key]) == module[key]


def test_files_are_written_whole_and_errors_are_ours(tmp_path):
    data = comparison([run("m", "é", 0.2, 1, quality=3.0, seconds=1, layers=1)], layers=1)
    for write, text in ((write_csv, csv_text(data)), (write_modules_csv, modules_csv_text(data))):
        path = tmp_path / "results.csv"
        write(data, path)
        assert path.read_bytes().decode("utf-8") == text
        assert list(tmp_path.iterdir()) == [path]
        with pytest.raises(InputError, match="cannot be written"):
            write(data, tmp_path / "missing" / "results.csv")
