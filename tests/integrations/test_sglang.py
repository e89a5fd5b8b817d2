"""The SGLang adapter's own lines, with stand-ins for the few names that it takes from SGLang; not SGLang itself."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
from torch import nn

from cospadi.checkpoint.reader import read_checkpoint
from cospadi.errors import InputError


class Group:
    """Two ranks, of which this is the second."""

    rank_in_group, world_size = 1, 2

    def all_gather(self, x, dim):
        """Put the slices of both ranks side by side; here they are equal."""
        return torch.cat([x, x], dim)


@pytest.fixture
def sglang(monkeypatch):
    """Return the adapter, imported beside stand-ins."""

    class LinearBase(nn.Module):
        tp_group = None

    class QuantizationConfig:
        def __init__(self):
            self.packed_modules_mapping = {}

    choices: list[str] = []
    names = {
        "sglang.srt.arg_groups.choices": {"add_quantization_method_choices": choices.extend},
        "sglang.srt.distributed.utils": {
            "get_group_rank_size": lambda group: (
                (0, 1) if group is None else (group.rank_in_group, group.world_size)
            )
        },
        "sglang.srt.layers.linear": {"LinearBase": LinearBase},
        "sglang.srt.layers.quantization": {
            "QUANTIZATION_METHODS": {},
            "CPU_QUANTIZATION_METHODS": {},
        },
        "sglang.srt.layers.quantization.base_config": {
            "LinearMethodBase": type("LinearMethodBase", (), {}),
            "QuantizationConfig": QuantizationConfig,
        },
        "sglang.srt.layers.quantization.unquant": {
            "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {})
        },
    }
    for name, contents in names.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            package = ".".join(parts[:i])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        vars(sys.modules[name]).update(contents)
    sys.modules["sglang.srt.layers"].quantization = sys.modules["sglang.srt.layers.quantization"]
    monkeypatch.delitem(sys.modules, "cospadi.integrations.sglang", raising=False)
    adapter = importlib.import_module("cospadi.integrations.sglang")
    adapter.choices = choices
    yield adapter
    sys.modules.pop("cospadi.integrations.sglang", None)


def config_of(sglang, folder, **more):
    section = read_checkpoint(folder).config["quantization_config"]
    return sglang.CospadiSglangConfig.from_config({**section, **more})


def test_registration_is_idempotent(sglang):
    sglang.register()
    sglang.register()
    table = sys.modules["sglang.srt.layers.quantization"]
    assert table.QUANTIZATION_METHODS["cospadi"] is sglang.CospadiSglangConfig
    assert table.CPU_QUANTIZATION_METHODS == table.QUANTIZATION_METHODS
    assert sglang.choices == ["cospadi"]


def test_config(sglang, stored):
    hf_config = types.SimpleNamespace(name_or_path=str(stored["llama"]))
    mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    config = config_of(sglang, stored["llama"], packed_modules_mapping=mapping, hf_config=hf_config)
    assert config.packed_modules_mapping == mapping
    assert config.get_name() == "cospadi"
    assert torch.float32 in config.get_supported_act_dtypes()
    assert config.model.data == read_checkpoint(stored["llama"]).data


def test_methods(sglang, stored):
    config = config_of(sglang, stored["llama"])
    linear = sys.modules["sglang.srt.layers.linear"].LinearBase()
    method = config.get_quant_method(linear, "model.layers.0.self_attn.qkv_proj")
    assert method.names == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    dense = config.get_quant_method(linear, "model.layers.0.block_sparse_moe.gate")
    assert type(dense).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None
    with pytest.raises(InputError, match=r"o_proj: compressed, but a Embedding in SGLang"):
        config.get_quant_method(nn.Embedding(2, 2), "model.layers.0.self_attn.o_proj")


def test_groups(sglang, stored):
    config = config_of(sglang, stored["llama"])
    linear = sys.modules["sglang.srt.layers.linear"].LinearBase()
    method = config.get_quant_method(linear, "model.layers.0.mlp.down_proj")
    assert method.parallel(linear).size == 1
    linear.tp_group = Group()
    group = method.parallel(linear)
    assert (group.rank, group.size) == (1, 2)
    assert group.gather(torch.ones(2, 3)).shape == (2, 6)


def test_a_layer(sglang, stored):
    checkpoint = read_checkpoint(stored["llama"])
    config = config_of(sglang, stored["llama"])
    name = "model.layers.0.mlp.down_proj"
    layer = sys.modules["sglang.srt.layers.linear"].LinearBase()
    method = config.get_quant_method(layer, name)
    method.create_weights(layer, 44, [32], 44, 32, torch.float32, weight_loader=None)
    for part in checkpoint.data.modules[name].tensors():
        parameter = dict(layer.named_parameters())[part]
        parameter.weight_loader(parameter, checkpoint.tensor(f"{name}.{part}"))
    method.process_weights_after_loading(layer)
    x = torch.randn(3, 44)
    weight = checkpoint.factor(name).dense_weight()
    torch.testing.assert_close(method.apply(layer, x), x @ weight.T, rtol=1e-4, atol=1e-4)
