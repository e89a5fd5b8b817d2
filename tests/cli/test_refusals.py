"""Bad options, files and models: one line per error, exit code 2, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_commands import FAST, one_line
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "--ratio", "abc"], "--ratio"),
        (["plan", "x", "--samplse", "3"], "--samplse"),
        (["plan"], "MODEL"),
        (["generate", "x"], "--prompt"),
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["compress", "x", "--out", "y", "--device", "cuda"], "cuda"),
    ],
)
def test_usage_errors_give_one_line_and_exit_2(arguments, words, cli):
    code, stdout, stderr = cli(*arguments)
    assert code == 2 and stdout == ""
    line = one_line(stderr)
    assert line.startswith("error: ") and words.lower() in line.lower()


def test_errors_of_recipe_files_name_line_and_key(cli, tiny_model_dir, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("samples: 8\n\nratio: big\n")
    wanted = f"error: {recipe} line 3: ratio: expected a number, got 'big'"
    code, _, stderr = cli("recipe", "validate", recipe)
    assert code == 2 and one_line(stderr) == wanted
    compress = ("compress", tiny_model_dir("llama"), "--out", tmp_path / "o", "--recipe", recipe)
    code, _, stderr = cli(*compress)
    assert code == 2 and one_line(stderr) == wanted
    code, _, stderr = cli(*compress, "--set", "ratio=small")  # this one is not in the file
    assert code == 2 and one_line(stderr) == wanted.replace(" line 3", "").replace("big", "small")


def _damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink(missing_ok=True)
    elif kind == "nan":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "config is not json":
        (folder / "config.json").write_text("{model_type: llama")
    elif kind == "config lies":
        config = json.loads((folder / "config.json").read_text())
        config["hidden_size"] = 4096
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no tokenizer", "tokenizer"),
        ("nan", "model.layers.1.mlp.up_proj.weight"),
        ("truncated", "model.safetensors"),
        ("no config", "config.json"),
        ("config is not json", "config.json"),
        ("config lies", "damaged"),
    ],
)
def test_damaged_models_give_one_line_and_exit_2(
    kind, words, cli, damaged_dir, tiny_text, tmp_path
):
    _damage(damaged_dir, kind)
    code, _, stderr = cli(
        "compress", damaged_dir, "--out", tmp_path / "o", "--calibration", tiny_text, *FAST
    )
    assert code == 2, stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    assert words in lines[0], stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ratio", "1.5"], "ratio"),
        (["--ratio", "0"], "ratio"),
        (["--method", "magic"], "method"),
        (["--target", "nothing_like_this"], "nothing_like_this"),
        (["--target", "("], "regular expression"),
        (["--samples", "100000"], "tokens"),
        (["--calibration", "missing/file.txt"], "missing/file.txt"),
        (["--set", "nonsense"], "key=value"),
        (["--set", "ratoi=0.3"], "did you mean ratio"),
        (["--recipe", "missing.yaml"], "missing.yaml"),
        (["--device", "tpu"], "device"),
        (["--threads", "0"], "threads"),
        (["--ignore", ".*proj"], "nothing to compress"),
        (["--ratio", "0.999"], "nothing to compress"),
    ],
)
def test_bad_options_give_one_line_and_exit_2(
    options, words, cli, tiny_model_dir, tiny_text, tmp_path
):
    arguments = [
        "compress",
        tiny_model_dir("llama"),
        "--out",
        tmp_path / "o",
        "--calibration",
        tiny_text,
        *FAST,
    ]
    code, _, stderr = cli(*arguments, *options)
    assert code == 2, stderr
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and words in lines[0], stderr
    assert not (tmp_path / "o").exists()


def test_text_shorter_than_a_window(cli, tiny_model_dir, compressed, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    for command in (
        [
            "compress",
            tiny_model_dir("llama"),
            "--out",
            tmp_path / "o",
            "--calibration",
            short,
            *FAST,
        ],
        ["eval", compressed[0], "--text", short, "--context", "64"],
    ):
        code, _, stderr = cli(*command)
        assert code == 2 and "token" in stderr and len(stderr.strip().splitlines()) == 1, stderr


def test_unwritable_output(cli, tiny_model_dir, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    code, _, stderr = cli("compress", tiny_model_dir("llama"), "--out", blocker / "out")
    assert code == 2 and "cannot be written" in stderr


def test_unwritable_json_is_refused_before_the_work(cli, tiny_model_dir, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    for command in (
        ("eval", "no such model", "--text", "no such text"),
        ("generate", "no such model", "--prompt", "The"),
    ):
        code, _, stderr = cli(*command, "--json", blocker / "result.json")
        assert code == 2 and "--json" in stderr and "cannot be written" in stderr


def test_a_compressed_folder_without_a_tokenizer(copied, cli, tiny_text, tmp_path):
    (copied / "tokenizer.json").unlink()
    ids = tmp_path / "ids.safetensors"
    save_file({"evaluation": torch.arange(2, 300)}, ids)
    by_ids = ["eval", copied, "--context", 64, "--text", ids]
    commands = (
        ["eval", copied, "--context", 64, "--text", tiny_text],
        ["generate", copied, "--prompt", "The"],
    )
    for command in commands:
        code, _, stderr = cli(*command)
        assert code == 2 and f"error: {copied} has no tokenizer" in one_line(stderr)
    (copied / "tokenizer_config.json").unlink()
    code, stdout, stderr = cli(*by_ids)
    assert code == 0 and "4 windows of 64" in stdout, stderr


@pytest.mark.parametrize("content", ["[1", "{}", '{"modules": {}}', None])
def test_inspect_tells_when_the_report_is_missing_or_damaged(copied, cli, content):
    report = copied / "cospadi_report.json"
    if content is None:
        report.unlink()
    else:
        report.write_text(content)
    code, stdout, stderr = cli("inspect", copied)
    assert code == 0 and "error ?" in stdout
    state = "missing" if content is None else "damaged or incomplete"
    assert one_line(stderr).startswith(f"warning: {report} is {state}: the errors of 14 of 14")
    code, stdout, _ = cli("inspect", copied, "--json", "-")
    assert code == 0 and len(json.loads(stdout)["modules"]) == 14


def test_inspect_of_a_report_with_one_wrong_error(copied, cli):
    report = json.loads((copied / "cospadi_report.json").read_text())
    report["modules"]["model.layers.0.mlp.up_proj"]["relative_error"] = "small"
    report["failed"] = [3]
    (copied / "cospadi_report.json").write_text(json.dumps(report))
    code, stdout, stderr = cli("inspect", copied)
    assert code == 0 and stdout.count("error ?") == 1 and "1 of 14" in one_line(stderr)


def test_surplus_tensors_are_reported(cli, damaged_dir, tmp_path):
    weights = damaged_dir / "model.safetensors"
    extra = {"model.layers.2.mlp.up_proj.weight": torch.zeros(3, 3), "z.weight": torch.zeros(3)}
    save_file(load_file(weights) | extra, weights, metadata={"format": "pt"})
    ids = tmp_path / "ids.safetensors"
    save_file({"evaluation": torch.arange(2, 300)}, ids)
    for command in (
        ["eval", damaged_dir, "--context", 64, "--text", ids],
        ["export", "--dense", damaged_dir, "--out", tmp_path / "dense"],
        ["generate", damaged_dir, "--prompt", "The", "--max-new-tokens", 2],
    ):
        code, _, stderr = cli(*command)
        assert code == 0
        first = stderr.splitlines()[0]
        assert first.startswith("warning: damaged: 2 tensors of the checkpoint"), stderr
        assert "first model.layers.2.mlp.up_proj.weight" in first


def test_verify_without_a_manifest_says_so(copied, cli):
    (copied / "cospadi_manifest.json").unlink()
    code, stdout, stderr = cli("verify", copied)
    assert code == 0 and one_line(stderr).startswith("note: cospadi_manifest.json is missing")
    assert "shapes, masks and values of 14 modules hold" in stdout and "hashes" not in stdout


def test_verify_names_files_that_came_later(copied, cli):
    for i in range(7):
        (copied / f"later{i}.txt").write_text("x")
    code, _, stderr = cli("verify", copied)
    assert code == 0 and "does not list it: later0.txt" in stderr and "and 2 more" in stderr


def test_verify_exit_codes(copied, cli, tiny_model_dir, tmp_path):
    code, stdout, _ = cli("verify", "--help")
    assert code == 0 and all(text in stdout for text in ("Exit codes", "0 every", "2 no", "4 some"))
    for folder in (tmp_path / "nothing", tiny_model_dir("llama")):
        code, _, stderr = cli("verify", folder)
        assert code == 2 and one_line(stderr).startswith("error: ")
    code, _, stderr = cli("verify", copied, "--calibration", "builtin")
    assert code == 2 and "--source" in one_line(stderr)
    code, _, stderr = cli("verify", copied, "--source", tiny_model_dir("gpt2"))
    assert code == 4 and "another model" in one_line(stderr)
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, _, stderr = cli("verify", copied)
    assert code == 4 and "truncated" in one_line(stderr)
