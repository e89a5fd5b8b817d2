"""Untrained models whose blocks are called in different ways, beyond the families of `tiny_models`."""

from __future__ import annotations

import torch
from torch import nn

from tiny_models import CONTEXT, FAMILIES, VOCABULARY, make_model

DECODERS = (*FAMILIES, "gemma2", "gemma3", "gpt_neox", "phi", "opt")
"""gemma2, gemma3: full and sliding attention in turn, scaled embeddings, for gemma3 other rotary angles in each kind;
gpt_neox, phi: attention and MLP side by side; opt: learned positions, a projection before the blocks."""

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def make_decoder(family: str):
    """Return an untrained fp32 causal language model in eval mode."""
    if family in FAMILIES:
        return make_model(family)
    import transformers as tf

    torch.manual_seed(0)
    grouped = {**_SIZES, "intermediate_size": 96, "num_hidden_layers": 4, "num_key_value_heads": 2}
    gemma = {**grouped, "head_dim": 16, "sliding_window": 8, "initializer_range": 0.15}
    if family == "gemma2":
        model = tf.Gemma2ForCausalLM(tf.Gemma2Config(**gemma))
    elif family == "gemma3":
        layers = ["sliding_attention", "full_attention"] * 2
        model = tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**gemma, layer_types=layers))
    elif family == "gpt_neox":
        sizes = {"intermediate_size": 96, "num_hidden_layers": 3}
        model = tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES, **sizes))
    elif family == "phi":
        model = tf.PhiForCausalLM(tf.PhiConfig(**grouped))
    elif family == "opt":
        sizes = {"ffn_dim": 96, "num_hidden_layers": 3, "word_embed_proj_dim": 32}
        model = tf.OPTForCausalLM(tf.OPTConfig(**_SIZES, **sizes))
    else:
        raise ValueError(family)
    return model.eval()


def token_ids(n=7, length=24, seed=0):
    """Return random token ids [n, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (n, length), generator=generator)


class RoutedModel(nn.Module):
    """Two linears of which each token batch reaches one."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList([nn.ModuleDict({n: nn.Linear(32, 32) for n in "ab"})])

    def get_input_embeddings(self):  # noqa: D102
        return self.embed

    def forward(self, input_ids, use_cache):  # noqa: D102
        name = "a" if int(input_ids[0, 0]) == 2 else "b"
        return self.layers[0][name](self.embed(input_ids))
