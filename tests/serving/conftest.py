from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_server import VllmServer

ROOT = Path(__file__).parents[2]

SETTINGS = {
    # learned atoms beside the inputs, masks; up_proj stays dense inside of the fused gate_up_proj
    "plain": ["--ratio", "0.3", "--target", r".*\.(q|k|v|o|gate)_proj"],
    # neighbouring blocks use one dictionary
    "shared": ["--ratio", "0.3", "--group-size", "2", "--target", r".*\.(q|k|v)_proj"],
    # every linear, coefficients are integers of 8 bits
    "int8": ["--ratio", "0.49", "--method", "rtn", "--coeffs-dtype", "int8"],
}
"""How the real model is compressed: each kind that a server has to know, in minutes."""


@pytest.fixture(scope="session")
def vllm_venv() -> Path:
    """The environment that holds the wheel and vLLM, and nothing else of ours; `make serve-test` makes it."""
    venv = os.environ.get("COSPADI_VLLM_VENV")
    if not venv:
        pytest.skip("COSPADI_VLLM_VENV names no environment with vLLM (make serve-test makes one)")
    return Path(venv)


@pytest.fixture(scope="session")
def compressed_smollm2(tmp_path_factory) -> Callable[[str], Path]:
    """Return the folder of the compressed SmolLM2 by a name of `SETTINGS`.

    With COSPADI_SERVE_DIR the folders are kept there and used again.
    """
    kept = os.environ.get("COSPADI_SERVE_DIR")
    root = Path(kept) if kept else tmp_path_factory.mktemp("smollm2")

    def folder(kind: str) -> Path:
        path = root / kind
        if not (path / "config.json").exists():
            sys.path.append(str(ROOT / "bench" / "demo"))
            from model import fetch_smollm2

            model = os.environ.get("COSPADI_TEST_MODEL") or fetch_smollm2(root)
            command = [sys.executable, "-m", "cospadi", "compress", str(model), "--out", str(path)]
            sizes = ["--samples", "4", "--sequence-length", "256"]
            done = subprocess.run(
                [*command, *sizes, *SETTINGS[kind]], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
        return path

    return folder


@pytest.fixture
def serve(vllm_venv, tmp_path) -> Callable[..., VllmServer]:
    """Return a function that starts a server of a folder, with options; servers end with the test."""
    servers: list[VllmServer] = []

    def start(folder: Path, *options: str, **more: str) -> VllmServer:
        servers.append(VllmServer(vllm_venv, folder, tmp_path / "server.log", options, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
