from __future__ import annotations

import json

import pytest
import torch
import transformers
from compressed_models import (
    FAMILIES,
    compress_randomly,
    compress_variously,
    dense_model,
    logits,
    token_ids,
    varied_factors,
    write_tiny,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import cospadi
from cospadi.checkpoint.export import export_dense
from cospadi.checkpoint.writer import write_checkpoint
from cospadi.errors import CheckpointError, CudaUnavailableError, InputError
from cospadi.model.layers import CospadiLinear, compressed_modules, describe_modules

FLOAT32_TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # two orders of summation over at most 176 terms


def edit_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_model_computes_what_was_compressed(stored, family):
    model, tokenizer = cospadi.load(stored[family], dtype=torch.float32)
    source = compress_randomly(dense_model(family))
    for parameter in source.parameters():  # as in the file; the factors are exact already
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
    torch.testing.assert_close(logits(model), logits(source), **FLOAT32_TOLERANCE)
    assert not model.training
    if family == "llama":  # for the others, transformers insists on its own kind of tokenizer
        assert tokenizer("w3 w5")["input_ids"] == [3, 5]
    layers = compressed_modules(model)
    assert len(layers) == (8 if family == "gpt2" else 14)
    assert not any(p.requires_grad for layer in layers.values() for p in layer.parameters())
    # the kernel takes coefficients as they are stored
    assert {m.coeffs.dtype for m in layers.values() if m.mask is not None} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_model_of_every_kind_computes_what_was_compressed(varied, family):
    model, _ = cospadi.load(varied[family], dtype=torch.float32)
    source = compress_variously(dense_model(family, n_layers=3))
    for parameter in source.parameters():  # as in the file; the factors are exact already
        parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
    torch.testing.assert_close(logits(model), logits(source), **FLOAT32_TOLERANCE)
    # and against dense layers that no kernel has touched
    dense = dense_model(family, n_layers=3)
    for name, factor in varied_factors(dense)[0].items():
        layer, weight = dense.get_submodule(name), factor.dense_weight()
        layer.weight.data = weight.t() if family == "gpt2" else weight
        if factor.bias is not None:
            layer.bias.data = factor.bias.float()
    for name, parameter in dense.named_parameters():
        if name not in {f"{n}.weight" for n in compressed_modules(source)}:
            parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_export_of_every_kind(varied, tmp_path, family):
    folder = export_dense(varied[family], tmp_path / "dense", torch.float32)
    dense, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert not compressed_modules(dense)
    compressed, _ = cospadi.load(varied[family], dtype=torch.float32)
    torch.testing.assert_close(logits(dense), logits(compressed), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_export_is_an_ordinary_model(stored, tmp_path, family):
    folder = export_dense(stored[family], tmp_path / "dense", torch.float32)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert load_file(folder / "model.safetensors").keys() == {
        name
        for name in dense_model(family).state_dict()
        if name != "lm_head.weight" or family == "llama"
    }
    dense, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    kinds = {type(m).__name__ for n, m in dense.named_modules() if n.endswith("proj")}
    assert kinds == {"Conv1D" if family == "gpt2" else "Linear"}
    tied = dense.lm_head.weight is dense.get_input_embeddings().weight
    assert tied == (family != "llama")
    compressed, _ = cospadi.load(stored[family], dtype=torch.float32)
    torch.testing.assert_close(logits(dense), logits(compressed), **FLOAT32_TOLERANCE)
    if family == "llama":
        assert AutoTokenizer.from_pretrained(folder)("w3")["input_ids"] == [3]


def test_bfloat16_model_is_close_to_its_export(stored, tmp_path):
    model, _ = cospadi.load(stored["qwen2"])
    assert model.dtype == torch.bfloat16
    dense = AutoModelForCausalLM.from_pretrained(export_dense(stored["qwen2"], tmp_path / "dense"))
    assert dense.dtype == torch.bfloat16
    ours, theirs = logits(model), logits(dense)
    # bfloat16 keeps 8 bits and the error grows through two layers
    assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_mixture_of_experts(tmp_path):
    """Only attention is compressed; the experts keep their names and numbers on disk."""
    folder = write_tiny(tmp_path / "moe", "mixtral")
    names = set(load_file(folder / "model.safetensors"))
    prefix = "model.layers.0."
    assert f"{prefix}self_attn.q_proj.dictionary" in names
    assert any(".experts.3." in name for name in names)
    model, _ = cospadi.load(folder, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(
        export_dense(folder, tmp_path / "dense", torch.float32)
    )
    torch.testing.assert_close(logits(dense), logits(model), **FLOAT32_TOLERANCE)
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == names


def test_export_refuses_a_taken_output(stored, tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="not empty"):
        export_dense(stored["llama"], tmp_path)


def test_generates(stored):
    model, _ = cospadi.load(stored["llama"], dtype=torch.float32)
    ids = token_ids(rows=1)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
        )
        for position in range(ids.shape[1], out.shape[1]):  # with a cache as without
            assert out[0, position] == logits(model, out[:, :position])[0, -1].argmax()


@pytest.mark.parametrize("source", ["stored", "varied"])
def test_loaded_model_can_be_written_again(request, tmp_path, source):
    folder = request.getfixturevalue(source)["gpt2"]
    model, tokenizer = cospadi.load(folder, dtype=torch.float32)
    data = describe_modules(model, dtype=torch.bfloat16)
    write_checkpoint(model, tokenizer, data, tmp_path / "again")
    assert model.hf_quantizer is not None
    first = load_file(folder / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_tokenizer(tmp_path):
    model = compress_randomly(dense_model("llama"))
    write_checkpoint(model, None, describe_modules(model, dtype=torch.bfloat16), tmp_path / "out")
    assert cospadi.load(tmp_path / "out")[1] is None


def test_broken_tokenizer(copied):
    (copied / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        cospadi.load(copied)


def test_dtype_is_limited(stored):
    with pytest.raises(InputError, match=r"dtype: .*got float64"):
        cospadi.load(stored["llama"], dtype=torch.float64)


def test_dense_tensors_must_be_complete(copied):
    edit_tensors(copied, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model.norm.weight: missing from the weights") as e:
        cospadi.load(copied)
    assert str(copied) in str(e.value)


def test_surplus_tensors_are_refused(copied):
    edit_tensors(copied, lambda t: t.update(surplus=torch.ones(3)))
    with pytest.raises(CheckpointError, match="surplus is without a place"):
        cospadi.load(copied)


def test_devices(stored, monkeypatch):
    with pytest.raises(InputError, match="no device 'tpu9x'"):
        cospadi.load(stored["llama"], device="tpu9x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CudaUnavailableError, match="no CUDA device"):
        cospadi.load(stored["llama"], device="cuda")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 in config.json exceeds"),
        ({"num_hidden_layers": 1}, "has no such module"),
        ({"num_hidden_layers": 3}, "layers.2.*: missing from the weights"),
        ({"num_hidden_layers": "two"}, "cannot build the model"),
        ({"hidden_size": 40}, "is .*gives"),
        pytest.param(
            {"vocab_size": 60},
            "cannot build the model",
            # 5.16 takes the file's shape instead of the config's
            marks=pytest.mark.skipif(
                tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23),
                reason="older transformers follow the file",
            ),
        ),
        ({"model_type": "nonsense"}, "cannot build the model"),
        ({"model_type": "gpt2"}, "has no such module"),
        ({"transformers_weights": "../other.safetensors"}, "names other weights"),
        ({"dtype": "float64"}, "dtype"),
    ],
)
def test_config_that_does_not_fit(copied, changes, words):
    edit_config(copied, **changes)
    with pytest.raises(CheckpointError if "dtype" not in changes else InputError, match=words) as e:
        cospadi.load(copied)
    assert "\n" not in str(e.value)


def test_adapter_is_refused(copied):
    (copied / "adapter_config.json").write_text('{"base_model_name_or_path": "other"}')
    with pytest.raises(CheckpointError, match="adapter_config"):
        cospadi.load(copied)


def test_wrong_layer_type(copied):
    config = json.loads((copied / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    next(iter(modules.values()))["layer_type"] = "conv1d"
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="layer_type conv1d, the model has linear"):
        cospadi.load(copied)


def test_compressed_layer_replaces_linear(stored):
    model, _ = cospadi.load(stored["llama"])
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, CospadiLinear)
    assert not isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (32, 44)
    assert "n_atoms=21, sparsity=9" in repr(layer)
