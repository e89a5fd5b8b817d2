from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch
from compressed_models import FAMILIES, dense_model, logits, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
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


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_is_bit_exact(stored, tmp_path, family):
    model = load(stored[family])
    model.save_pretrained(tmp_path / "again")
    first = load_file(stored[family] / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (stored[family], tmp_path / "again")
    ]
    assert configs[0] == configs[1]
    read_checkpoint(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_sharded_save(stored, tmp_path):
    load(stored["llama"]).save_pretrained(tmp_path, max_shard_size=7000)
    assert len(read_checkpoint(tmp_path).files) > 3
    assert torch.equal(logits(load(tmp_path)), logits(load(stored["llama"])))


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


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(stored, device_map):
    pytest.importorskip("accelerate")
    model = load(stored["qwen2"], device_map=device_map, dtype=torch.float32)
    assert torch.equal(logits(model), logits(load(stored["qwen2"], dtype=torch.float32)))


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
        torch.testing.assert_close(whole.lm_head(hidden), logits(whole))
    model.save_pretrained(tmp_path)  # names without the prefix, in file and config alike
    assert "layers.0.mlp.up_proj" in read_checkpoint(tmp_path).data.modules


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize(stored, family):
    model = load(stored[family], dtype=torch.float32)
    before = logits(model)
    model.dequantize()
    assert not compressed_modules(model)
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in dense_model(family).named_parameters()
    }


def test_dense_module_matches_layer(stored):
    model = load(stored["gpt2"], dtype=torch.float32)
    x = torch.randn(3, 2, 32)
    for layer in compressed_modules(model).values():
        if layer.in_features == 32:
            torch.testing.assert_close(
                dense_module(layer, torch.float32)(x), layer(x), rtol=1e-4, atol=1e-4
            )


def test_compiles_in_one_graph(stored):
    model = load(stored["llama"], dtype=torch.float32)
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
    assert not quantizer.is_trainable
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
