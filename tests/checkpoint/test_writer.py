from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from compressed_models import (
    compress_randomly,
    compress_variously,
    dense_model,
    logits,
    tiny_tokenizer,
    varied_factors,
    write_tiny,
)
from safetensors.torch import load_file

from cospadi.checkpoint import atomic
from cospadi.checkpoint.format import CospadiConfigData
from cospadi.checkpoint.manifest import MANIFEST_FILE, has_manifest, verify_manifest
from cospadi.checkpoint.reader import read_checkpoint
from cospadi.checkpoint.writer import write_checkpoint
from cospadi.errors import CheckpointError, InputError
from cospadi.model.layers import compressed_modules, describe_modules

FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model():
    return compress_randomly(dense_model("llama"))


def describe(model, dtype=torch.bfloat16) -> CospadiConfigData:
    return describe_modules(model, dtype=dtype)


def test_files_of_a_checkpoint(stored):
    names = {path.name for path in stored["llama"].iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        MANIFEST_FILE,
    }
    config = json.loads((stored["llama"] / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "cospadi"


def test_everything_is_stored_in_the_asked_types(tmp_path, model):
    data = describe(model)
    entry = data.modules[FIRST]
    data.modules[FIRST] = replace(entry, spec=replace(entry.spec, coeffs_dtype="float32"))
    folder = write_checkpoint(model, None, data, tmp_path / "out", dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert tensors[f"{FIRST}.coeffs"].dtype == torch.float32
    assert tensors[f"{FIRST}.dictionary"].dtype == torch.bfloat16
    assert tensors[f"{FIRST}.weight"].shape == (0,)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_the_model_is_left_as_it_was(tmp_path, model):
    before = logits(model)
    write_checkpoint(model, None, describe(model), tmp_path / "out")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model), before)


def test_tied_weights_are_written_once(stored):
    tensors = load_file(stored["qwen2"] / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors
    assert "lm_head.weight" in load_file(stored["llama"] / "model.safetensors")


def test_same_model_gives_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_tiny(tmp_path / name)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_refuses_a_taken_output(tmp_path, model):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    for target, words in ((taken, "is not empty"), (file, "not a folder"), (link, "not a folder")):
        with pytest.raises(InputError, match=words):
            write_checkpoint(model, None, describe(model), target)
    assert (taken / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "file", "link"}


def test_takes_an_empty_folder_and_makes_parents(tmp_path, model):
    (tmp_path / "empty").mkdir()
    write_checkpoint(model, None, describe(model), tmp_path / "empty")
    read_checkpoint(tmp_path / "empty")
    write_checkpoint(model, None, describe(model), tmp_path / "new" / "deep")
    read_checkpoint(tmp_path / "new" / "deep")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["deep"]


def test_unwritable_output(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be"):
        write_checkpoint(model, None, describe(model), tmp_path / "file" / "out")


def test_full_disk_leaves_nothing(tmp_path, model, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_sync", fail)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        write_checkpoint(model, None, describe(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_failing_tokenizer_leaves_nothing(tmp_path, model):
    class Broken:
        def save_pretrained(self, folder):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        write_checkpoint(model, Broken(), describe(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_killed_writer_leaves_nothing_that_loads(tmp_path, model):
    class Deadly:
        def save_pretrained(self, folder):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        write_checkpoint(model, Deadly(), describe(model), tmp_path / "out")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name == f".out.partial-{child}"
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        read_checkpoint(left)
    # the next run is not disturbed
    write_checkpoint(model, None, describe(model), tmp_path / "out")


def test_extra_files(tmp_path, model):
    extra = {"README.md": "# card\n", "recipe.yaml": b"a: 1\n"}
    folder = write_checkpoint(model, None, describe(model), tmp_path / "out", extra)
    assert (folder / "README.md").read_text() == "# card\n"
    assert (folder / "recipe.yaml").read_bytes() == b"a: 1\n"
    for name in ("config.json", MANIFEST_FILE, "../a", "a/b", ".a", "", "x.safetensors", "a.held"):
        with pytest.raises(InputError, match="extra file"):
            write_checkpoint(model, None, describe(model), tmp_path / "other", {name: ""})
    with pytest.raises(InputError, match=r"tokenizer.json: the checkpoint has a file"):
        write_checkpoint(
            model, tiny_tokenizer(), describe(model), tmp_path / "x", {"tokenizer.json": ""}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_config_data_must_describe_the_model(tmp_path, model):
    missing = describe(model)
    entry = missing.modules.pop(FIRST)
    with pytest.raises(InputError, match=f"{FIRST}: compressed in the model only"):
        write_checkpoint(model, None, missing, tmp_path / "out")
    wrong = describe(model)
    wrong.modules[FIRST] = replace(entry, spec=replace(entry.spec, sparsity=3))
    with pytest.raises(InputError, match="sparsity is 9 in the model and 3 in config_data"):
        write_checkpoint(model, None, wrong, tmp_path / "out")
    wrong.modules[FIRST] = replace(entry, layer_type="conv1d")
    with pytest.raises(InputError, match="layer_type"):
        write_checkpoint(model, None, wrong, tmp_path / "out")
    with pytest.raises(InputError, match="no compressed layer"):
        describe_modules(dense_model("llama"))


def test_config_data_must_describe_every_kind(tmp_path):
    model = compress_variously(dense_model("llama", n_layers=3))
    member, leader = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"

    def refused(words: str, kind=InputError, spec: dict | None = None, **changes):
        data = describe(model)
        entry = data.modules[member]
        entry = replace(entry, spec=replace(entry.spec, **(spec or {})), **changes)
        data.modules[member] = entry
        with pytest.raises(kind, match=words):
            write_checkpoint(model, None, data, tmp_path / "out")

    refused("coeffs_dtype is int4 in the model and int5 in", spec={"coeffs_dtype": "int5"})
    refused("floating point in config_data", spec={"coeffs_dtype": "bfloat16", "coeffs_group": 0})
    refused("coeffs_group is 4 in the model and 8 in config_data", spec={"coeffs_group": 8})
    other = "model.layers.0.mlp.down_proj"
    refused("d_in is 32 here and 44 in", CheckpointError, leader=other)
    refused(f"{member}.dictionary: 'x' is no compressed module", CheckpointError, leader="x")
    refused(
        f"dictionary_dtype is float16 here and bfloat16 in {leader}",
        CheckpointError,
        spec={"dictionary_dtype": "float16"},
    )
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(model, None, describe(model), tmp_path / "out")


def test_the_types_asked_for_hold_for_floats_only(tmp_path):
    model = compress_variously(dense_model("llama", n_layers=3))
    data = describe(model, torch.float16)
    folder = write_checkpoint(model, None, data, tmp_path / "out", dtype=torch.float16)
    checkpoint = read_checkpoint(folder)
    factors, _ = varied_factors(dense_model("llama", n_layers=3))
    for name, factor in factors.items():
        expected = factor.to(torch.float16)
        for part, tensor in expected.tensors().items():
            assert torch.equal(checkpoint.factor(name).tensors()[part], tensor), (name, part)


def test_refuses_values_that_are_not_finite(tmp_path, model):
    layer = compressed_modules(model)[FIRST]
    layer.coeffs.data[0, 0] = 1e6  # finite in float32 and bfloat16, infinite in float16
    with pytest.raises(CheckpointError, match=f"{FIRST}.coeffs: holds a value"):
        write_checkpoint(model, None, describe(model, torch.float16), tmp_path / "out")
    layer.mask[0, 0] ^= 1
    with pytest.raises(CheckpointError, match=f"{FIRST}.mask: row 0 selects"):
        write_checkpoint(model, None, describe(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_manifest_finds_every_change(copied):
    report = verify_manifest(copied)
    assert report.problems == ()
    assert report.unlisted == ()
    assert report.n_files == len(list(copied.iterdir())) - 1
    (copied / "notes.txt").write_text("")
    assert verify_manifest(copied).unlisted == ("notes.txt",)
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (problem,) = verify_manifest(copied).problems
    assert "model.safetensors: its SHA-256 differs" in problem
    weights.write_bytes(data + b"\0")
    assert "bytes, got" in verify_manifest(copied).problems[0]
    weights.unlink()
    assert "model.safetensors: missing" in verify_manifest(copied).problems[0]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        '{"manifest_version": 2, "files": {}}',
        '{"manifest_version": 1, "files": []}',
        '{"manifest_version": 1, "files": {"../x": {}}}',
        '{"manifest_version": 1, "files": {"/etc/passwd": {}}}',
        '{"manifest_version": 1, "files": {"a\\nb": {}}}',
        '{"manifest_version": 1, "files": {"config.json": 3}}',
    ],
)
def test_malformed_manifest(copied, content):
    (copied / MANIFEST_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=MANIFEST_FILE):
        verify_manifest(copied)


def test_missing_manifest(copied):
    assert has_manifest(copied)
    (copied / MANIFEST_FILE).unlink()
    assert not has_manifest(copied)
    with pytest.raises(CheckpointError, match=f"{MANIFEST_FILE}: missing"):
        verify_manifest(copied)
    (copied / MANIFEST_FILE).symlink_to("nowhere")
    assert has_manifest(copied)
