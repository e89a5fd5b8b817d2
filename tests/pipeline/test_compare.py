"""The comparison: a grid of cells run as commands, resumed, refused and reported."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cospadi.errors import InputError
from cospadi.pipeline.cell import Evaluation, parse_methods
from cospadi.pipeline.compare import Comparison, compare, failed_runs

COMMON = {"samples": 8, "sequence_length": 64, "iterations": 1}


def test_methods_are_read_with_their_own_settings():
    plain, grouped = parse_methods("svd-llm, cospadi  group_size=2 k_over_s=1.5")
    assert (plain.method, plain.label, dict(plain.settings)) == ("svd-llm", "svd-llm", {})
    assert grouped.label == "cospadi group_size=2 k_over_s=1.5"
    assert dict(grouped.settings) == {"group_size": 2, "k_over_s": 1.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cospadi,,svd", "an entry is empty"),
        ("cosine", "expected one of"),
        ("cospadi ratio", "expected key=value"),
        ("svd,svd", "given twice"),
    ],
)
def test_bad_methods_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_methods(text)


@pytest.fixture(scope="module")
def command(tiny_model_dir, tiny_text):
    """The command line of a small grid on a tiny model, without --out."""
    return [
        sys.executable, "-m", "cospadi", "compare", str(tiny_model_dir("llama")),
        "--methods", "cospadi,svd-llm", "--ratios", "0.3", "--calibration", str(tiny_text),
        "--samples", "8", "--sequence-length", "64", "--set", "iterations=1",
        "--text", str(tiny_text), "--context", "64", "--windows", "3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return out, json.loads((out / "results.json").read_text())


def test_every_cell_is_measured_and_reported(finished, tiny_text):
    out, result = finished
    assert [(run["label"], run["ratio_asked"]) for run in result["runs"]] == [
        ("cospadi", 0.3),
        ("svd-llm", 0.3),
    ]
    for run in result["runs"]:
        assert run["status"] == "done"
        assert run["ratio"]["stored"] >= run["ratio_asked"]
        # untrained: the compressed one may even be better, but it is another model
        assert run["perplexity"][tiny_text.name] != result["dense"]["perplexity"][tiny_text.name]
        assert run["peak_memory_bytes"] > 50e6 and run["seconds"]["total"] > 0
    with (out / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) >= len(result["runs"])
    page = (out / "index.html").read_text()
    assert (
        "svd-llm" in page
        and "<svg" in page
        and "http://" not in page.replace("http://www.w3.org", "")
    )
    # weights are not kept unless asked for
    assert not list(out.glob("cells/*/model/*.safetensors"))


def test_running_again_measures_nothing_and_gives_the_same(finished, command):
    out, result = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*.json")}
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*.json")} == before
    assert json.loads((out / "results.json").read_text())["runs"] == result["runs"]


def commands_of(folder):
    """Processes of cospadi that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            # Python itself, not a shell around it
            if b"-m" in words and any(word.startswith(bytes(folder)) for word in words):
                found.append(int(entry.parent.name))
    return found


@pytest.mark.parametrize("stage", ["compressing", "measuring"])
def test_a_killed_comparison_goes_on_to_the_same_numbers(stage, finished, command, tmp_path):
    """Its process alone is killed: the command that it waits for must not go on beside the one that comes next."""
    _, undisturbed = finished
    out = tmp_path / "out"
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL)
    # in the second cell, whose compression, or measurement, is under way
    begun = "cells/*/model.work/run.json" if stage == "compressing" else "cells/*/compress.json"
    deadline = time.monotonic() + 240
    while not (
        list(out.glob("cells/*/done.json"))
        and any(
            not (p.parents[stage == "compressing"] / "done.json").exists() for p in out.glob(begun)
        )
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(out.glob("cells/*/done.json"))) == 1
    again = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr + again.stdout
    assert not commands_of(out)
    result = json.loads((out / "results.json").read_text())
    for run, expected in zip(result["runs"], undisturbed["runs"], strict=True):
        for key in ("label", "ratio", "perplexity", "stored_bytes", "file_bytes"):
            assert run[key] == expected[key], key
        for name, module in run["modules"].items():
            assert module["relative_error"] == expected["modules"][name]["relative_error"]


def test_a_command_ends_with_the_comparison(command, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(commands_of(out)) < 2:  # itself, and the command that it waits for
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    while commands_of(out):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_text_added_later_is_measured_on_the_same_models(finished, command, tiny_text, tmp_path):
    out, before = finished
    other = tmp_path / "other.txt"
    other.write_text(tiny_text.read_text()[::-1])
    extended = [*command, "--text", str(other), "--out", str(out)]
    subprocess.run(extended, check=True, capture_output=True)
    after = json.loads((out / "results.json").read_text())
    for old, new in zip(before["runs"], after["runs"], strict=True):
        assert set(new["perplexity"]) == {tiny_text.name, "other.txt"}
        assert new["perplexity"][tiny_text.name] == old["perplexity"][tiny_text.name]


def comparison(tiny_model_dir, tiny_text, **changes):
    settings = {
        "model": str(tiny_model_dir("llama")),
        "methods": parse_methods("svd-llm"),
        "ratios": (0.3,),
        "seeds": (42,),
        "common": {"calibration": str(tiny_text), **COMMON},
        "evaluation": Evaluation((str(tiny_text),), 64, 2),
    }
    return Comparison(**{**settings, **changes})


def test_a_failed_cell_is_reported_and_the_others_go_on(tiny_model_dir, tiny_text, tmp_path):
    # the built-in text cannot fill windows of this length: the calibration of one method fails
    methods = parse_methods("svd-llm samples=100000,svd")
    result = compare(comparison(tiny_model_dir, tiny_text, methods=methods), tmp_path / "out")
    first, second = result["runs"]
    assert first["status"].startswith("failed: ") and "windows" in first["status"]
    assert second["status"] == "done"
    assert len(failed_runs(result)) == 1
    assert "failed" in (tmp_path / "out/index.html").read_text()


def test_another_comparison_or_a_full_folder_is_refused(tiny_model_dir, tiny_text, tmp_path):
    out = tmp_path / "out"
    compare(comparison(tiny_model_dir, tiny_text), out)
    changed = comparison(tiny_model_dir, tiny_text, evaluation=Evaluation((str(tiny_text),), 32, 2))
    with pytest.raises(InputError, match="another context"):
        compare(changed, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    with pytest.raises(InputError, match="holds no comparison"):
        compare(comparison(tiny_model_dir, tiny_text), tmp_path / "full")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": (0.2, 1.5)}, "ratio"),
        ({"ratios": ()}, "--ratios"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"common": {"no_such": 1}}, "unknown setting"),
        ({"evaluation": Evaluation((), 64, 2)}, "nothing to measure"),
    ],
)
def test_bad_settings_stop_before_anything_runs(
    changes, message, tiny_model_dir, tiny_text, tmp_path
):
    with pytest.raises(InputError, match=message):
        compare(comparison(tiny_model_dir, tiny_text, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
