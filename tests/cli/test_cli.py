"""The command line: the contract scripts rely on, and one line per error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cospadi.cli import app
from cospadi.cli.common import megabytes

FAST = ["--samples", "8", "--sequence-length", "64", "--iterations", "1"]


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cospadi", *map(str, arguments)])
        code = 0
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def compressed(tiny_model_dir, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "small"
    command = [sys.executable, "-m", "cospadi", "compress", tiny_model_dir("llama"), "--out", out]
    command += ["--ratio", "0.3", "--calibration", tiny_text, *FAST]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return out, done.stdout


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
    assert cli("verify", copied)[0] == 0
    code, _, stderr = cli("report", tmp_path)
    assert code == 2 and "cospadi_report.json: missing" in one_line(stderr)
    code, _, stderr = cli("report", copied, "--eval", tmp_path / "none.json")
    assert code == 2 and "none.json: cannot be read" in one_line(stderr)


def one_line(stderr: str) -> str:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.fixture
def copied(compressed, tmp_path) -> Path:
    return Path(shutil.copytree(compressed[0], tmp_path / "copied"))


def test_verify_without_a_manifest_says_so(copied, cli):
    (copied / "cospadi_manifest.json").unlink()
    code, stdout, stderr = cli("verify", copied)
    assert code == 0 and one_line(stderr).startswith("note: cospadi_manifest.json is missing")
    assert "shapes, masks and values of 14 modules hold" in stdout and "hashes" not in stdout


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
    code, _, stderr = cli("recipe", "init", "--preset", "worst")
    assert code == 2 and "preset: expected one of fast, paper, best" in one_line(stderr)
    code, _, stderr = cli("recipe", "nonsense")
    assert code == 2 and "nonsense" in one_line(stderr)


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


def test_help_is_fast_and_imports_no_torch():
    code = """
import sys
sys.argv = ["cospadi", "--help"]
from cospadi.cli import app
from cospadi.cli.common import megabytes
try:
    app.main()
except SystemExit:
    pass
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - start < 10  # a second in practice; loaded machines are slow


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


def test_unwritable_json_is_refused_before_the_work(cli, tiny_model_dir, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    for command in (
        ("eval", "no such model", "--text", "no such text"),
        ("generate", "no such model", "--prompt", "The"),
    ):
        code, _, stderr = cli(*command, "--json", blocker / "result.json")
        assert code == 2 and "--json" in stderr and "cannot be written" in stderr


def test_layers_left_dense_after_a_failure_give_exit_3(cli, damaged_dir, tiny_text, tmp_path):
    weights = damaged_dir / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.input_layernorm.weight"].zero_()
    save_file(tensors, weights, metadata={"format": "pt"})
    code, _, stderr = cli(
        "compress", damaged_dir, "--out", tmp_path / "o", "--calibration", tiny_text, *FAST
    )
    assert code == 3, stderr
    assert "partial" in stderr and "self_attn.q_proj" in stderr
    assert (tmp_path / "o/config.json").exists()


def interruptible() -> None:
    # a test run in the background of a shell ignores the signal, and its children do too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_says_that_the_same_command_resumes(tiny_model_dir, tiny_text, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cospadi", "compress", tiny_model_dir("llama"), "--out", out]
    command += ["--calibration", tiny_text, "--samples", 16, "--sequence-length", 64]
    command = list(map(str, [*command, "--iterations", 3]))
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[3/"):
            os.kill(process.pid, signal.SIGINT)
            break
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert one_line(stderr) == "interrupted; what is finished is kept, the same command resumes"
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming: " in done.stdout
    assert (out / "config.json").exists()


def test_ctrl_c_elsewhere_promises_nothing(cli, monkeypatch, tmp_path):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cospadi.pipeline.verify.verify_checkpoint", interrupt)
    code, _, stderr = cli("verify", tmp_path)
    assert code == 130 and one_line(stderr) == "interrupted"


def test_kill_9_leaves_nothing_that_loads_and_resumes(tiny_model_dir, tiny_text, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cospadi", "compress", tiny_model_dir("llama"), "--out", out]
    command += [
        "--calibration",
        tiny_text,
        "--samples",
        8,
        "--sequence-length",
        64,
        "--iterations",
        3,
    ]
    command = list(map(str, command))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[3/"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert not out.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming: " in done.stdout
    assert (out / "config.json").exists()


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
