"""Tiny random models of three families with random factors in place of their projections."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import dataclass
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
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import PACKED_COEFFS
from cospadi.model.layers import (
    CospadiLinear,
    build_layers,
    describe_modules,
    replace_modules,
)

logging.disable_progress_bar()

VOCABULARY = 61
FAMILIES = ("llama", "qwen2", "gpt2")


def dense_model(family: str, seed: int = 0, n_layers: int = 2):
    """Return an untrained float32 model: Llama with GQA, Qwen2 with biases and tied head, GPT-2 with Conv1D."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    decoder = {
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": n_layers,
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
                **sizes,
                n_embd=32,
                n_layer=n_layers,
                n_head=4,
                n_positions=64,
                initializer_range=0.2,
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


@dataclass(frozen=True)
class Kind:
    """One corner of the storage model."""

    n_atoms: int = 21
    identity: bool = False
    full: bool = False
    coeffs: str = "bfloat16"
    group: int = 0
    dictionary: str = "bfloat16"
    shared: bool = False


KINDS = {
    "plain": Kind(),
    "low rank": Kind(full=True),
    "pruned": Kind(n_atoms=0, identity=True),
    "pruned int8": Kind(n_atoms=0, identity=True, coeffs="int8"),
    "dense int4": Kind(n_atoms=0, identity=True, full=True, coeffs="int4", group=8),
    "dense int3": Kind(n_atoms=0, identity=True, full=True, coeffs="int3"),
    "augmented": Kind(n_atoms=5, identity=True),
    "augmented full": Kind(n_atoms=5, identity=True, full=True),
    "augmented int5": Kind(n_atoms=5, identity=True, coeffs="int5", group=4, dictionary="int8"),
    "bfloat14": Kind(coeffs="bfloat14"),
    "low rank int6": Kind(full=True, coeffs="int6", group=5),
    "int8 dictionary": Kind(dictionary="int8"),
    "shared": Kind(shared=True),
    "shared int4": Kind(coeffs="int4", group=4, shared=True),
    "shared int8 dictionary": Kind(dictionary="int8", coeffs="bfloat14", shared=True),
    "shared augmented": Kind(n_atoms=5, identity=True, coeffs="int8", shared=True),
}
"""Kinds of factors by name; all together they use every storage type but float16 and float32."""


def random_scales(*shape: int) -> torch.Tensor:
    """Return positive bfloat16 scales of about 0.01."""
    return (0.005 + 0.01 * torch.rand(shape)).bfloat16()


def random_fields(
    kind: Kind, d_out: int, sparsity: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return coefficients that `SparseFactor.from_indices` takes, and their scales."""
    if kind.coeffs not in PACKED_COEFFS:
        return (0.2 * torch.randn(d_out, sparsity)).to(getattr(torch, kind.coeffs)), None
    if kind.coeffs == "bfloat14":
        bits = (0.2 * torch.randn(d_out, sparsity)).bfloat16().view(torch.int16).to(torch.int32)
        return (bits & 0xFFFF) >> 2, None
    largest = 2 ** (int(kind.coeffs[3:]) - 1) - 1
    fields = torch.randint(-largest, largest + 1, (d_out, sparsity), dtype=torch.int32)
    scale = random_scales(d_out, -(-sparsity // (kind.group or sparsity))) * (64 / (largest + 1))
    return fields, scale


def kind_factor(
    kind: Kind, d_in: int, d_out: int, bias=None, leader: SparseFactor | None = None
) -> SparseFactor:
    """Return a random factor of one kind, with the dictionary of `leader` where one is given."""
    dictionary = dictionary_scale = None
    if leader is not None:
        dictionary, dictionary_scale = leader.dictionary, leader.dictionary_scale
    elif kind.dictionary == "int8":
        dictionary = torch.randint(-127, 128, (kind.n_atoms, d_in), dtype=torch.int8)
        dictionary_scale = random_scales(kind.n_atoms) / 4
    elif kind.n_atoms:
        dictionary = (torch.randn(d_in, kind.n_atoms) / kind.n_atoms**0.5).bfloat16()
    total = kind.n_atoms + (d_in if kind.identity else 0)
    sparsity = total if kind.full else 9 if leader is None else 7
    indices = None
    if not kind.full:
        rows = [torch.randperm(total)[:sparsity].sort().values for _ in range(d_out)]
        indices = torch.stack(rows).to(torch.int32)
    coeffs, scale = random_fields(kind, d_out, sparsity)
    return SparseFactor.from_indices(
        dictionary,
        indices,
        coeffs,
        None if bias is None else bias.bfloat16(),
        n_identity=d_in if kind.identity else 0,
        packed_dtype=kind.coeffs if kind.coeffs in PACKED_COEFFS else None,
        coeffs_scale=scale,
        coeffs_group=kind.group,
        dictionary_scale=dictionary_scale,
        owns_dictionary=leader is None,
    )


def varied_factors(model, seed: int = 3) -> tuple[dict[str, SparseFactor], dict[str, str]]:
    """Return factors of every kind for the projections of a model, and the leader of each member.

    A shared kind takes the next projection with as many inputs as a member. Kinds come last first,
    over and over until every projection has one.
    """
    torch.manual_seed(seed)
    open_projections = {}
    for name, module in projections(model).items():
        conv1d = type(module).__name__ == "Conv1D"
        d_in, d_out = module.weight.shape if conv1d else reversed(module.weight.shape)
        open_projections[name] = (d_in, d_out, module.bias)
    factors: dict[str, SparseFactor] = {}
    leaders: dict[str, str] = {}
    for kind in itertools.cycle(reversed(KINDS.values())):
        if not open_projections:
            return factors, leaders
        name = next(iter(open_projections))
        d_in, d_out, bias = open_projections.pop(name)
        factors[name] = kind_factor(kind, d_in, d_out, bias)
        member = next((n for n, sizes in open_projections.items() if sizes[0] == d_in), None)
        if kind.shared and member is not None:
            _, d_out, bias = open_projections.pop(member)
            factors[member] = kind_factor(kind, d_in, d_out, bias, factors[name])
            leaders[member] = name


def compress_variously(model, seed: int = 3, dtype=torch.float32):
    """Replace all projections by random factors of all kinds."""
    factors, leaders = varied_factors(model, seed)
    kinds = {
        name: "conv1d" if type(module).__name__ == "Conv1D" else "linear"
        for name, module in projections(model).items()
    }
    replace_modules(model, build_layers(factors, leaders, layer_types=kinds, dtype=dtype))
    return model


def write_varied(folder: Path, family: str = "llama", **options) -> Path:
    """Write a random model of all kinds and return its folder."""
    model = compress_variously(dense_model(family, n_layers=3))
    data = describe_modules(model, dtype=torch.bfloat16)
    options.setdefault("tokenizer", None)
    return write_checkpoint(model, config_data=data, out_dir=folder, **options)


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


@pytest.fixture(scope="session")
def varied(tmp_path_factory) -> dict[str, Path]:
    """One checkpoint per family with factors of every kind; tests must not change it."""
    root = tmp_path_factory.mktemp("varied")
    return {family: write_varied(root / family, family) for family in FAMILIES}


@pytest.fixture
def copied_varied(varied, tmp_path) -> Path:
    """A copy of the varied Llama checkpoint to damage."""
    return Path(shutil.copytree(varied["llama"], tmp_path / "copy"))


@pytest.fixture
def copied(stored, tmp_path) -> Path:
    """A copy of the Llama checkpoint to damage."""
    return Path(shutil.copytree(stored["llama"], tmp_path / "copy"))
