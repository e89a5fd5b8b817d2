"""GGUF files: dequantised to ordinary dense models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cospadi.errors import InputError
from cospadi.model.gguf_once import gguf_parsed_once
from cospadi.model.source import open_source, source_shapes
from tiny_models import CONTEXT, HIDDEN, LAYERS, make_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

_NAMES = {
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp's rotary embedding."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(path, model, tokenizer, quantised: bool):
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(model.config.intermediate_size)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(model.config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    backend = __import__("json").loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def add(name, tensor, heads=None):
        data = tensor.detach().numpy()
        if heads:
            data = permuted(data, heads)
        if quantised and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output.weight", model.lm_head.weight)
    add("output_norm.weight", model.model.norm.weight)
    for i, layer in enumerate(model.model.layers):
        add(f"blk.{i}.attn_q.weight", layer.self_attn.q_proj.weight, 4)
        add(f"blk.{i}.attn_k.weight", layer.self_attn.k_proj.weight, 2)
        for ours, theirs in _NAMES.items():
            add(f"blk.{i}.{theirs}.weight", layer.get_submodule(ours).weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("gguf")
    files = {}
    for name, quantised in (("f32", False), ("q8", True)):
        (root / name).mkdir()
        files[name] = root / name / f"{name}.gguf"
        write_gguf(files[name], make_model("llama"), tiny_tokenizer, quantised)
    return files


@pytest.mark.parametrize(("name", "tolerance"), [("f32", 0.0), ("q8", 4e-3)])
def test_gguf_becomes_an_ordinary_dense_model(gguf_files, tmp_path, name, tolerance, capfd):
    source = open_source(gguf_files[name])
    assert capfd.readouterr() == ("", "")
    assert (source.name, source.kind, source.path) == (name, "gguf", gguf_files[name])
    assert not hasattr(source.model, "hf_quantizer")
    assert not hasattr(source.config, "quantization_config")
    assert source.config.architectures == ["LlamaForCausalLM"]
    reference = dict(make_model("llama").named_parameters())
    for parameter_name, parameter in source.model.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, reference[parameter_name], atol=tolerance, rtol=0)
    assert source.tokenizer.decode(source.tokenizer("the value")["input_ids"]) == "the value"

    source.model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    again = open_source(tmp_path)
    assert torch.equal(again.model.lm_head.weight, source.model.lm_head.weight)


def test_folder_with_one_gguf(gguf_files, tmp_path):
    assert open_source(gguf_files["f32"].parent).kind == "gguf"
    for path in gguf_files.values():
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(InputError, match="2 GGUF files"):
        open_source(tmp_path)
    assert open_source(tmp_path, gguf_file="q8.gguf").name == "q8"
    with pytest.raises(InputError, match="no file"):
        open_source(tmp_path, gguf_file="q4.gguf")


def test_shapes_of_a_gguf(gguf_files):
    model = source_shapes(gguf_files["q8"]).model
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert model.model.layers[0].mlp.up_proj.weight.shape == (160, HIDDEN)


@pytest.mark.parametrize("keep", [3, 200, 0.3, 0.9, -7])
def test_truncated_gguf(gguf_files, tmp_path, keep):
    data = gguf_files["f32"].read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    for open_model in (open_source, source_shapes):
        with pytest.raises(InputError, match=r"cut\.gguf.*(damaged|cut short)") as caught:
            open_model(path)
        assert "\n" not in str(caught.value)


def test_a_whole_gguf_of_an_unknown_architecture_is_not_called_damaged(tmp_path):
    path = tmp_path / "odd.gguf"
    writer = gguf.GGUFWriter(str(path), "no-such-architecture")
    writer.add_tensor("x", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="cannot read the configuration") as caught:
        open_source(path)
    assert "damaged" not in str(caught.value)


def test_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a GGUF file"):
        open_source(path)


def test_the_file_is_parsed_once(gguf_files, monkeypatch):
    original, parsed = gguf.GGUFReader, []

    class Counting(original):
        def __init__(self, path, *args, **kwargs):
            parsed.append(str(path))
            super().__init__(path, *args, **kwargs)

    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    open_source(gguf_files["q8"])
    assert parsed == [str(gguf_files["q8"])]
    assert gguf.GGUFReader is Counting  # as before: nothing is kept after the model is open
    open_source(gguf_files["f32"])
    assert parsed[1:] == [str(gguf_files["f32"])]


def test_blocks_that_overlap_leave_the_package_as_it_was():
    original = gguf.GGUFReader
    first, second = gguf_parsed_once(), gguf_parsed_once()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gguf.GGUFReader is not original
    second.__exit__(None, None, None)
    assert gguf.GGUFReader is original
