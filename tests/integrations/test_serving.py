"""The core of the vLLM and SGLang adapters, on simulated engines and ranks."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import Engine, EngineLayer
from transformers import AutoModelForCausalLM

import cospadi.hf  # noqa: F401 (registers the method)
from cospadi.checkpoint.reader import read_checkpoint
from cospadi.errors import CheckpointError, InputError
from cospadi.integrations.served_layer import ServedLinear
from cospadi.integrations.serving import ServedMethod, ServedModel
from cospadi.integrations.sharding import Parallel, column_rows, fused_rows, share_of_outputs
from cospadi.model.layers import compressed_modules


def group(size):
    return [Parallel(rank, size) for rank in range(size)]


def reference_layers(folder):
    """Return the compressed layers as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return compressed_modules(model)


def close(found, expected, where):
    """Compare up to the order of sums, which may depend on the number of outputs."""
    torch.testing.assert_close(
        found, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{where}: {text}"
    )


# ---- which outputs a rank holds ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d_out", "n_rows", "size", "starts"),
    [
        (12, 12, 1, [0]),
        (12, 3, 4, [0, 3, 6, 9]),
        (12, 12, 4, [0, 0, 0, 0]),  # a replicated layer
        (12, 6, 4, [0, 0, 6, 6]),  # two key heads on four ranks
        (8, 4, 8, [0, 0, 0, 0, 4, 4, 4, 4]),
    ],
)
def test_column_rows(d_out, n_rows, size, starts):
    rows = [column_rows(d_out, n_rows, parallel, "m") for parallel in group(size)]
    assert rows == [range(start, start + n_rows) for start in starts]


@pytest.mark.parametrize(("d_out", "n_rows", "size"), [(12, 5, 2), (12, 4, 2), (4, 8, 1)])
def test_column_rows_refuses(d_out, n_rows, size):
    with pytest.raises(InputError, match=f"m: {d_out} outputs cannot be divided into parts of"):
        column_rows(d_out, n_rows, Parallel(0, size), "m")


def test_fused_rows():
    # q, k and v of 8, 4 and 4 outputs in one projection of the checkpoint, on two ranks
    assert fused_rows(16, [4, 2, 2], Parallel(1, 2), "m") == [
        range(4, 8),
        range(10, 12),
        range(14, 16),
    ]
    assert fused_rows(6, [3], Parallel(1, 2), "m") == [range(3, 6)]
    with pytest.raises(InputError, match="do not make up 12"):
        fused_rows(12, [4, 2, 2], Parallel(0, 2), "m")


@pytest.mark.parametrize(("d_out", "size"), [(7, 1), (7, 3), (8, 4), (5, 5)])
def test_shares_make_up_the_outputs(d_out, size):
    shares = [share_of_outputs(d_out, parallel, "m") for parallel in group(size)]
    assert [row for share in shares for row in share] == list(range(d_out))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_ranks_than_outputs():
    with pytest.raises(InputError, match="m: 2 outputs are fewer than the 3 ranks"):
        share_of_outputs(2, Parallel(0, 3), "m")


# ---- loading and products ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("source", ["stored", "varied"])
def test_every_rank_computes_its_outputs(request, source, size):
    """Every kind of factor, fused or not: side by side, or summed, ranks give one process' outputs."""
    folder = request.getfixturevalue(source)["llama"]
    layers = reference_layers(folder)
    engines = [
        Engine.build(read_checkpoint(folder), rank=rank, size=size).load() for rank in range(size)
    ]
    torch.manual_seed(0)
    for prefix in engines[0].layers:
        parts = [engine.layers[prefix] for engine in engines]
        names = engines[0].model.projections(prefix, {})
        x = torch.randn(3, 2, layers[names[0]].in_features)
        with torch.no_grad():
            expected = [layers[name](x) for name in names]
            found = [part(x) for part in parts]
            if parts[0].is_row_parallel:
                close(torch.stack(found).sum(0), expected[0], prefix)
                continue
            # A rank's outputs are a slice of every projection, side by side.
            widths = [y.shape[-1] // size for y in expected]
            sliced = [
                torch.cat(
                    [y[..., r * w : (r + 1) * w] for y, w in zip(expected, widths, strict=True)], -1
                )
                for r in range(size)
            ]
        for rank in range(size):
            close(found[rank], sliced[rank], f"{prefix} on rank {rank}")


def test_ranks_divide_the_code(varied):
    """Tensors with a row per output are divided, dictionaries are not."""
    checkpoint = read_checkpoint(varied["llama"])
    whole = Engine.build(checkpoint).load()
    half = Engine.build(read_checkpoint(varied["llama"]), rank=1, size=2).load()
    n_checked = 0
    for prefix, layer in whole.layers.items():
        for ours, theirs in zip(
            half.layers[prefix].cospadi.parts, layer.cospadi.parts, strict=True
        ):
            for part, tensor in theirs.factor().tensors().items():
                rows = 1 if part.startswith("dictionary") else 2
                assert ours.factor().tensors()[part].shape[0] == tensor.shape[0] // rows
                n_checked += 1
    assert n_checked > 50


def test_bias_is_the_engines(stored):
    engine = Engine.build(read_checkpoint(stored["qwen2"])).load()
    layer = engine.layers["model.layers.0.self_attn.qkv_proj"]
    layers = reference_layers(stored["qwen2"])
    names = engine.model.projections("model.layers.0.self_attn.qkv_proj", {})
    with torch.no_grad():
        layer.bias.copy_(torch.cat([layers[name].bias for name in names]))
        x = torch.randn(2, 32)
        expected = torch.cat([layers[name](x) for name in names], -1)
        torch.testing.assert_close(layer(x), expected)


def test_some_projections_of_a_fused_layer_are_dense(stored):
    checkpoint = read_checkpoint(stored["llama"])
    name = "model.layers.0.self_attn.k_proj"
    for rank in range(2):
        engine = Engine.build(read_checkpoint(stored["llama"]), rank=rank, size=2, dense=[name])
        layer = engine.layers["model.layers.0.self_attn.qkv_proj"]
        weight = torch.randn(16, 32, dtype=torch.bfloat16)
        layer.load("weight", weight, "k")
        for projection, shard_id in (("q_proj", "q"), ("v_proj", "v")):
            module = f"model.layers.0.self_attn.{projection}"
            for part in checkpoint.data.modules[module].tensors():
                layer.load(part, checkpoint.tensor(f"{module}.{part}"), shard_id)
        layer.method.process_weights_after_loading(layer)
        x = torch.randn(2, 32)
        rows = weight.float()[8 * rank : 8 * rank + 8]
        torch.testing.assert_close(layer(x)[:, 16:24], x @ rows.T)


def test_fused_in_the_checkpoint(stored):
    """GPT-2's c_attn is one projection there and three partitions here."""
    checkpoint = read_checkpoint(stored["gpt2"])
    name = "transformer.h.0.attn.c_attn"
    layer_there = reference_layers(stored["gpt2"])[name]
    x = torch.randn(2, 32)
    expected = (layer_there(x) - layer_there.bias).detach()
    for rank in range(2):
        layer = EngineLayer(
            ServedMethod(ServedModel(checkpoint.data), [name]),
            32,
            [32, 32, 32],
            bias=True,
            rank=rank,
            size=2,
        )
        for part in checkpoint.data.modules[name].tensors():
            if part != "bias":
                layer.load(part, checkpoint.tensor(f"{name}.{part}"))
        layer.method.process_weights_after_loading(layer)
        wanted = [y[:, 16 * rank : 16 * rank + 16] for y in expected.split(32, dim=-1)]
        torch.testing.assert_close(layer(x), torch.cat(wanted, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_activations(stored, dtype):
    checkpoint = read_checkpoint(stored["llama"])
    name = "model.layers.0.mlp.down_proj"
    layer = EngineLayer(
        ServedMethod(ServedModel(checkpoint.data), [name]),
        44,
        [32],
        is_row_parallel=True,
        dtype=dtype,
    )
    for part in checkpoint.data.modules[name].tensors():
        layer.load(part, checkpoint.tensor(f"{name}.{part}"))
    layer.method.process_weights_after_loading(layer)
    x = torch.randn(3, 44, dtype=dtype)
    expected = reference_layers(stored["llama"])[name](x.float())
    assert layer(x).dtype == dtype
    assert (layer(x).float() - expected).norm() < 0.02 * expected.norm()


def test_empty_parameters_go(varied):
    engine = Engine.build(read_checkpoint(varied["llama"])).load()
    for layer in engine.layers.values():
        assert [name for name, _ in layer.named_parameters(recurse=False)] == ["weight"]
        assert not any(p.requires_grad for p in layer.parameters())
        assert layer.method.plan is None


# ---- shared dictionaries -------------------------------------------------------------------------


def test_members_and_leaders_share_one_tensor(varied):
    engine = Engine.build(read_checkpoint(varied["llama"])).load()
    layers = engine.model._layers
    groups = engine.checkpoint.data.groups
    assert groups
    for leader, members in groups.items():
        for name in members:
            assert layers[name].leader is layers[leader]


def test_leader_may_be_finished_after_its_member(varied):
    engine = Engine.build(read_checkpoint(varied["llama"]))
    engine.layers = dict(reversed(engine.layers.items()))
    engine.load()
    forward = Engine.build(read_checkpoint(varied["llama"])).load()
    for prefix, layer in forward.layers.items():
        x = torch.randn(2, layer.method.model.data.modules[layer.method.names[0]].spec.d_in)
        assert torch.equal(layer(x), engine.layers[prefix](x))


def share_across_layers(folder, tmp_path):
    """Make k_proj and v_proj of layer 1 members of layer 0's k_proj, and return the folder."""
    path = shutil.copytree(folder, tmp_path / "across")
    config = json.loads((path / "config.json").read_text())
    section = config["quantization_config"]
    leader = "model.layers.0.self_attn.k_proj"
    member = "model.layers.1.self_attn.k_proj"
    second = "model.layers.1.self_attn.v_proj"
    for name in (member, second):
        section["modules"][name]["dictionary"] = leader
    section["groups"] = {leader: [member, second]}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    for name in (member, second):
        del tensors[f"{name}.dictionary"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_leader_on_another_stage(stored, tmp_path):
    folder = share_across_layers(stored["llama"], tmp_path)
    whole = Engine.build(read_checkpoint(folder)).load()
    stage = Engine.build(read_checkpoint(folder), keep=lambda prefix: ".layers.1." in prefix)
    stage.model.open(folder)
    stage.load()
    prefix = "model.layers.1.self_attn.qkv_proj"
    x = torch.randn(3, 32)
    assert torch.equal(stage.layers[prefix](x), whole.layers[prefix](x))
    _, member, second = stage.layers[prefix].cospadi.parts
    assert second.leader is member  # one copy on the stage
    assert member.leader is member


def test_leader_on_another_stage_needs_the_files(stored, tmp_path):
    folder = share_across_layers(stored["llama"], tmp_path)
    stage = Engine.build(read_checkpoint(folder), keep=lambda prefix: ".layers.1." in prefix)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.self_attn\.k_proj, which is on another pipe"
    ):
        stage.load()


def test_names_of_the_engine(stored, tmp_path):
    """An engine may name modules differently; files keep their names."""
    folder = share_across_layers(stored["llama"], tmp_path)
    model = ServedModel(read_checkpoint(folder).data)
    model.open(folder)
    model.rename(lambda name: name.replace("model.", "language_model.", 1))
    model.rename(lambda name: None if name.endswith("o_proj") else name)
    name = "language_model.layers.1.self_attn.k_proj"
    assert model.data.modules[name].leader == "language_model.layers.0.self_attn.k_proj"
    assert "language_model.layers.0.self_attn.o_proj" in model.data.modules
    layer = EngineLayer(ServedMethod(model, [name]), 32, [16])
    checkpoint = read_checkpoint(folder)
    for part in model.data.modules[name].tensors():
        layer.load(part, checkpoint.tensor(f"model.layers.1.self_attn.k_proj.{part}"))
    layer.method.process_weights_after_loading(layer)
    x = torch.randn(2, 32)
    expected = reference_layers(folder)["model.layers.1.self_attn.k_proj"](x)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_hold_no_layers(varied, copy_of):
    engine = Engine.build(read_checkpoint(varied["llama"])).load()
    assert engine.model._layers
    again = copy_of(engine.model)
    assert not again._layers
    assert not again._members
    assert again.data == engine.model.data


def test_projections():
    model = ServedModel(read_data_of("model.a.qkv_proj"))
    assert model.projections("model.a.qkv_proj", {}) == ["model.a.qkv_proj"]
    assert model.projections("model.b.qkv_proj", {"qkv_proj": ["q", "k"]}) == [
        "model.b.q",
        "model.b.k",
    ]
    assert model.projections("model.b.gate_up_proj", {})[1] == "model.b.up_proj"
    assert model.projections("lm_head", {}) == ["lm_head"]
    assert model.is_compressed("model.a.qkv_proj", {})
    assert not model.is_compressed("model.b.qkv_proj", {})


def read_data_of(name):
    from cospadi.checkpoint.format import CospadiConfigData, ModuleEntry
    from cospadi.factor.spec import FactorSpec

    return CospadiConfigData({name: ModuleEntry(FactorSpec(4, 4, 2, 1, "mask", False))})


# ---- what is refused -----------------------------------------------------------------------------

DOWN = "model.layers.0.mlp.down_proj"


def down_layer(folder, **changes):
    """Return a layer that has received everything but what `changes` replaces; None leaves a part out."""
    checkpoint = read_checkpoint(folder)
    layer = EngineLayer(
        ServedMethod(ServedModel(checkpoint.data), [DOWN]), 44, [32], is_row_parallel=True
    )
    for part in checkpoint.data.modules[DOWN].tensors():
        tensor = checkpoint.tensor(f"{DOWN}.{part}")
        change = changes.get(part, tensor)
        if change is not None:
            layer.load(part, change(tensor) if callable(change) else change)
    return layer


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("mask", lambda t: t[:5], "mask: expected uint8"),
        ("coeffs", lambda t: t.int(), "coeffs: expected bfloat16"),
        ("dictionary", lambda t: t.T.contiguous(), "dictionary: expected bfloat16"),
        ("weight", torch.zeros(32, 44), r"weight: expected .* \[0\], got float32 \[32, 44\]"),
    ],
)
def test_wrong_tensors_are_refused_as_they_come(stored, part, change, words):
    with pytest.raises(CheckpointError, match=f"{DOWN}.{words}"):
        down_layer(stored["llama"], **{part: change})


def broken(tensor, value):
    tensor = tensor.clone()
    tensor[0] = value
    return tensor


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("mask", lambda t: broken(t, 0xFF), r"mask: row 0 "),
        ("coeffs", lambda t: broken(t, torch.nan), "coeffs: holds a value that is not finite"),
        ("dictionary", lambda t: broken(t, torch.inf), "dictionary: holds a value"),
        ("mask", None, "mask: missing from the weights, refusing random values"),
        ("weight", None, "weight: missing from the weights"),
    ],
)
def test_wrong_values_are_refused_before_the_first_product(stored, part, change, words):
    layer = down_layer(stored["llama"], **{part: change})
    with pytest.raises(CheckpointError, match=f"{DOWN}.{words}"):
        layer.method.process_weights_after_loading(layer)


def test_dense_weight_must_be_whole(stored):
    name = "model.layers.0.self_attn.k_proj"
    engine = Engine.build(read_checkpoint(stored["llama"]), dense=[name])
    layer = engine.layers["model.layers.0.self_attn.qkv_proj"]
    for wrong in (torch.zeros(0), torch.zeros(16, 31)):
        with pytest.raises(
            CheckpointError, match=f"{name}.weight: .* is not the weight of a dense"
        ):
            layer.load("weight", wrong, "k")
    with pytest.raises(CheckpointError, match=f"{name}.mask: uint8"):
        layer.load("mask", torch.zeros(16, 3, dtype=torch.uint8), "k")


def test_order_and_number_of_tensors(stored):
    checkpoint = read_checkpoint(stored["llama"])
    engine = Engine.build(checkpoint)
    layer = engine.layers["model.layers.0.self_attn.qkv_proj"]
    mask = checkpoint.tensor("model.layers.0.self_attn.q_proj.mask")
    layer.load("mask", mask, "q")
    with pytest.raises(CheckpointError, match=r"q_proj.mask: there are two tensors"):
        layer.load("mask", mask, "q")
    for shard_id in (None, 3, "index"):
        with pytest.raises(InputError, match=r"is none of model\.layers\.0\.self_attn\.q_proj"):
            layer.load("mask", mask, shard_id)


def test_unknown_part(varied):
    """A pruned projection beside one with a dictionary: the layer has a place for it, the member not."""
    checkpoint = read_checkpoint(varied["llama"])
    engine = Engine.build(checkpoint)
    for layer in engine.layers.values():
        if hasattr(layer, "dictionary") and len(layer.method.names) > 1:
            for index, name in enumerate(layer.method.names):
                if "dictionary" not in checkpoint.data.modules[name].tensors():
                    with pytest.raises(CheckpointError, match=f"{name}.dictionary: not part of"):
                        layer.load("dictionary", torch.zeros(2, 2), index)
                    return
    raise AssertionError("no such layer")


@pytest.mark.parametrize(("d_in", "d_out"), [(43, 32), (44, 31)])
def test_other_sizes_than_the_model(stored, d_in, d_out):
    checkpoint = read_checkpoint(stored["llama"])
    method = ServedMethod(ServedModel(checkpoint.data), [DOWN])
    with pytest.raises((CheckpointError, InputError), match=f"{DOWN}: "):
        EngineLayer(method, d_in, [d_out], is_row_parallel=d_in != 44)


def test_bias_must_agree(stored):
    checkpoint = read_checkpoint(stored["llama"])
    layer = down_layer(stored["llama"])
    layer.bias = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(CheckpointError, match="says bias = False, the model has one"):
        layer.method.process_weights_after_loading(layer)
    entry = checkpoint.data.modules[DOWN]
    with_bias = replace(entry, spec=replace(entry.spec, bias=True))
    checkpoint.data.modules[DOWN] = with_bias
    layer = EngineLayer(
        ServedMethod(ServedModel(checkpoint.data), [DOWN]),
        44,
        [32],
        is_row_parallel=True,
        bias=True,
    )
    with torch.no_grad():
        layer.bias[3] = torch.nan
    with pytest.raises(CheckpointError, match=f"{DOWN}.bias: missing, or holds"):
        layer.method.process_weights_after_loading(layer)


def test_other_types_and_counts(stored):
    data = read_checkpoint(stored["llama"]).data
    with pytest.raises(InputError, match="compute in bfloat16, float16, float32, got float64"):
        EngineLayer(ServedMethod(ServedModel(data), [DOWN]), 44, [32], dtype=torch.float64)
    with pytest.raises(InputError, match="one projection for each of the 3 partitions"):
        EngineLayer(ServedMethod(ServedModel(data), [DOWN, DOWN]), 44, [8, 8, 16])


def test_row_parallel_needs_a_gather():
    with pytest.raises(InputError, match="gather: expected a function"):
        ServedLinear([torch.nn.Linear(2, 2)], range(0, 1), 2)
