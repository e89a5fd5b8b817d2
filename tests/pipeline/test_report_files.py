"""The report and the model card of a real compression: they state what was written, and can be written again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cospadi.checkpoint.manifest import verify_manifest
from cospadi.errors import CheckpointError, InputError
from cospadi.pipeline.compress import compress
from cospadi.pipeline.inspect import inspect_checkpoint
from cospadi.pipeline.report import renew_page
from cospadi.pipeline.verify import verify_checkpoint
from cospadi.report.compression import read_compression

FAST = {"ratio": 0.3, "samples": 8, "sequence_length": 64}


@pytest.fixture(scope="module")
def small(tiny_model_dir, tiny_text, tmp_path_factory):
    """A compressed tiny model with everything that the report may show: (folder, result)."""
    out = tmp_path_factory.mktemp("report") / "small"
    result = compress(
        tiny_model_dir("llama"),
        out,
        calibration=str(tiny_text),
        preset="best",
        reconstruction="blockwise",
        **FAST,
    )
    return out, result


@pytest.fixture
def copied(small, tmp_path) -> Path:
    return Path(shutil.copytree(small[0], tmp_path / "copied"))


def report_of(folder):
    return json.loads((folder / "cospadi_report.json").read_text())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_report_states_the_sizes_that_are_in_the_files(family, tiny_model_dir, tmp_path):
    out = tmp_path / "out"
    settings = {"calibration": "none", "dictionary": "augmented"}
    compress(tiny_model_dir(family), out, **{**FAST, **settings})
    report, found = report_of(out), inspect_checkpoint(out)
    for part, ratio in (("linears", report["ratio"]), ("model", report["model_ratio"])):
        assert ratio == pytest.approx({k: found["ratio"][part][k] for k in ratio})
        sizes = {key: found["bytes"][part][key] for key in ("dense", "stored")}
        assert report["bytes"][part] == sizes
    for linear in read_compression(report).linears:
        module = found["modules"][linear.name]
        for key in ("d_in", "d_out", "n_identity", "n_atoms", "sparsity", "stored_bytes"):
            assert getattr(linear, key) == module[key], key
        assert linear.bits_per_weight == pytest.approx(module["bits_per_weight"], rel=0.01)


def test_a_shared_dictionary_is_named(tiny_model_dir, tiny_text, tmp_path):
    out = tmp_path / "out"
    settings = {"calibration": str(tiny_text), "group_size": 2, "iterations": 1}
    compress(tiny_model_dir("llama"), out, **{**FAST, **settings})
    leaders = {item.name: item.leader for item in read_compression(report_of(out)).linears}
    assert leaders["model.layers.1.mlp.up_proj"] == "model.layers.0.mlp.up_proj"
    assert leaders["model.layers.0.mlp.up_proj"] is None


def test_stages_add_up_to_the_time_of_the_job(small):
    _, result = small
    assert list(result.stages) == [
        "opening the model and the text",
        "gradients of the outputs",
        "division of the budget",
        "calibration",
        "fits",
        "block-wise reconstruction",
    ]
    assert sum(result.stages.values()) == pytest.approx(result.seconds, abs=0.2)
    # small fits run side by side, one per thread
    seconds = [report["seconds"] for report in result.reports.values()]
    assert result.stages["fits"] >= max(seconds) - 0.1
    assert result.stages["fits"] * torch.get_num_threads() >= sum(seconds) - 0.1


def test_the_page_is_written_verified_and_the_same_when_written_again(copied):
    page = copied / "report.html"
    written = page.read_text(encoding="utf-8")
    for name in inspect_checkpoint(copied)["modules"]:
        assert name in re.sub(r"<wbr>|</wbr>", "", written)
    page.write_text("damaged")
    assert len(verify_manifest(copied).problems) == 1
    assert renew_page(copied) == page
    assert page.read_text(encoding="utf-8") == written
    assert verify_checkpoint(copied) == 14


def test_measurements_are_added_and_the_manifest_follows(copied, tmp_path):
    evaluation = {"model": "dense", "text": "held_out.txt", "perplexity": 17.25, "windows": 2}
    file = tmp_path / "e.json"
    file.write_text(json.dumps({**evaluation, "context": 64, "ids_sha256": "0" * 64}))
    renew_page(copied, [file])
    page = (copied / "report.html").read_text(encoding="utf-8")
    assert "17.25" in page and "held_out.txt, perplexity" in page
    assert verify_manifest(copied).problems == () and verify_checkpoint(copied) == 14
    (copied / "cospadi_manifest.json").unlink()  # as save_pretrained leaves it
    renew_page(copied)
    assert not (copied / "cospadi_manifest.json").exists()


def test_what_cannot_be_read_is_named_and_nothing_changes(copied, tmp_path):
    before = (copied / "report.html").read_bytes()
    file = tmp_path / "e.json"
    file.write_text("{}")
    with pytest.raises(InputError, match=r"e\.json: key 'model' is missing"):
        renew_page(copied, [file])
    report = report_of(copied)
    report["modules"]["model.layers.0.mlp.up_proj"]["relative_error"] = "small"
    (copied / "cospadi_report.json").write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match=r"cospadi_report\.json: modules.*'small'"):
        renew_page(copied)
    (copied / "cospadi_report.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        renew_page(copied)
    (copied / "cospadi_report.json").unlink()
    with pytest.raises(InputError, match="missing"):
        renew_page(copied)
    assert (copied / "report.html").read_bytes() == before


def test_a_resumed_run_says_so(tiny_model_dir, tiny_text, tmp_path):
    out = tmp_path / "out"

    def dying(event):
        if event["event"] == "module" and event["index"] == 3:
            raise KeyboardInterrupt

    settings = {**FAST, "calibration": str(tiny_text)}
    with pytest.raises(KeyboardInterrupt):
        compress(tiny_model_dir("llama"), out, listener=dying, **settings)
    result = compress(tiny_model_dir("llama"), out, **settings)
    assert result.n_resumed == 3
    assert "3 linears came from an earlier process" in (out / "report.html").read_text("utf-8")


def test_the_load_example_of_the_card_works_when_pasted(small):
    out, _ = small
    card = (out / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=out,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The ocean is")


def test_the_commands_of_the_card_reproduce_the_checkpoint(small, tiny_model_dir, tmp_path):
    out, _ = small
    (commands,) = re.findall(
        r"```sh\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for line in commands.splitlines():
        command = line.partition("#")[0].split()
        assert command[0] == "cospadi"
        names = {"MODEL": str(tiny_model_dir("llama")), "NEW": str(tmp_path / "new")}
        arguments = [names.get(word, word) for word in command[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "cospadi", *arguments],
            cwd=out,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    weights = "model.safetensors"
    assert (tmp_path / "new" / weights).read_bytes() == (out / weights).read_bytes()
