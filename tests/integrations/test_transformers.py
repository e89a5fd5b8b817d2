from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from compressed_models import FAMILIES, dense_model, logits, token_ids
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.quantizers import auto

import cospadi.hf
from cospadi.checkpoint.reader import read_checkpoint
from cospadi.errors import CheckpointError, InputError
from cospadi.integrations.transformers import (
    CospadiHfConfig,
    CospadiHfQuantizer,
    dense_module,
    register,
)
from cospadi.model.layers import CospadiLinear, compressed_modules

MODULE = "model.layers.1.self_attn.k_proj"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_registration_is_idempotent():
    register()
    register()
    assert auto.AUTO_QUANTIZER_MAPPING["cospadi"] is CospadiHfQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["cospadi"] is CospadiHfConfig


def test_registration_respects_others(monkeypatch):
    class Other:
        pass

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "cospadi", Other)
    with pytest.raises(InputError, match="already has a method"):
        register()


def test_importing_cospadi_stays_light():
    code = "import sys, cospadi; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("source", ["stored", "varied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_is_bit_exact(request, tmp_path, family, source):
    folder = request.getfixturevalue(source)[family]
    model = load(folder)
    model.save_pretrained(tmp_path / "again")
    first = load_file(folder / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (folder, tmp_path / "again")
    ]
    assert configs[0] == configs[1]
    read_checkpoint(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("source", ["stored", "varied"])
def test_sharded_save(request, tmp_path, source):
    folder = request.getfixturevalue(source)["llama"]
    load(folder).save_pretrained(tmp_path, max_shard_size=7000)
    checkpoint = read_checkpoint(tmp_path)
    assert len(checkpoint.files) > 3
    assert torch.equal(logits(load(tmp_path)), logits(load(folder)))
    apart = [
        name
        for name, entry in checkpoint.data.modules.items()
        if entry.leader is not None
        and checkpoint.tensors[f"{entry.leader}.dictionary"].file
        != checkpoint.tensors[f"{name}.coeffs"].file
    ]
    assert bool(apart) == (source == "varied")  # a leader and its member in different shards
    for name in checkpoint.data.modules:
        checkpoint.factor(name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_packed_tensors_survive_other_types(varied, tmp_path, dtype):
    first = load_file(varied["llama"] / "model.safetensors")
    loaded = load(varied["llama"], dtype=dtype)
    cast = load(varied["llama"]).to(dtype)
    for model, name in ((loaded, "loaded"), (cast, "cast")):
        model.save_pretrained(tmp_path / name)
        again = load_file(tmp_path / name / "model.safetensors")
        assert again.keys() == first.keys()
        n_kept = 0
        for key, tensor in first.items():
            is_kept = not tensor.is_floating_point() or key.endswith("_scale")
            n_kept += is_kept
            assert not is_kept or torch.equal(tensor, again[key]), key
        assert n_kept > 30
        assert read_checkpoint(tmp_path / name).data.groups
        if model is loaded:  # a cast model has rotary frequencies of the new type, too
            assert torch.equal(logits(load(tmp_path / name)), logits(model))


def test_shared_dictionaries_are_one_tensor(varied):
    model = load(varied["llama"])
    data = model.hf_quantizer.data
    assert data.groups
    layers = compressed_modules(model)
    for leader, members in data.groups.items():
        for name in members:
            assert layers[name].leader is layers[leader]
            assert f"{name}.dictionary" not in model.state_dict()
    clone = copy.deepcopy(model)
    for name, layer in compressed_modules(clone).items():
        assert layer.leader in compressed_modules(clone).values(), name
    assert torch.equal(logits(clone), logits(model))


def test_changed_type_is_recorded_on_save(stored, tmp_path):
    model = load(stored["llama"], dtype=torch.float32)
    layer = model.get_submodule(MODULE)
    assert layer.dictionary.dtype == torch.float32
    assert layer.coeffs.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    spec = read_checkpoint(tmp_path).data.modules[MODULE].spec
    assert (spec.dictionary_dtype, spec.coeffs_dtype) == ("float32", "bfloat16")
    assert torch.equal(logits(load(tmp_path, dtype="auto")), logits(model))


def test_float16(stored):
    model = load(stored["llama"], dtype=torch.float16)
    reference = logits(load(stored["llama"], dtype=torch.float32))
    assert (logits(model) - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize("source", ["stored", "varied"])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(request, device_map, source):
    pytest.importorskip("accelerate")
    folder = request.getfixturevalue(source)["qwen2"]
    model = load(folder, device_map=device_map, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load(folder, dtype=torch.float32)))


def test_refuses_disk(stored, tmp_path):
    pytest.importorskip("accelerate")
    for device_map in ({"": "disk"}, {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(InputError, match="disk"):
            load(stored["llama"], device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(InputError, match="disk"):  # chosen by accelerate for want of memory
        load(stored["llama"], device_map="auto", max_memory={"cpu": 9000}, offload_folder=tmp_path)


def test_refuses_to_compress_on_the_fly(stored, tmp_path):
    dense_model("llama").save_pretrained(tmp_path)
    config = CospadiHfConfig.from_dict(
        json.loads((stored["llama"] / "config.json").read_text())["quantization_config"]
    )
    with pytest.raises(InputError, match="cospadi compress"):
        load(tmp_path, quantization_config=config)


def test_refuses_other_types(stored):
    with pytest.raises(InputError, match="float64"):
        load(stored["llama"], dtype=torch.float64)


def test_headless_model(stored, tmp_path):
    model = AutoModel.from_pretrained(stored["llama"], dtype=torch.float32)
    whole = load(stored["llama"], dtype=torch.float32)
    with torch.no_grad():
        hidden = model(token_ids()).last_hidden_state
        torch.testing.assert_close(whole.lm_head(hidden).float(), logits(whole))
    model.save_pretrained(tmp_path)  # names without the prefix, in file and config alike
    assert "layers.0.mlp.up_proj" in read_checkpoint(tmp_path).data.modules


def test_headless_model_with_shared_dictionaries(varied, tmp_path):
    model = AutoModel.from_pretrained(varied["llama"], dtype=torch.float32)
    model.save_pretrained(tmp_path)
    groups = read_checkpoint(varied["llama"]).data.groups
    assert read_checkpoint(tmp_path).data.groups == {
        leader.removeprefix("model."): [name.removeprefix("model.") for name in members]
        for leader, members in groups.items()
    }
    whole = load(varied["llama"], dtype=torch.float32)
    with torch.no_grad():
        hidden = model(token_ids()).last_hidden_state
        torch.testing.assert_close(whole.lm_head(hidden).float(), logits(whole))


@pytest.mark.parametrize("source", ["stored", "varied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize(request, family, source):
    model = load(request.getfixturevalue(source)[family], dtype=torch.float32)
    before = logits(model)
    model.dequantize()
    assert not compressed_modules(model)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    n_layers = model.config.num_hidden_layers
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in dense_model(family, n_layers=n_layers).named_parameters()
    }


def test_dense_module_matches_layer(stored):
    model = load(stored["gpt2"], dtype=torch.float32)
    x = torch.randn(3, 2, 32)
    for layer in compressed_modules(model).values():
        if layer.in_features == 32:
            torch.testing.assert_close(
                dense_module(layer, torch.float32)(x), layer(x), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("source", ["stored", "varied"])
def test_compiles_in_one_graph(request, source):
    model = load(request.getfixturevalue(source)["llama"], dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 7), (1, 5)):
            ids = token_ids(*shape)
            torch.testing.assert_close(
                compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
            )


def test_flags(stored):
    model = load(stored["llama"])
    quantizer = model.hf_quantizer
    assert quantizer.is_serializable()
    assert quantizer.is_compileable
    assert quantizer.is_trainable
    assert not any(
        p.requires_grad for layer in compressed_modules(model).values() for p in layer.parameters()
    )
    assert model.is_quantized
    assert dict(quantizer.quantization_config)["quant_method"] == "cospadi"
    assert "n_atoms" in repr(quantizer.quantization_config)


def test_unknown_keys_survive(copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"] |= {"to_dict": 1, "data": {"x": [2]}, "self": "y"}
    (copied / "config.json").write_text(json.dumps(config))
    load(copied).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["to_dict"], saved["data"], saved["self"]) == (1, {"x": [2]}, "y")


@pytest.mark.parametrize("part", ["mask", "coeffs", "dictionary", "weight"])
def test_missing_tensor_is_an_error(copied, part):
    edit_tensors(copied, lambda t: t.pop(f"{MODULE}.{part}"))
    with pytest.raises(CheckpointError, match=f"{MODULE}.{part}: missing"):
        load(copied)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama", "model.embed_tokens.weight"),
        ("qwen2", "model.layers.1.input_layernorm.weight"),
        ("gpt2", "transformer.ln_f.bias"),
        ("gpt2", "transformer.wte.weight"),
    ],
)
def test_missing_tensor_outside_the_layers_is_an_error(stored, family, name, tmp_path):
    shutil.copytree(stored[family], tmp_path / "copy")
    edit_tensors(tmp_path / "copy", lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load(tmp_path / "copy")


def test_another_architecture_may_have_a_new_part(stored):
    model = AutoModelForSequenceClassification.from_pretrained(stored["llama"], num_labels=3)
    assert model.score.weight.shape[0] == 3
    assert compressed_modules(model)


def test_missing_bias_is_an_error(stored):
    state = load_file(stored["qwen2"] / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{MODULE}.bias: missing"):
        load_state(stored["qwen2"], {k: v for k, v in state.items() if k != f"{MODULE}.bias"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({f"{MODULE}.coeffs": torch.ones(3, 3).bfloat16()}), "coeffs: expected"),
        (lambda t: t.update({f"{MODULE}.extra": torch.ones(3)}), "extra: not part of"),
        (lambda t: t[f"{MODULE}.mask"][3].fill_(0), "mask: row 3 selects 0 atoms"),
        (lambda t: t[f"{MODULE}.mask"][3, -1].bitwise_or_(64), "mask: row 3 has a padding bit"),
        (lambda t: t[f"{MODULE}.coeffs"][0].fill_(torch.inf), "coeffs: holds a value"),
        (lambda t: t[f"{MODULE}.dictionary"][0].fill_(torch.nan), "dictionary: holds a value"),
    ],
)
def test_damage_is_an_error(copied, change, words):
    edit_tensors(copied, change)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(CheckpointError, match=f"{MODULE}.{words}"):
            load(copied, **options)


def test_missing_parts_of_other_kinds(varied, tmp_path):
    checkpoint = read_checkpoint(varied["llama"])
    by_part = {}
    for name, entry in checkpoint.data.modules.items():
        for part in entry.tensors():
            by_part[part] = f"{name}.{part}"
    assert by_part.keys() == {
        "dictionary",
        "dictionary_scale",
        "mask",
        "coeffs",
        "coeffs_scale",
        "weight",
    }
    for number, name in enumerate(by_part.values()):
        folder = shutil.copytree(varied["llama"], tmp_path / str(number))
        edit_tensors(folder, lambda t, name=name: t.pop(name))
        with pytest.raises(CheckpointError, match=f"{name}: missing"):
            load(folder)


LAYERS = "model.layers"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        # an int8 dictionary, its member, int4, int5, int3 and bfloat14 coefficients
        ("0.self_attn.v_proj.dictionary", lambda t: t[2, 3].fill_(-128), "row 2 holds -128"),
        ("0.self_attn.v_proj.dictionary_scale", lambda t: t[1].fill_(-1), "holds a scale that is"),
        ("0.self_attn.v_proj.dictionary_scale", lambda t: t[1].fill_(torch.inf), "holds a value"),
        ("0.mlp.gate_proj.coeffs_scale", lambda t: t[1].zero_(), "holds a scale that is not pos"),
        ("0.mlp.up_proj.coeffs", lambda t: t[5, 1].fill_(0x81), "row 5 holds -8"),
        ("0.mlp.up_proj.coeffs", lambda t: t[5, -1].fill_(0x11), "row 5 has a padding bit set"),
        ("1.self_attn.o_proj.coeffs", lambda t: t[3, -1].bitwise_or_(0x80), "row 3 has a padding"),
        ("2.self_attn.q_proj.coeffs", lambda t: t[0, 0].fill_(4), "row 0 holds -4"),
        ("1.self_attn.v_proj.coeffs", lambda t: t[0, :2].fill_(0xFF), "holds a value that is not"),
        ("1.self_attn.o_proj.mask", lambda t: t[0].zero_(), "row 0 selects 0 atoms, expected 9"),
        ("2.self_attn.o_proj.coeffs", lambda t: t[0].fill_(torch.nan), "holds a value that is not"),
    ],
)
def test_damage_to_other_kinds_is_an_error(copied_varied, name, change, words):
    edit_tensors(copied_varied, lambda t: change(t[f"{LAYERS}.{name}"]))
    with pytest.raises(CheckpointError, match=f"{LAYERS}.{name}: {words}"):
        load(copied_varied)
    checkpoint = read_checkpoint(copied_varied)
    module = f"{LAYERS}.{name.rpartition('.')[0]}"
    users = [module, *checkpoint.data.groups.get(module, [])]
    for user in users if "dictionary" in name else [module]:
        with pytest.raises(CheckpointError, match=f"model.safetensors: {LAYERS}.{name}: {words}"):
            checkpoint.factor(user)


def test_members_have_no_dictionary(copied_varied):
    name = f"{LAYERS}.0.mlp.up_proj.dictionary"
    edit_tensors(copied_varied, lambda t: t.update({name: torch.ones(32, 21).bfloat16()}))
    with pytest.raises(CheckpointError, match=f"{name}: not part of the compressed module"):
        load(copied_varied)


def load_state(folder, state):
    config = LlamaForCausalLM.config_class.from_pretrained(folder)
    kind = LlamaForCausalLM
    if config.model_type != "llama":
        from transformers import Qwen2Config, Qwen2ForCausalLM

        config, kind = Qwen2Config.from_pretrained(folder), Qwen2ForCausalLM
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)


def test_state_dict_instead_of_files(stored):
    state = load_file(stored["llama"] / "model.safetensors")
    expected = logits(load(stored["llama"], dtype=torch.float32))
    assert torch.equal(logits(load_state(stored["llama"], state)), expected)
    state.pop(f"{MODULE}.coeffs")
    with pytest.raises(CheckpointError, match=f"{MODULE}.coeffs: missing from the weights"):
        load_state(stored["llama"], state)


def test_pickles_are_refused(copied):
    state = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(state, copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors files only"):
        load(copied)


def test_index_path_is_refused(copied):
    (copied / "sub").mkdir()
    (copied / "model.safetensors").rename(copied / "sub" / "a.safetensors")
    names = load_file(copied / "sub" / "a.safetensors")
    edge = {**dict.fromkeys(names, "b.safetensors"), f"{MODULE}.mask": "sub/a.safetensors"}
    save_file({"x": torch.ones(1)}, copied / "b.safetensors")
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": edge})
    )
    with pytest.raises(CheckpointError, match="leads out of"):
        load(copied)


def test_without_registration_loading_fails_loudly(stored, monkeypatch):
    """Stock transformers warns about an unknown method and goes on; the sentinel's shape stops it."""
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "cospadi")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "cospadi")
    for family in FAMILIES:
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="mismatched"):
            warnings.simplefilter("ignore")
            load(stored[family])


def test_alias_module_registers():
    assert cospadi.hf.register is register


def test_layer_without_model(stored):
    layer = load(stored["llama"], dtype=torch.float32).get_submodule(MODULE)
    again = CospadiLinear.from_factor(layer.factor())
    assert again.dictionary.data_ptr() == layer.dictionary.data_ptr()
    x = torch.randn(4, 32)
    assert torch.equal(again(x), layer(x))
    empty = CospadiLinear(layer.spec, device="meta")
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    assert empty.state_dict().keys() == layer.state_dict().keys()
