"""Models exported as ONNX graphs compute what they computed before."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_models import logits, token_ids
from onnx_sessions import library, open_session
from safetensors.torch import load_file

import cospadi
from cospadi.checkpoint.export_onnx import export_onnx
from cospadi.errors import InputError

needs = "is not installed (extra onnx)"
onnx = pytest.importorskip("onnx", reason=f"onnx {needs}")
pytest.importorskip("onnxscript", reason=f"onnxscript {needs}")
pytest.importorskip("onnxruntime", reason=f"onnxruntime {needs}")
from onnx import TensorProto  # noqa: E402

__all__ = ["library"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logits_of_an_exported_model_match(library, varied, family, tmp_path):
    """Every kind of factor: learned, augmented, shared dictionaries, integers."""
    folder = export_onnx(varied[family], tmp_path / "onnx")
    model, _ = cospadi.load(varied[family], dtype=torch.float32)
    session = open_session(folder / "model.onnx", library)
    for shape in ((1, 1), (2, 7), (3, 20)):
        ids = token_ids(*shape)
        (y,) = session.run(["logits"], {"input_ids": ids.numpy()})
        wanted = logits(model, ids).numpy()
        assert np.abs(wanted).max() > 1  # an error would show
        np.testing.assert_allclose(y, wanted, atol=1e-4)

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "CospadiLinear"]
    stored = load_file(varied[family] / "model.safetensors")
    assert len(nodes) == sum(name.endswith(".coeffs") for name in stored) == 21
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    dictionaries = {node.input[4] for node in nodes if len(node.input) > 4} - {""}
    assert len(dictionaries) == sum(name.endswith(".dictionary") for name in stored)
    assert {types[name] for name in dictionaries} == {TensorProto.BFLOAT16, TensorProto.INT8}
    # the rest is stored in the 16 bits that it came from
    embedding = [name for name in types if "embed_tokens" in name or "lm_head" in name]
    assert embedding and {types[name] for name in embedding} == {TensorProto.BFLOAT16}
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()


def test_an_export_leaves_what_is_there(varied, tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        export_onnx(varied["llama"], tmp_path)
    assert (tmp_path / "kept").read_text() == "mine"


def test_missing_packages_are_named(varied, tmp_path, monkeypatch):
    from cospadi.checkpoint import export_onnx as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(
        InputError, match=r'onnxscript not installed; pip install "onnxruntime>=.*" "onnxscript>='
    ):
        export_onnx(varied["llama"], tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_the_blocks_of_the_document_run(library, stored, tmp_path):
    document = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
    (tmp_path / "small").symlink_to(stored["qwen2"])
    (command,) = re.findall(r"```sh\n(cospadi .*?)\n```", document, re.DOTALL)
    (program,) = re.findall(r"```python\n(.*?)```", document, re.DOTALL)
    cospadi_command = str(Path(sys.executable).with_name("cospadi"))
    for words in ([cospadi_command, *command.split()[1:]], [sys.executable, "-c", program]):
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "small-onnx" / "tokenizer.json").is_file()
