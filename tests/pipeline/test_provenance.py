"""Equal inputs give equal manifests; what differs from run to run stands apart and is checked all the same."""

from __future__ import annotations

import json
import shutil

import pytest

from cospadi.checkpoint.manifest import MANIFEST_FILE, RUN_FILE, verify_manifest
from cospadi.errors import CheckpointError, InputError, VerificationError
from cospadi.pipeline.compress import compress
from cospadi.pipeline.report import REPORT_FILE, read_report, split_report
from cospadi.pipeline.verify import verify_checkpoint

FAST = {"ratio": 0.3, "samples": 8, "sequence_length": 64}


def manifest(folder) -> bytes:
    return (folder / MANIFEST_FILE).read_bytes()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("gpt2", {"dictionary": "learned", "iterations": 2}),
        ("qwen2", {"method": "svd-llm"}),
        ("llama", {"reconstruction": "blockwise"}),
    ],
)
def test_two_runs_give_equal_manifests(family, settings, tiny_model_dir, tiny_text, tmp_path):
    source = tiny_model_dir(family)
    for name in ("a", "b"):
        compress(source, tmp_path / name, calibration=str(tiny_text), **{**FAST, **settings})
    assert manifest(tmp_path / "a") == manifest(tmp_path / "b")
    listed = json.loads(manifest(tmp_path / "a"))["files"]
    in_folder = {f.name for f in (tmp_path / "a").iterdir()}
    assert in_folder - listed.keys() == {MANIFEST_FILE, RUN_FILE, "report.html", "README.md"}


def test_another_seed_gives_another_manifest(tiny_model_dir, tiny_text, tmp_path):
    for seed in (1, 2):
        settings = {**FAST, "seed": seed, "calibration": str(tiny_text)}
        compress(tiny_model_dir("llama"), tmp_path / str(seed), **settings)
    assert manifest(tmp_path / "1") != manifest(tmp_path / "2")


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    compress(tiny_model_dir("llama"), out, calibration="none", ratio=0.3)
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


def test_times_are_in_the_run_record_alone(finished):
    report, run = (json.loads((finished / f).read_text()) for f in (REPORT_FILE, RUN_FILE))
    text = json.dumps(report)
    assert "seconds" not in text and "threads" not in text and "coding_s" not in text
    assert run["seconds"] > 0 and run["threads"] >= 1
    assert run["modules"].keys() == report["modules"].keys()
    joined = read_report(finished)
    assert joined["stages"] == run["stages"]
    name = next(iter(joined["modules"]))
    assert joined["modules"][name]["seconds"] == run["modules"][name]["seconds"]


def test_splitting_loses_nothing_but_the_clocks_of_alternations():
    step = {"iteration": 0, "error": 0.5, "coding_s": 1.0, "update_s": 2.0}
    data = {
        "seconds": 3.0,
        "recipe": {"ratio": 0.2},
        "modules": {"a": {"relative_error": 0.1, "seconds": 1.5, "history": [step]}},
        "reconstruction": [{"block": 0, "seconds": 9.0}],
    }
    report, run = split_report(data)
    assert report == {
        "recipe": {"ratio": 0.2},
        "modules": {"a": {"relative_error": 0.1, "history": [{"iteration": 0, "error": 0.5}]}},
        "reconstruction": [{"block": 0}],
    }
    assert run["modules"] == {"a": {"seconds": 1.5, "coding_s": [1.0], "update_s": [2.0]}}
    assert (run["seconds"], run["reconstruction"]) == (3.0, [9.0])


@pytest.mark.parametrize("name", ["report.html", "recipe.yaml", "README.md", "config.json"])
def test_every_file_is_checked(name, copied):
    (copied / name).write_bytes((copied / name).read_bytes() + b" ")
    (problem,) = verify_manifest(copied).problems
    assert name in problem
    with pytest.raises(VerificationError, match=name):
        verify_checkpoint(copied)


def test_a_folder_without_a_run_record_is_one_of_an_older_version(copied):
    listed = json.loads((copied / RUN_FILE).read_text())["files"]
    (copied / RUN_FILE).unlink()
    assert verify_manifest(copied).unlisted == ("README.md", "report.html")
    content = json.loads(manifest(copied))
    content["files"] |= listed
    (copied / MANIFEST_FILE).write_text(json.dumps(content))
    assert verify_checkpoint(copied) == 14 and verify_manifest(copied).unlisted == ()
    assert "seconds" not in read_report(copied)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "JSON object"),
        ('{"files": 3}', "expected files"),
        ('{"files": {"../x": {}}}', "no path inside"),
        ('{"files": {"report.html": 3}}', "expected an object"),
        ('{"files": {"a": {"bytes": NaN}}}', "NaN"),
    ],
)
def test_hostile_run_records_are_refused(content, message, copied):
    (copied / RUN_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        verify_manifest(copied)
    with pytest.raises(VerificationError, match=message):
        verify_checkpoint(copied)


def test_a_run_record_that_leads_out_is_not_read(copied, tmp_path):
    (copied / RUN_FILE).unlink()
    (copied / RUN_FILE).symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="leads out"):
        read_report(copied)
