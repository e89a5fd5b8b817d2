"""The command line: the contract scripts rely on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from cli_commands import one_line

from cospadi.cli.common import megabytes
from cospadi.cli.live import Eta
from cospadi.cli.options import CoeffsDtype, DictionaryDtype
from cospadi.factor.spec import COEFFS_DTYPES, DICTIONARY_DTYPES
from cospadi.pipeline.recipe_file import recipe_from_mapping


def test_compress_prints_plain_lines_and_leaves_a_log(compressed):
    out, stdout = compressed
    lines = [line for line in stdout.splitlines() if line.startswith("[")]
    assert len(lines) == 14
    assert "left" in lines[0] and "error=" in lines[0]
    events = [
        json.loads(line) for line in out.with_name("small.log.jsonl").read_text().splitlines()
    ]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "done"]
    assert sum(event["event"] == "module" for event in events) == 14


def test_eval_json(compressed, cli, tiny_text, tmp_path):
    out, _ = compressed
    code, _, _ = cli(
        "eval",
        out,
        "--text",
        tiny_text,
        "--context",
        64,
        "--windows",
        3,
        "--json",
        tmp_path / "e.json",
    )
    assert code == 0
    data = json.loads((tmp_path / "e.json").read_text())
    assert data["windows"] == 3 and data["context"] == 64 and data["tokens"] == 3 * 63
    assert len(data["ids_sha256"]) == 64
    assert data["perplexity"] == pytest.approx(
        torch.tensor(data["nll_per_token"]).exp().item(), rel=1e-5
    )


def test_inspect_json(compressed, cli):
    out, _ = compressed
    code, stdout, _ = cli("inspect", out, "--json", "-")
    assert code == 0
    data = json.loads(stdout)
    assert set(data["ratio"]["linears"]) == {"values", "mask16", "mask14", "stored", "file"}
    module = data["modules"]["model.layers.0.mlp.up_proj"]
    assert module["d_in"] == 64 and module["relative_error"] > 0
    code, stdout, _ = cli("inspect", out)
    assert code == 0 and "removed" in stdout


def test_generate_is_greedy_and_reproducible(compressed, cli):
    out, _ = compressed
    texts = [
        json.loads(
            cli("generate", out, "--prompt", "The", "--max-new-tokens", 8, "--json", "-")[1]
        )["text"]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]


def test_verify_and_export(compressed, cli, tiny_model_dir, tmp_path):
    out, _ = compressed
    code, stdout, _ = cli("verify", out, "--source", tiny_model_dir("llama"))
    assert code == 0 and "hashes, shapes, masks and values of 14 modules hold" in stdout
    assert "14 of 14 stated errors hold" in stdout
    code, _, _ = cli("export", "--dense", out, "--out", tmp_path / "dense")
    assert code == 0 and (tmp_path / "dense/config.json").exists()
    code, _, stderr = cli("export", "--dense", tmp_path / "dense", "--out", tmp_path / "again")
    assert code == 0 and "is not compressed; its weights are copied as bfloat16" in stderr
    weights = out / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        code, _, stderr = cli("verify", out)
    finally:
        weights.write_bytes(content)
    assert code == 4 and "model.safetensors" in stderr


@pytest.mark.parametrize("forms", [[], ["--dense", "--onnx"]])
def test_an_export_has_one_form(compressed, cli, tmp_path, forms):
    code, _, stderr = cli("export", *forms, compressed[0], "--out", tmp_path / "exported")
    assert code == 2 and "name one form to write, --dense or --onnx" in stderr
    assert not (tmp_path / "exported").exists()


def test_report_is_written_again_with_measurements(copied, cli, tiny_text, tmp_path):
    file = tmp_path / "e.json"
    evaluate = ("eval", copied, "--text", tiny_text, "--context", 64, "--windows", 2)
    assert cli(*evaluate, "--json", file)[0] == 0
    before = (copied / "report.html").read_text(encoding="utf-8")
    code, stdout, stderr = cli("report", copied, "--eval", file)
    assert code == 0 and stdout.strip() == str(copied / "report.html"), stderr
    page = (copied / "report.html").read_text(encoding="utf-8")
    assert "2 windows of 64 tokens" in page and "2 windows of 64 tokens" not in before
    assert "note: " not in stderr and " ± " in (copied / "README.md").read_text(encoding="utf-8")
    # a link has another name, and is the same; what is neither is named
    link = tmp_path / "linked"
    link.symlink_to(copied)
    assert cli("eval", link, *evaluate[2:], "--json", file)[0] == 0
    code, _, stderr = cli("report", copied, "--eval", file)
    assert code == 0 and "note: " not in stderr
    file.write_text(file.read_text().replace("manifest_sha256", "of_another"))
    link.unlink()
    code, _, stderr = cli("report", copied, "--eval", file)
    assert code == 0 and f"note: {link}: neither this folder nor its original" in one_line(stderr)
    assert cli("verify", copied)[0] == 0
    code, _, stderr = cli("report", tmp_path)
    assert code == 2 and "cospadi_report.json: missing" in one_line(stderr)
    code, _, stderr = cli("report", copied, "--eval", tmp_path / "none.json")
    assert code == 2 and "none.json: cannot be read" in one_line(stderr)


def test_plan_says_what_compress_will_refuse(cli, tiny_model_dir):
    given = ("--ratio", 0.3, "--samples", 4, "--sequence-length", 100_000)
    code, _, stderr = cli("plan", tiny_model_dir("llama"), *given)
    assert code == 0 and stderr.startswith("note: compress will refuse this: sequences of 100000")
    assert not cli("plan", tiny_model_dir("llama"), *given, "--calibration", "none")[2]


def test_plan_reads_no_weights(cli, tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir("llama"), tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    code, stdout, stderr = cli("plan", copy, "--ratio", 0.4, "--json", tmp_path / "p.json")
    assert code == 0, stderr
    assert "removed" in stdout
    assert json.loads((tmp_path / "p.json").read_text())["ratio"]["stored"] >= 0.4


def test_a_plan_for_a_gpu_needs_none(cli, tiny_model_dir, tmp_path):
    source, words = tiny_model_dir("llama"), ["--ratio", 0.3, "--device", "cuda"]
    code, said, errors = cli("plan", source, *words, "--json", tmp_path / "p.json")
    assert code == 0, errors
    assert "GPU memory, computed and not measured on a card: " in said
    assert "one block at a time" in said and "time on a GPU: not estimated" in said
    assert json.loads((tmp_path / "p.json").read_text())["resources"]["device"]["model_bytes"] > 0
    code, said, _ = cli("plan", source, *words, "--set", "sequential=true")
    assert code == 0 and "not known with sequential True" in said
    code, said, _ = cli("plan", source, *words, "--calibration", "none")
    assert code == 0 and "fits alone" in said and "pinned" not in said


@pytest.mark.parametrize("group", [(), ("recipe",)])
def test_summaries_of_commands_are_whole(group, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, stdout, _ = cli(*group, "--help")
    summaries = stdout.split("Commands:\n")[1].splitlines()
    assert code == 0 and len(summaries) == (4 if group else 13)
    for line in summaries:
        assert line.endswith(".") and not line.endswith("..."), line


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipe", "schema"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_left_ends_the_command_without_a_word(arguments, unbuffered):
    theirs, ours = os.pipe()
    os.close(theirs)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cospadi", *arguments],
            stdout=ours,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    finally:
        os.close(ours)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_help_names_every_type_that_can_be_stored():
    for option, known in ((CoeffsDtype, COEFFS_DTYPES), (DictionaryDtype, DICTIONARY_DTYPES)):
        (info,) = option.__metadata__
        named = set(re.findall(r"\w+", info.help.split("[")[0]))
        assert named.issuperset(known)


def test_help_and_version(cli):
    for arguments in (["--help"], ["compress", "--help"]):
        code, stdout, stderr = cli(*arguments)
        assert code == 0 and stdout.startswith("Usage: ") and stderr == ""
    code, stdout, _ = cli("--version")
    assert code == 0 and len(stdout.split()) == 1
    code, stdout, stderr = cli()
    assert code == 2 and stdout == "" and stderr.startswith("Usage: ") and "compress" in stderr


@pytest.mark.parametrize(
    ("built", "devices", "torch_has_cuda", "says"),
    [
        (False, 0, False, "none: this build has no CUDA"),
        (True, 0, True, "not usable: no CUDA device or driver"),
        (True, 1, False, "not usable: torch sees no CUDA device"),
        (True, 1, True, "inference"),
    ],
)
def test_doctor_says_what_cuda_is_good_for(built, devices, torch_has_cuda, says):
    from cospadi.cli.doctor import _cuda_kernels

    runtime = {"cuda_built": built, "cuda_devices": devices}
    assert says in _cuda_kernels(runtime, torch_has_cuda)


def test_doctor(cli):
    code, stdout, _ = cli("doctor", "--json", "-")
    info = json.loads(stdout)
    assert code == 0 and info["isa"] in info["available_isas"]


def test_settings_win_over_options_and_file(cli, tiny_model_dir, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("ratio: 0.5\nmethod: svd-llm\n")
    arguments = ["plan", tiny_model_dir("llama"), "--recipe", recipe, "--json", "-"]
    assert json.loads(cli(*arguments)[1])["ratio"]["stored"] == pytest.approx(0.5, abs=0.02)
    assert json.loads(cli(*arguments, "--ratio", 0.3)[1])["ratio"]["stored"] == pytest.approx(
        0.3, abs=0.02
    )
    found = json.loads(cli(*arguments, "--ratio", 0.3, "--set", "ratio=0.6")[1])
    assert found["ratio"]["stored"] == pytest.approx(0.6, abs=0.02)


def test_recipes_are_written_shown_and_checked(cli, tmp_path):
    recipe = tmp_path / "r.yaml"
    code, stdout, _ = cli("recipe", "init", "--preset", "best", "-o", recipe)
    assert code == 0 and stdout.strip() == str(recipe)
    assert cli("recipe", "init", "--preset", "best")[1] == recipe.read_text()
    code, _, stderr = cli("recipe", "init", "-o", recipe)
    assert code == 2 and "exists" in one_line(stderr)
    code, stdout, _ = cli("recipe", "validate", recipe)
    assert code == 0 and stdout.strip() == f"{recipe}: valid"
    shown = cli("recipe", "show", recipe)[1]
    assert shown == cli("recipe", "show", "best")[1] and "allocation: loss" in shown
    code, stdout, _ = cli("recipe", "schema")
    assert code == 0 and json.loads(stdout)["properties"]["ratio"]["default"] == 0.2
    code, _, stderr = cli("recipe", "show", tmp_path / "none.yaml")
    assert code == 2 and "cannot be read" in one_line(stderr)
    for name in ("fastt", "x" * 300):
        code, _, stderr = cli("recipe", "show", name)
        assert code == 2 and one_line(stderr).endswith("no preset either: fast, paper, best")
    code, _, stderr = cli("recipe", "init", "--preset", "worst")
    assert code == 2 and "preset: expected one of fast, paper, best" in one_line(stderr)
    code, _, stderr = cli("recipe", "nonsense")
    assert code == 2 and "nonsense" in one_line(stderr)


def test_help_is_fast_and_imports_no_torch():
    code = """
import sys
sys.argv = ["cospadi", "--help"]
from cospadi.cli import app
from cospadi.cli.common import megabytes
from cospadi.cli.live import Eta
try:
    app.main()
except SystemExit:
    pass
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - start < 10  # a second in practice; loaded machines are slow


@pytest.mark.parametrize(
    ("option", "ratio"), [(("--ratio", 0.5), 0.5), (("--set", "ratio=0.5"), 0.5), ((), 0.75)]
)
def test_a_budget_on_the_command_line_replaces_the_files(
    option, ratio, cli, tiny_model_dir, tmp_path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bits: 4\ncoeffs_dtype: bfloat16\ndictionary: identity\n")
    code, stdout, _ = cli(
        "plan", tiny_model_dir("llama"), "--recipe", recipe, *option, "--json", "-"
    )
    assert code == 0
    assert json.loads(stdout)["ratio"]["stored"] == pytest.approx(ratio, abs=0.02)


@pytest.mark.parametrize("file", [None, "written.yaml", "by_hand.yaml"])
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--ratio", 0.25, "--bits", 4), "ratio and bits"),
        (("--bits", 4, "--target-size", "12.9MB"), "bits and target_size"),
        (("--ratio", 0.25, "--set", "bits=4"), "ratio and bits"),
    ],
)
def test_two_budgets_are_refused_with_and_without_a_file(
    file, options, named, cli, tiny_model_dir, tmp_path
):
    (tmp_path / "by_hand.yaml").write_text("ratio: 0.3\n")
    (tmp_path / "written.yaml").write_text(recipe_from_mapping({"ratio": 0.3}).to_yaml())
    recipe = () if file is None else ("--recipe", tmp_path / file)
    for command in (("plan",), ("compress", "--out", tmp_path / "out")):
        code, stdout, stderr = cli(*command, tiny_model_dir("llama"), *recipe, *options)
        assert code == 2 and stdout == ""
        expected = f"error: settings: give one of ratio, bits and target_size, got {named}"
        assert one_line(stderr) == expected
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [("--bits", 4), ("--target-size", "200kB")])
def test_a_dictionary_that_a_budget_rules_out_is_refused(budget, cli, tiny_model_dir, tmp_path):
    plan = ("plan", tiny_model_dir("llama"), *budget)
    for kind in ("augmented", "learned", "auto"):
        code, stdout, stderr = cli(*plan, "--dictionary", kind)
        assert code == 2 and stdout == ""
        assert f"settings: dictionary: {kind} does not go with" in one_line(stderr)
    written = tmp_path / "recipe.yaml"
    written.write_text(recipe_from_mapping({"ratio": 0.3}).to_yaml())  # names its dictionary
    code, _, stderr = cli(*plan, "--recipe", written)
    place = 1 + written.read_text().splitlines().index("dictionary: augmented")
    assert code == 2
    assert f"{written} line {place}: dictionary: augmented does not" in one_line(stderr)
    for options in (("--recipe", written, "--dictionary", "identity"), ("--preset", "best")):
        code, stdout, stderr = cli(*plan, *options)
        assert code == 0, stderr
        assert "\n* is the way that will be taken\n" in stdout
    code, stdout, stderr = cli(
        *plan[:2], "--dictionary", "augmented", "--ratio", 0.5, "--coeffs-dtype", "int4"
    )
    assert code == 0, stderr  # what the error advises


def test_plan_takes_the_settings_of_compress(cli, tiny_model_dir, tmp_path):
    source, plan = str(tiny_model_dir("llama")), tmp_path / "plan.json"
    options = ["--ratio", "0.4", "--dictionary", "learned", "--group-size", "2", "--seed", "0"]
    code, _, errors = cli("plan", source, *options, "--calibration", "builtin", "--json", str(plan))
    assert code == 0, errors
    modules = json.loads(plan.read_text())["modules"]
    assert all(module["n_identity"] == 0 for module in modules)
    assert any(module["leader"] != module["name"] for module in modules)
    code, _, errors = cli("plan", source, "--ratio", "0")
    assert code == 2
    assert "ratio" in errors


def test_atoms_are_shown_with_the_inputs_among_them(cli, tiny_model_dir, tmp_path):
    out = str(tmp_path / "out")
    code, said, errors = cli(
        "compress", str(tiny_model_dir("llama")), "--out", out, "--ratio", "0.3",
        "--samples", "4", "--sequence-length", "64",
    )  # fmt: skip
    assert code == 0, errors
    assert said.startswith("loading ")
    assert "cospadi (augmented dictionaries)" in said
    assert "k=64+8 " in said
    assert "k=64+8 " in cli("inspect", out)[1]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 MB"), (148_404_480, "148.4 MB"), (1_945_997_312, "1946 MB"), (5.058e10, "50580 MB")],
)
def test_sizes_are_never_in_powers_of_ten(n_bytes, text):
    assert megabytes(n_bytes) == text


def test_eval_shows_how_far_it_is_on_a_terminal(compressed, tiny_text):
    terminal, theirs = os.openpty()
    command = [sys.executable, "-m", "cospadi", "eval", compressed[0], "--text", tiny_text]
    command += ["--context", "64", "--windows", "3"]
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=theirs, check=True
    )
    said = os.read(terminal, 10_000).decode()
    os.close(theirs)
    os.close(terminal)
    assert "perplexity: 1 of 3 windows, 0:0" in said and said.endswith("\r\x1b[K")
    assert done.stdout.decode().startswith("perplexity ") and b"\x1b" not in done.stdout


def test_time_left_goes_by_the_clock():
    now = [100.0]
    eta = Eta(clock=lambda: now[0])
    eta.start(100.0)
    assert eta.text() == "-"
    eta.add({"cost": 20.0, "resumed": True})
    assert eta.text() == "-"
    # two fits of ten seconds side by side
    now[0] = 110.0
    eta.add({"cost": 10.0, "seconds": 10.0})
    eta.add({"cost": 10.0, "seconds": 10.0})
    assert eta.text() == "0:30"
    now[0] = 150.0
    eta.pause(40.0)  # a calibration pass between fits
    assert eta.text() == "0:30"
