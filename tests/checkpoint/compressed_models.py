"""Tiny random models of three families with random factors in place of their projections."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging

from cospadi.checkpoint.writer import write_checkpoint
from cospadi.factor import SparseFactor
from cospadi.model.layers import CospadiLinear, describe_modules, replace_modules

logging.disable_progress_bar()

VOCABULARY = 61
FAMILIES = ("llama", "qwen2", "gpt2")


def dense_model(family: str, seed: int = 0):
    """Return an untrained float32 model: Llama with GQA, Qwen2 with biases and tied head, GPT-2 with Conv1D."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    decoder = {
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        # large weights: logits of an untrained model would else hide wrong projections
        "initializer_range": 0.2,
    }
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes, **decoder))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, **decoder, tie_word_embeddings=True))
    elif family == "mixtral":  # experts are one tensor in memory, and one per expert on disk
        model = MixtralForCausalLM(MixtralConfig(**sizes, **decoder, num_local_experts=4))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                **sizes, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
            )
        )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide a lost bias
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def projections(model) -> dict[str, nn.Module]:
    """Return the layers to compress: every linear layer inside the decoder blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and name != "lm_head"
    }


def random_factor(
    d_in: int, d_out: int, n_atoms: int, sparsity: int, bias=None, *, full: bool = False
) -> SparseFactor:
    """Return a factor in float32 whose weight has entries of about 0.2."""
    dictionary = torch.randn(d_in, n_atoms) / n_atoms**0.5
    if full:
        return SparseFactor(dictionary, None, 0.2 * torch.randn(d_out, n_atoms), bias)
    rows = [torch.randperm(n_atoms)[:sparsity].sort().values for _ in range(d_out)]
    indices = torch.stack(rows).to(torch.int32)
    return SparseFactor.from_indices(dictionary, indices, 0.3 * torch.randn(d_out, sparsity), bias)


def compress_randomly(model, seed: int = 1):
    """Replace all projections by random factors that are exact in bfloat16; the last one gets full support."""
    torch.manual_seed(seed)
    layers = {}
    dense = projections(model)
    for name, module in dense.items():
        conv1d = type(module).__name__ == "Conv1D"
        d_in, d_out = module.weight.shape if conv1d else reversed(module.weight.shape)
        bias = None if module.bias is None else module.bias.detach()
        factor = random_factor(d_in, d_out, 21, 9, bias, full=name == list(dense)[-1])
        layers[name] = CospadiLinear.from_factor(
            factor.to(torch.bfloat16),
            dtype=torch.float32,
            layer_type="conv1d" if conv1d else "linear",
        )
    replace_modules(model, layers)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer made on the fly."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")


def write_tiny(folder: Path, family: str = "llama", **options) -> Path:
    """Write a compressed random model and return its folder."""
    model = compress_randomly(dense_model(family))
    options.setdefault("tokenizer", tiny_tokenizer())
    dtype = options.get("dtype", torch.bfloat16)
    data = options.pop("config_data", None) or describe_modules(model, dtype=dtype)
    return write_checkpoint(model, config_data=data, out_dir=folder, **options)


def token_ids(rows: int = 2, length: int = 7) -> torch.Tensor:
    """Return fixed token ids [rows, length]."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (rows, length), generator=generator)


def logits(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of a model in float32."""
    with torch.no_grad():
        return model(token_ids() if ids is None else ids).logits.float()


@pytest.fixture(scope="session")
def stored(tmp_path_factory) -> dict[str, Path]:
    """One compressed checkpoint per family; tests must not change it."""
    root = tmp_path_factory.mktemp("stored")
    return {family: write_tiny(root / family, family) for family in FAMILIES}


@pytest.fixture
def copied(stored, tmp_path) -> Path:
    """A copy of the Llama checkpoint to damage."""
    return Path(shutil.copytree(stored["llama"], tmp_path / "copy"))
