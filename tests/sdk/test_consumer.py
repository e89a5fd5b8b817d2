"""A C++ program that knows the installed package only runs a block of a compressed Llama as Python does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import cospadi

SOURCE = Path(__file__).parents[1] / "cpp" / "consumer"
FAST = {"samples": 8, "sequence_length": 64}
SETTINGS = {
    "augmented": {"ratio": 0.3},
    "learned": {"ratio": 0.3, "iterations": 2, "coeffs_dtype": "int8"},
    "integers": {"bits": 4.0},
}


@pytest.fixture(scope="session")
def consumer(sdk, tmp_path_factory) -> Path:
    """The program, built against one installation."""
    for tool in ("cmake", "c++", "cc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    build = tmp_path_factory.mktemp("consumer")
    for command in (
        ["cmake", "-S", SOURCE, "-B", build, f"-Dcospadi_DIR={sdk.cmake_dir}"],
        ["cmake", "--build", build],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
    return build / "llama_block"


@pytest.fixture(scope="session")
def compressed(tiny_model_dir, tiny_text, tmp_path_factory):
    """Return the folder of a tiny Llama that was compressed with one of SETTINGS; made once each."""
    root = tmp_path_factory.mktemp("compressed")

    def folder(name: str) -> Path:
        out = root / name
        if not out.exists():
            source = tiny_model_dir("llama")
            cospadi.compress(source, out, calibration=str(tiny_text), **FAST, **SETTINGS[name])
        return out

    return folder


def block_tensors(folder: Path, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what goes into one block of the model and what comes out, in float32."""
    model, _ = cospadi.load(folder, dtype=torch.float32)
    seen = {}

    def keep(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen["tensors"] = (args[0][0].clone(), hidden[0].clone())

    model.model.layers[layer].register_forward_hook(keep)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model(torch.randint(0, model.config.vocab_size, (1, 37), generator=generator))
    return seen["tensors"]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("layer", [0, 1])
def test_block_matches_python(consumer, compressed, tmp_path, settings, layer):
    folder = compressed(settings)
    hidden, expected = block_tensors(folder, layer)
    assert (expected - hidden).norm() > 0.1 * hidden.norm()  # the block does something
    (tmp_path / "in").write_bytes(hidden.contiguous().numpy().tobytes())
    result = subprocess.run(
        [consumer, folder, str(layer), tmp_path / "in", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert cospadi.__version__ in result.stdout
    data = bytearray((tmp_path / "out").read_bytes())
    found = torch.frombuffer(data, dtype=torch.float32).view_as(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_errors_reach_the_program(consumer, tiny_model_dir, tmp_path):
    dense = tiny_model_dir("llama")
    result = subprocess.run(
        [consumer, dense, "0", tmp_path / "in", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "this model is not compressed" in result.stderr
