"""LoRA beside compressed layers."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from compressed_models import logits, token_ids
from transformers import AutoModelForCausalLM

import cospadi.hf  # noqa: F401 (registers the method)
from cospadi.errors import InputError
from cospadi.model.layers import CospadiLinear, compressed_modules

peft = pytest.importorskip("peft")

from cospadi.integrations.peft import (  # noqa: E402 (needs peft)
    LoraCospadiLinear,
    load_adapter,
    lora_config,
    trainable_parameters,
)

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(params=["stored", "varied"])
def model(request):
    """A Llama with plain factors, and one with every kind: packed, shared, identity atoms, int8 dictionaries."""
    folder = request.getfixturevalue(request.param)["llama"]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def adapted(model, **settings):
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", "Unsupported layer type"
        )  # PEFT warns of layer types that it does not know
        return peft.get_peft_model(model, lora_config(r=4, target_modules=TARGETS, **settings))


def test_adapters_start_without_effect(model):
    before = logits(model)
    lora = adapted(model)
    layers = [m for m in lora.modules() if isinstance(m, LoraCospadiLinear)]
    assert len(layers) == len(TARGETS) * model.config.num_hidden_layers
    assert all(isinstance(layer.get_base_layer(), CospadiLinear) for layer in layers)
    assert torch.equal(logits(lora), before)


def test_training_changes_adapters_alone(model):
    factors = {
        name: copy.deepcopy(layer.factor().tensors())
        for name, layer in compressed_modules(model).items()
    }
    lora = adapted(model)
    parameters = trainable_parameters(lora)
    names = [name for name, p in lora.named_parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(TARGETS) * model.config.num_hidden_layers
    assert all("lora_" in name for name in names)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids = token_ids(4, 12)
    losses = []
    for _ in range(12):
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for (name, tensors), layer in zip(
        factors.items(), compressed_modules(model).values(), strict=True
    ):
        for part, tensor in layer.factor().tensors().items():
            assert torch.equal(tensor, tensors[part]), (name, part)


def test_gradient_is_that_of_the_dense_model(model):
    """Every adapter gets the gradient that it would get on the layers multiplied out."""
    dense = copy.deepcopy(model)
    dense = dense.dequantize(torch.float32)
    ids = token_ids(2, 9)
    gradients = []
    for base in (model, dense):
        torch.manual_seed(0)
        lora = adapted(base, init_lora_weights=False)
        lora(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in lora.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        error = (gradient - gradients[1][name]).norm() / gradients[1][name].norm()
        assert error < 1e-3, name


def test_saved_adapter_comes_back(model, tmp_path):
    base = copy.deepcopy(model)
    torch.manual_seed(0)
    lora = adapted(model, init_lora_weights=False)
    expected = logits(lora)
    lora.save_pretrained(tmp_path)
    again = load_adapter(base, tmp_path)
    assert not torch.equal(logits(again), logits(lora.disable_adapter_layers() or lora.base_model))
    assert torch.equal(logits(again), expected)
    assert not trainable_parameters(again)


def test_merging_is_refused(model):
    with pytest.raises(InputError, match="cospadi export --dense"):
        adapted(model).merge_and_unload()


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_settings_that_need_the_weight(model, settings):
    with pytest.raises(InputError, match=f"LoraConfig.{next(iter(settings))}"):
        adapted(model, **settings)


def test_without_peft_the_error_says_what_to_install():
    program = "import sys; sys.modules['peft'] = None; import cospadi.integrations.peft"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'needs PEFT: pip install "peft>=0.21"' in done.stderr.splitlines()[-1]
