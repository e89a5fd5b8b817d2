"""The vLLM adapter inside of vLLM, where that is installed; tests/serving runs whole models."""

from __future__ import annotations

import pytest
import torch

from cospadi.checkpoint.reader import read_checkpoint
from cospadi.errors import CheckpointError, InputError

pytest.importorskip("vllm")

from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.plugins import load_general_plugins

from cospadi.integrations.vllm import CospadiLinearMethod, CospadiVllmConfig, register


class Linear(LinearBase):
    """A linear layer without vLLM's groups."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.tp_rank, self.tp_size = 0, 1


def config_of(folder) -> CospadiVllmConfig:
    config = CospadiVllmConfig.from_config(read_checkpoint(folder).config["quantization_config"])
    config.maybe_update_config(str(folder))
    return config


def test_plugin_registers_the_method():
    load_general_plugins()
    register()
    register()
    assert get_quantization_config("cospadi") is CospadiVllmConfig


def test_methods(stored):
    config = config_of(stored["llama"])
    method = config.get_quant_method(Linear(), "model.layers.0.self_attn.qkv_proj")
    assert isinstance(method, CospadiLinearMethod)
    assert method.names == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert isinstance(config.get_quant_method(Linear(), "model.other"), UnquantizedLinearMethod)
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None
    with pytest.raises(InputError, match=r"o_proj: compressed, but a Embedding in vLLM"):
        config.get_quant_method(torch.nn.Embedding(2, 2), "model.layers.0.self_attn.o_proj")


def test_a_layer(stored):
    checkpoint, name = read_checkpoint(stored["llama"]), "model.layers.0.mlp.down_proj"
    layer = Linear()
    method = config_of(stored["llama"]).get_quant_method(layer, name)
    method.create_weights(layer, 44, [32], 44, 32, torch.float32, weight_loader=None)
    for part in checkpoint.data.modules[name].tensors():
        parameter = layer.get_parameter(part)
        parameter.weight_loader(parameter, checkpoint.tensor(f"{name}.{part}"))
    method.process_weights_after_loading(layer)
    x = torch.randn(3, 44)
    weight = checkpoint.factor(name).dense_weight()
    torch.testing.assert_close(method.apply(layer, x), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_damaged_headers_are_refused_before_loading(copied):
    from safetensors.torch import load_file, save_file

    config = CospadiVllmConfig.from_config(read_checkpoint(copied).config["quantization_config"])
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.mask"]
    save_file(tensors, copied / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj.mask: missing"):
        config.maybe_update_config(str(copied))
