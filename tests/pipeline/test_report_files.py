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

from cospadi.checkpoint.manifest import manifest_sha256, verify_manifest
from cospadi.errors import CheckpointError, InputError
from cospadi.pipeline.compress import compress
from cospadi.pipeline.inspect import inspect_checkpoint
from cospadi.pipeline.report import renew_page
from cospadi.pipeline.stated_origin import stated_origin
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


def evaluation(tmp_path, model, perplexity, name="e.json", **changes):
    """A file as eval --json writes it."""
    data = {"model": str(model), "text": "held_out.txt", "perplexity": perplexity, "windows": 2}
    data |= {"context": 64, "ids_sha256": "0" * 64}
    (tmp_path / name).write_text(json.dumps({**data, **changes}))
    return tmp_path / name


def shown(folder):
    page = (folder / "report.html").read_text(encoding="utf-8").replace("\u2009", " ")
    return page, (folder / "README.md").read_text(encoding="utf-8").replace("\u2009", " ")


def test_measurements_stay_and_newer_ones_replace_them(copied, small, tiny_model_dir, tmp_path):
    manifest = (copied / "cospadi_manifest.json").read_bytes()
    unmeasured = shown(copied)
    assert "Not measured yet" in unmeasured[0] and "Not measured yet" in unmeasured[1]
    renew_page(copied, [evaluation(tmp_path, tiny_model_dir("llama"), 17.25)])
    renew_page(copied, [evaluation(tmp_path, copied, 20.0)])
    answers = {"value": 0.5, "stderr": 0.1, "metric": "acc", "items": 9, "items_sha256": "ab" * 32}
    task = {"piqa": answers}
    renew_page(copied, [evaluation(tmp_path, copied, None, tasks=task)])
    # another folder of a result is neither of the two
    renew_page(copied, [evaluation(tmp_path, small[0], 99.0)])
    for text in shown(copied):
        for fact in ("17.25", "20.00", "+2.75 (+15.9 %)", "piqa, acc", "99.00", "original"):
            assert fact in text, fact
        assert "Not measured yet" not in text
    renew_page(copied, [evaluation(tmp_path, copied, 19.0)])
    for text in shown(copied):
        assert "+1.75 (+10.1 %)" in text and "20.00" not in text and "piqa" in text
    before = shown(copied)
    renew_page(copied)
    assert shown(copied) == before
    # measurements are no part of what equal inputs decide
    assert (copied / "cospadi_manifest.json").read_bytes() == manifest
    assert verify_manifest(copied).problems == () and verify_checkpoint(copied) == 14


def test_the_original_may_have_been_measured_under_another_name(copied, tmp_path):
    renew_page(copied, [evaluation(tmp_path, copied, 20.0)])
    renew_page(copied, originals=[evaluation(tmp_path, "exported/dense", 16.0)])
    for text in shown(copied):
        assert "+4.00 (+25.0 %)" in text and "exported" not in text


def test_a_copy_under_another_name_is_known_by_its_manifest(copied, tmp_path):
    there = {"manifest_sha256": manifest_sha256(copied)}
    renew_page(copied, [evaluation(tmp_path, "/elsewhere/link", 24.5, **there)])
    assert "compressed | 24.50" in shown(copied)[1]
    renew_page(copied, [evaluation(tmp_path, "/elsewhere/other", 25.5, manifest_sha256="0" * 64)])
    assert "/elsewhere/other | 25.50" in shown(copied)[1]


def test_words_that_the_owner_added_to_the_card_stay(copied, tmp_path):
    card = (copied / "README.md").read_text(encoding="utf-8")
    (copied / "README.md").write_text(card + "\n## Thanks\n\nTo all.\n", encoding="utf-8")
    renew_page(copied, [evaluation(tmp_path, copied, 20.0)])
    card = (copied / "README.md").read_text(encoding="utf-8")
    assert card.endswith("\n## Thanks\n\nTo all.\n") and "20.00" in card
    assert verify_checkpoint(copied) == 14
    (copied / "README.md").unlink()
    renew_page(copied)
    card = (copied / "README.md").read_text(encoding="utf-8")
    assert "AutoTokenizer" in card and "20.00" in card and "Thanks" not in card


def test_a_folder_of_an_older_version_keeps_measurements(copied, tmp_path):
    run = json.loads((copied / "cospadi_run.json").read_text())
    manifest = json.loads((copied / "cospadi_manifest.json").read_text())
    manifest["files"] |= run["files"]
    (copied / "cospadi_manifest.json").write_text(json.dumps(manifest))
    (copied / "cospadi_run.json").unlink()
    renew_page(copied, [evaluation(tmp_path, copied, 20.0)])
    renew_page(copied)
    assert all("20.00" in text for text in shown(copied)) and verify_checkpoint(copied) == 14


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"files": {}, "measured": 3}, r"cospadi_run\.json: measured: expected a list"),
        ({"files": {}, "measured": [{"model": "a"}]}, r"measured\[0\]: key 'what' is missing"),
        ({"files": {}, "measured": [[]]}, r"measured\[0\]: expected an object"),
    ],
)
def test_hostile_measurements_are_refused_and_nothing_changes(content, message, copied, tmp_path):
    before = shown(copied)
    (copied / "cospadi_run.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        renew_page(copied, [evaluation(tmp_path, copied, 20.0)])
    assert shown(copied) == before


def test_measured_names_cannot_become_markup(copied, tmp_path):
    evil = "</style><script>alert(1)</script>\n## Reproduce\n[x](http://y)"
    renew_page(copied, [evaluation(tmp_path, evil, 20.0, text=evil)])
    page, card = shown(copied)
    assert "<script" not in page and not re.search(r"(?<!\\)<script|(?<!\\)\]\(http", card)
    assert card.count("\n## ") == 2


def test_the_command_of_the_page_and_of_the_card_names_the_threads(copied, small):
    threads = f"--threads {json.loads((copied / 'cospadi_run.json').read_text())['threads']}"
    assert all(f"--recipe recipe.yaml {threads}" in text for text in shown(copied))


@pytest.mark.parametrize(
    ("card", "config", "found"),
    [
        (
            "---\nlicense: apache-2.0\nbase_model: org/a\n---\n",
            {},
            {"license": "apache-2.0", "base_model": "org/a"},
        ),
        (
            "---\nbase_model:\n- org/a\nlicense: 'mit'\n---\n",
            {},
            {"license": "mit", "base_model": "org/a"},
        ),
        ("---\nbase_model:\n- org/a\n- org/b\n---\n", {}, {}),
        ("no front matter\nlicense: mit\n", {"_name_or_path": "org/a"}, {"base_model": "org/a"}),
        ("---\nlicense: [mit, gpl]\nbase_model: ../../etc\n---\n", {"_name_or_path": "/me/x"}, {}),
        ("---\nlicense: mit  # as it is\n---\n", {}, {"license": "mit"}),
        ("---\nlicense: &a mit\nb: *a\n---\n", {}, {}),
        ("---\n- license: mit\n---\n", {}, {}),
        ("---\nlicense: {mit: 1\n---\n", {}, {}),
        ("---\nlicense: no\n---\n", {}, {}),
        (None, {"license": 3}, {}),
    ],
)
def test_origin_and_licence_are_taken_where_they_are_stated(card, config, found, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stated_origin(tmp_path) == found
    assert stated_origin(tmp_path / "a.gguf") == {}


def test_a_compression_passes_origin_and_licence_on(damaged_dir, tmp_path):
    (damaged_dir / "README.md").write_text("---\nlicense: mit\nbase_model: org/a\n---\n# A model\n")
    compress(damaged_dir, tmp_path / "out", calibration="none", ratio=0.3)
    card = (tmp_path / "out/README.md").read_text()
    assert '\nbase_model: "org/a"\nlicense: "mit"\n---\n' in card


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
    # those that ran beside the third may have been finished, too
    assert 3 <= result.n_resumed < 3 + torch.get_num_threads()
    text = f"{result.n_resumed} linears came from an earlier process"
    assert text in (out / "report.html").read_text("utf-8")


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
