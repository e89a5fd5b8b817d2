"""``cospadi bench``: faster and slower said alike, JSON, refusals."""

from __future__ import annotations

import json
import sys

import pytest

from cospadi import compress
from cospadi.cli import app

QUICK = ["--repeats", "1", "--threads", "1", "--memory-mb", "0"]


@pytest.fixture
def cli(capsys, monkeypatch):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cospadi", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_linears(cli, tmp_path):
    file = tmp_path / "speed.json"
    code, out, _ = cli(
        "--shapes", "64x96,64x96", "--rows", "1,20", "--ratios", "0.4", "--json", file, *QUICK
    )
    assert code == 0
    assert out.count("64 x 96, 40% of bytes removed") == 2  # a shape named twice is measured once
    assert out.count("faster") + out.count("SLOWER than dense") == 4
    data = json.loads(file.read_text())
    assert data["peaks"]["read_bytes_per_s"] > 0
    assert [one["variant"] for one in data["linears"]][:2] == ["bfloat16", "int8"]
    assert {one["rows"] for one in data["linears"]} == {1, 20}


def test_model(cli, tiny_model_dir, tmp_path):
    compress(tiny_model_dir("llama"), tmp_path / "small", method="svd", ratio=0.4)
    code, out, _ = cli(tmp_path / "small", "--prompt-tokens", "4", "--new-tokens", "2", *QUICK)
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["compressed", "dense"]
    assert "times as fast as dense" in lines[3]
    code, out, _ = cli(tmp_path / "small", "--prompt-tokens", "4", "--json", "-", *QUICK)
    assert code == 0
    assert [one["variant"] for one in json.loads(out)["models"]] == ["compressed", "dense"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "64"], "expected sizes like 2048x8192 or one of smollm2-135m"),
        (["--shapes", "0x3"], "expected sizes like"),
        (["--rows", "0"], "--rows: expected at least 1"),
        (["--coeffs", "int7"], "--coeffs: expected bfloat16, bfloat14"),
        (["--ratios", "1.5"], "ratio: expected a removed share"),
        (["--threads", "0"], "--threads and --repeats: expected at least 1"),
        (["--json", "/nowhere/x.json"], "cannot be written"),
    ],
)
def test_refusals(cli, arguments, message):
    code, _, err = cli("--shapes", "64x96", "--memory-mb", "0", "--repeats", "1", *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
