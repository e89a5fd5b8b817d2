"""Runs that are interrupted, killed, or finish in part."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from cli_commands import FAST, one_line
from safetensors.torch import load_file, save_file


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
