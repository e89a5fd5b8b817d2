from __future__ import annotations

import json
import shutil

import pytest
import torch
from compressed_models import (
    FAMILIES,
    compress_randomly,
    dense_model,
    varied_factors,
    write_tiny,
    write_varied,
)
from safetensors.torch import load_file, save_file

from cospadi.checkpoint.reader import INDEX_FILE, SINGLE_FILE, read_checkpoint
from cospadi.errors import CheckpointError, NotCompressedError
from cospadi.model.layers import compressed_modules

MODULE = "model.layers.0.mlp.up_proj"


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def edit_config(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_reads_the_factors_that_were_written(stored):
    for family, folder in stored.items():
        checkpoint = read_checkpoint(folder)
        layers = compressed_modules(compress_randomly(dense_model(family)))
        assert list(checkpoint.data.modules) == list(layers)
        for name, layer in layers.items():
            factor, expected = checkpoint.factor(name), layer.factor().to(torch.bfloat16)
            assert factor.spec == expected.spec == checkpoint.data.modules[name].spec
            for part in ("dictionary", "mask", "coeffs", "bias"):
                ours, theirs = getattr(factor, part), getattr(expected, part)
                assert (ours is None) == (theirs is None)
                assert ours is None or torch.equal(ours, theirs)
        assert checkpoint.file_bytes == (folder / SINGLE_FILE).stat().st_size


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_every_kind_that_was_written(varied, family):
    checkpoint = read_checkpoint(varied[family])
    factors, leaders = varied_factors(dense_model(family, n_layers=3))
    assert checkpoint.data.modules.keys() == factors.keys()
    for name, expected in factors.items():
        factor, entry = checkpoint.factor(name), checkpoint.data.modules[name]
        assert factor.spec == expected.spec == entry.spec
        assert entry.leader == leaders.get(name)
        assert factor.tensors().keys() == expected.tensors().keys()
        for part, tensor in expected.tensors().items():
            assert torch.equal(factor.tensors()[part], tensor), (name, part)


@pytest.mark.parametrize("family", FAMILIES)
def test_accounting_is_exact_to_the_byte(varied, family):
    checkpoint = read_checkpoint(varied[family])
    total = 0
    for name, entry in checkpoint.data.modules.items():
        parts = {
            part: info.nbytes
            for full_name, info in checkpoint.tensors.items()
            if full_name.rpartition(".")[0] == name and (part := full_name.rpartition(".")[2])
        }
        parts.pop("bias", None)
        assert entry.spec.stored_bytes == sum(parts.values())
        assert 8 * parts.get("mask", 0) == entry.spec.mask_bits
        assert (entry.leader is not None) <= ("dictionary" not in parts)
        total += sum(parts.values())
    assert checkpoint.data.stored_bits() == 8 * total
    dense = sum(2 * e.spec.d_in * e.spec.d_out for e in checkpoint.data.modules.values())
    assert checkpoint.data.stored_ratio() == pytest.approx(1 - total / dense)


@pytest.mark.parametrize("write", [write_tiny, write_varied])
def test_sharded_checkpoint(tmp_path, write):
    folder = write(tmp_path / "sharded", max_shard_size=6000)
    checkpoint = read_checkpoint(folder)
    assert len(checkpoint.files) > 3
    single = read_checkpoint(write(tmp_path / "single"))
    assert checkpoint.tensors.keys() == single.tensors.keys()
    for name in single.tensors:
        assert torch.equal(checkpoint.tensor(name), single.tensor(name))
    for name in single.data.modules:
        ours, theirs = checkpoint.factor(name), single.factor(name)
        assert torch.equal(ours.dense_weight(), theirs.dense_weight())


def test_value_errors_name_the_shard_of_the_leader(tmp_path):
    folder = write_varied(tmp_path / "sharded", max_shard_size=3000)
    checkpoint = read_checkpoint(folder)
    apart = {
        name: checkpoint.tensors[f"{entry.leader}.dictionary"].file
        for name, entry in checkpoint.data.modules.items()
        if entry.leader is not None and entry.spec.dictionary_dtype == "bfloat16"
    }
    name, file = next(
        (name, file)
        for name, file in apart.items()
        if file != checkpoint.tensors[f"{name}.coeffs"].file
    )
    leader = checkpoint.data.modules[name].leader
    tensors = load_file(file)
    tensors[f"{leader}.dictionary"].fill_(torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{file.name}: {leader}.dictionary: holds a value"):
        read_checkpoint(folder).factor(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, g: m["0.mlp.up_proj"].update(dictionary="x"), "'x' is no compressed module"),
        (lambda m, g: m["0.mlp.up_proj"].pop("dictionary"), "groups: contradicts the modules"),
        (lambda m, g: g.clear(), "groups: contradicts the modules"),
        (lambda m, g: m["0.mlp.up_proj"].update(n_atoms=20), "n_atoms is 20 here and 21 in"),
        (
            lambda m, g: m["2.self_attn.o_proj"].update(n_identity=0),
            "n_atoms: expected at least 1 without identity atoms",
        ),
        (
            lambda m, g: m["1.mlp.up_proj"].update(n_identity=0),
            "sparsity: 9 exceeds the 5 atoms",
        ),
        (
            lambda m, g: m["0.mlp.up_proj"].update(coeffs_group=3),
            r"0.mlp.up_proj.coeffs_scale: expected bfloat16 \[44, 3\], got bfloat16 \[44, 2\]",
        ),
        (
            lambda m, g: m["2.self_attn.q_proj"].update(coeffs_dtype="int4"),
            r"2.self_attn.q_proj.coeffs: expected uint8 \[32, 16\], got uint8 \[32, 12\]",
        ),
        (
            lambda m, g: m["0.self_attn.v_proj"].update(coeffs_dtype="int8"),
            r"0.self_attn.v_proj.coeffs: expected uint8 \[16, 9\], got uint8 \[16, 16\]",
        ),
        (
            lambda m, g: m["0.mlp.gate_proj"].update(coeffs_dtype="bfloat14", coeffs_group=0),
            r"0.mlp.gate_proj.coeffs: expected uint8 \[44, 16\]",
        ),
    ],
)
def test_config_that_contradicts_itself_or_the_tensors(copied_varied, change, words):
    def edit(config):
        data = config["quantization_config"]
        short = {name.removeprefix("model.layers."): m for name, m in data["modules"].items()}
        change(short, data["groups"])

    edit_config(copied_varied, edit)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(copied_varied)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{MODULE}.mask"), f"{MODULE}.mask: missing"),
        (lambda t: t.pop(f"{MODULE}.weight"), f"{MODULE}.weight: missing"),
        (
            lambda t: t.update({f"{MODULE}.coeffs": t[f"{MODULE}.coeffs"][:, 1:].clone()}),
            rf"{SINGLE_FILE}: {MODULE}.coeffs: expected bfloat16 \[44, 9\], got bfloat16 \[44, 8\]",
        ),
        (
            lambda t: t.update({f"{MODULE}.coeffs": t[f"{MODULE}.coeffs"].half()}),
            rf"{MODULE}.coeffs: expected bfloat16 \[44, 9\], got float16",
        ),
        (
            lambda t: t.update({f"{MODULE}.mask": t[f"{MODULE}.mask"].view(torch.int8)}),
            f"{MODULE}.mask: expected uint8",
        ),
        (lambda t: t.update({f"{MODULE}.scale": torch.ones(1)}), f"{MODULE}.scale: not part of"),
        (lambda t: t.update({f"{MODULE}.a.b": torch.ones(1)}), f"{MODULE}.a.b: not part of"),
        (lambda t: t.update({f"{MODULE}.bias": torch.ones(44)}), f"{MODULE}.bias: not part of"),
    ],
)
def test_structure_errors_name_the_tensor(copied, change, words):
    edit_tensors(copied, change)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(copied)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[f"{MODULE}.mask"][5].zero_(), f"{MODULE}.mask: row 5 selects 0 atoms"),
        (lambda t: t[f"{MODULE}.mask"][5, -1].bitwise_or_(128), f"{MODULE}.mask: row 5 has"),
        (lambda t: t[f"{MODULE}.coeffs"][0].fill_(torch.nan), f"{MODULE}.coeffs: holds a value"),
    ],
)
def test_value_errors_name_file_and_tensor(copied, change, words):
    edit_tensors(copied, change)
    checkpoint = read_checkpoint(copied)
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: {words}"):
        checkpoint.factor(MODULE)


def test_unknown_names(stored):
    checkpoint = read_checkpoint(stored["llama"])
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        checkpoint.tensor("x")
    with pytest.raises(CheckpointError, match="'lm_head' is not a compressed module"):
        checkpoint.factor("lm_head")


def test_folder_errors(copied, tmp_path):
    with pytest.raises(NotCompressedError, match="no such folder"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(NotCompressedError, match=r"config.json is missing"):
        read_checkpoint(tmp_path)
    edit_config(copied, lambda c: c["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(NotCompressedError, match=r"quant_method: expected 'cospadi', got 'gptq'"):
        read_checkpoint(copied)
    edit_config(copied, lambda c: c.pop("quantization_config"))
    with pytest.raises(NotCompressedError, match="not compressed"):
        read_checkpoint(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        read_checkpoint(copied)


def test_config_errors_name_the_file(copied):
    edit_config(copied, lambda c: c["quantization_config"].update(format_version=7))
    with pytest.raises(CheckpointError, match=r"config.json: .*newer version"):
        read_checkpoint(copied)


def test_truncated_and_missing_weights(copied):
    path = copied / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: truncated"):
        read_checkpoint(copied)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{SINGLE_FILE}: missing"):
        read_checkpoint(copied)


def write_index(folder, weight_map) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def indexed(copied):
    """A checkpoint of one shard with an index, and its weight map."""
    (copied / SINGLE_FILE).rename(copied / "shard.safetensors")
    names = load_file(copied / "shard.safetensors")
    weight_map = dict.fromkeys(names, "shard.safetensors")
    write_index(copied, weight_map)
    read_checkpoint(copied)
    return copied, weight_map


@pytest.mark.parametrize(
    "file",
    [
        "../shard.safetensors",
        "/etc/passwd",
        "sub/shard.safetensors",
        "..",
        "",
        ".hidden.safetensors",
        "shard.bin",
        "a\\b.safetensors",
        "a\0.safetensors",
        3,
        None,
    ],
)
def test_index_cannot_lead_elsewhere(indexed, file):
    folder, weight_map = indexed
    write_index(folder, {**weight_map, f"{MODULE}.mask": file})
    with pytest.raises(CheckpointError, match="not a plain safetensors file name"):
        read_checkpoint(folder)


def test_index_must_agree_with_the_shards(indexed):
    folder, weight_map = indexed
    write_index(folder, {k: v for k, v in weight_map.items() if k != f"{MODULE}.mask"})
    with pytest.raises(CheckpointError, match=f"{MODULE}.mask: the index places it in None"):
        read_checkpoint(folder)
    write_index(folder, {**weight_map, "ghost": "shard.safetensors"})
    with pytest.raises(CheckpointError, match="ghost: missing, the index names it"):
        read_checkpoint(folder)
    write_index(folder, {**weight_map, "ghost": "other.safetensors"})
    with pytest.raises(CheckpointError, match=r"other.safetensors: missing"):
        read_checkpoint(folder)
    shutil.copy(folder / "shard.safetensors", folder / "twin.safetensors")
    write_index(folder, {**weight_map, "ghost": "twin.safetensors"})
    with pytest.raises(CheckpointError, match=r"twin.safetensors: .*the index places it in"):
        read_checkpoint(folder)
    for weird in ({}, [], None):
        write_index(folder, weird)
        with pytest.raises(CheckpointError, match="weight_map"):
            read_checkpoint(folder)


def test_both_layouts_are_ambiguous(indexed):
    folder, _ = indexed
    shutil.copy(folder / "shard.safetensors", folder / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="ambiguous"):
        read_checkpoint(folder)


def test_links_stay_inside(copied, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (copied / SINGLE_FILE).rename(outside)
    (copied / SINGLE_FILE).symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint folder"):
        read_checkpoint(copied)
    (copied / SINGLE_FILE).unlink()
    outside.rename(copied / "real.bin")
    (copied / SINGLE_FILE).symlink_to("real.bin")
    read_checkpoint(copied)
    (copied / SINGLE_FILE).unlink()
    (copied / SINGLE_FILE).symlink_to(SINGLE_FILE)
    with pytest.raises(CheckpointError):
        read_checkpoint(copied)


def test_hub_cache_layout(stored, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(stored["llama"].iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert read_checkpoint(snapshot).factor(MODULE).spec.n_atoms == 21
