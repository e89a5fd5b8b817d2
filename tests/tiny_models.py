"""Untrained models of several families and a small tokenizer, each made in well under a second."""

from __future__ import annotations

import torch
from torch import nn

VOCABULARY = 384
HIDDEN = 64
LAYERS = 2
CONTEXT = 128
FAMILIES = ("llama", "qwen2", "gpt2", "mixtral", "qwen3moe")

_SIZES = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # weights of trained size: with the default 0.02 every block is nearly the identity and hides errors
    "initializer_range": 0.15,
}
_DECODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def make_model(family: str, seed: int = 0) -> nn.Module:
    """Return an untrained fp32 model in eval mode.

    llama: grouped-query attention, no bias, own head. qwen2: biases on q/k/v, tied embeddings. gpt2: Conv1D with
    biases, fused q/k/v, tied embeddings. mixtral, qwen3moe: fused expert tensors.
    """
    import transformers as tf

    torch.manual_seed(seed)
    if family == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES, **_DECODER))
    elif family == "qwen2":
        model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SIZES, **_DECODER, tie_word_embeddings=True))
    elif family == "gpt2":
        sizes = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT}
        model = tf.GPT2LMHeadModel(tf.GPT2Config(**_SIZES, **sizes))
    elif family == "mixtral":
        config = tf.MixtralConfig(**_SIZES, **_DECODER, num_local_experts=4)
        model = tf.MixtralForCausalLM(config)
    elif family == "qwen3moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
        model = tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(**_SIZES, **_DECODER, **experts, head_dim=16)
        )
    else:
        raise ValueError(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero by default, which would hide a lost bias
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_tokenizer(*, bos: bool = False):
    """Return a byte-level BPE tokenizer with 384 tokens, trained on the built-in text.

    Parameters
    ----------
    bos
        Whether it begins every text with ``<s>``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from cospadi.calibration.data import builtin_text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([builtin_text("calibration")[:40_000]], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
