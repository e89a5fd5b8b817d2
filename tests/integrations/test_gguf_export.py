"""A dense export becomes a GGUF file as llama.cpp's converter writes it, and says the same again."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_models import logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import cospadi
from cospadi.checkpoint.export import export_dense

gguf = pytest.importorskip("gguf")


def permuted(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Order the rows of q and k as llama.cpp's rotary embedding wants them."""
    rows = weight.shape[0]
    return weight.view(n_heads, 2, rows // n_heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(folder, path) -> None:
    """Convert a dense Llama folder; what llama.cpp's converter does, without the tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        key = heads.get(name.split(".")[-2])
        tensor = tensor.float() if key is None else permuted(tensor.float(), config[key])
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("source", ["stored", "varied"])
def test_dense_export_as_gguf(request, source, tmp_path):
    pytest.importorskip("accelerate")
    folder = request.getfixturevalue(source)["llama"]
    dense = export_dense(folder, tmp_path / "dense", dtype=torch.float32)
    write_gguf(dense, tmp_path / "model.gguf")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    model, _ = cospadi.load(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-3, atol=1e-3)
