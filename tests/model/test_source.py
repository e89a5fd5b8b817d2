"""Opening dense models, and the one-line errors for everything that can be wrong with one."""

from __future__ import annotations

import json
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from cospadi.errors import InputError
from cospadi.model.files import read_json
from cospadi.model.source import open_source, source_shapes
from tiny_models import make_model


def fails(path, match: str, open_model=open_source) -> str:
    with pytest.raises(InputError, match=match) as caught:
        open_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "qwen3moe"])
def test_folder_opens_with_equal_weights(tiny_model_dir, family):
    source = open_source(tiny_model_dir(family))
    assert (source.name, source.kind, source.path) == (family, "folder", tiny_model_dir(family))
    assert not source.model.training
    reference = dict(make_model(family).named_parameters())
    for name, parameter in source.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
        assert torch.equal(parameter, reference[name])
    assert source.tokenizer("hello")["input_ids"]
    assert source.config.architectures == [type(source.model).__name__]


def test_half_precision_is_widened(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "half")
    make_model("llama").bfloat16().save_pretrained(folder)
    model = open_source(folder).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    wanted = make_model("llama").lm_head.weight.bfloat16().float()
    assert torch.equal(model.lm_head.weight, wanted)


def test_sharded_folder(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    make_model("llama").save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(open_source(folder).model.lm_head.weight, make_model("llama").lm_head.weight)
    shards[-1].unlink()
    fails(folder, f"{shards[-1].name}.*missing")


def test_shard_outside_the_folder_is_refused(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "outside")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {"lm_head.weight": "../x.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(folder, "own folder")


def test_fingerprint_follows_the_weights(damaged_dir):
    first = open_source(damaged_dir).fingerprint
    assert first.startswith("sha256:")
    assert open_source(damaged_dir).fingerprint == first
    edit_weights(damaged_dir, lambda t: t["lm_head.weight"].add_(1e-3))
    assert open_source(damaged_dir).fingerprint != first


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3moe"])
def test_shapes_hold_no_data(tiny_model_dir, family):
    shapes = source_shapes(tiny_model_dir(family))
    reference = {n: p.shape for n, p in make_model(family).named_parameters()}
    assert {n: p.shape for n, p in shapes.model.named_parameters()} == reference
    assert all(p.is_meta for p in shapes.model.parameters())


def test_missing_path():
    fails("/no/such/folder", "does not exist")
    fails("./nothing.gguf", "does not exist")
    fails("a b c", "does not exist")
    fails("x" * 5000, "usable path")


def test_hub_id_without_network_fails_at_once():
    started = time.perf_counter()
    fails("someone/some-model", "hub cannot be reached")
    assert time.perf_counter() - started < 5


def test_hub_id_downloads_what_is_needed(tiny_model_dir, monkeypatch):
    import huggingface_hub

    calls = []

    def download(repo_id, **arguments):
        calls.append((repo_id, arguments))
        return str(tiny_model_dir("llama"))

    monkeypatch.setattr("cospadi.model.locate.require_hub", lambda *a, **k: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("someone/tiny", revision="v1")
    assert (source.name, source.kind) == ("someone/tiny", "hub")
    assert calls[0][1]["revision"] == "v1"
    assert "*.safetensors" in calls[0][1]["allow_patterns"]
    source_shapes("someone/tiny")
    assert calls[1][1]["allow_patterns"] == ["config.json"]


def test_empty_folder(tmp_path):
    fails(tmp_path, "neither config.json nor a .gguf")


def test_missing_tokenizer(damaged_dir):
    for path in damaged_dir.glob("tokenizer*"):
        path.unlink()
    fails(damaged_dir, "no tokenizer")


def test_damaged_tokenizer(damaged_dir):
    (damaged_dir / "tokenizer.json").write_text('{"model": 3}')
    fails(damaged_dir, "cannot load the tokenizer")
    (damaged_dir / "tokenizer.json").write_text("{}")
    message = fails(damaged_dir, r"cannot load the tokenizer from .*tokenizer\.json \(")
    assert str(damaged_dir) in message and "Error: " in message


def test_foreign_tokenizer(damaged_dir):
    def shrink(tensors):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = tensors[name][:40].contiguous()

    edit_weights(damaged_dir, shrink)
    edit_config(damaged_dir, vocab_size=40)
    fails(damaged_dir, "tokenizer does not belong")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_named(damaged_dir, value):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(damaged_dir, lambda t: t[name].view(-1).__setitem__(77, value))
    assert "holds 1 non-finite" in fails(damaged_dir, name)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_safetensors(damaged_dir, keep):
    path = damaged_dir / "model.safetensors"
    data = path.read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep
    path.write_bytes(data[:size])
    fails(damaged_dir, "model.safetensors.*truncated")


def test_no_weights(damaged_dir):
    (damaged_dir / "model.safetensors").unlink()
    fails(damaged_dir, "holds no weights")


def test_missing_tensor_is_named(damaged_dir):
    edit_weights(damaged_dir, lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"))
    fails(damaged_dir, "lacks the tensor model.layers.0.self_attn.q_proj.weight")


def test_wrong_shape_is_named(damaged_dir):
    name = "model.layers.0.mlp.down_proj.weight"
    edit_weights(damaged_dir, lambda t: t.update({name: t[name][:, :-1].contiguous()}))
    fails(damaged_dir, rf"{name} is \[64, 159\] in the checkpoint, .* \[64, 160\]")


def test_config_that_describes_a_huge_model_allocates_nothing(damaged_dir):
    edit_config(damaged_dir, hidden_size=1 << 16, vocab_size=1 << 24, head_dim="absent")
    fails(damaged_dir, "describes .* parameters, the weight files hold")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"model_type": "vit"}, "cannot build"),
        ({"model_type": "no_such_model"}, "cannot read the configuration"),
        ({"quantization_config": {"quant_method": "cospadi"}}, "already compressed"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantised \(gptq\)"),
        ({"quantization_config": 7}, "already quantised"),
        ({"architectures": "Llama"}, "architectures"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 in config.json, expected an integer"),
        ({"num_key_value_heads": 0}, "num_key_value_heads = 0 in"),
        ({"num_attention_heads": 2.5}, r"num_attention_heads = 2\.5 in"),
        ({"hidden_size": "64"}, "hidden_size = '64' in"),
        ({"vocab_size": True}, "vocab_size = True in"),
        ({"num_hidden_layers": 10**7}, "10000000 hidden layers"),
        ({"max_position_embeddings": -3}, "max_position_embeddings = -3 in .* at least 1"),
        ({"vocab_size": 10**40}, "vocab_size .* out of range"),
        ({"hidden_act": "wrong"}, r"\(hidden_act = 'wrong' in config\.json\)"),
        ({"dtype": "float99"}, r"\(dtype = 'float99' in config\.json\)"),
        ({"rope_parameters": "linear"}, "rope_parameters"),
    ],
)
def test_bad_config(damaged_dir, changes, match):
    edit_config(damaged_dir, **changes)
    fails(damaged_dir, match)


def test_unknown_activation_or_negative_epsilon_is_caught_by_running(damaged_dir):
    edit_config(damaged_dir, rms_norm_eps=-1e6)
    fails(damaged_dir, r"non-finite logits, first seen in .* model\.layers\.0\.input_layernorm: ")


def test_overflowing_weights_name_the_first_module(damaged_dir):
    def enlarge(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)

    edit_weights(damaged_dir, enlarge)
    message = fails(damaged_dir, "non-finite logits")
    assert "output of model.layers.1.mlp.up_proj: its weights overflow" in message


@pytest.mark.parametrize(
    ("architecture", "open_model"),
    [
        ("BertForMaskedLM", open_source),
        ("BertModel", open_source),
        ("BertLMHeadModel", open_source),
        ("BertForMaskedLM", source_shapes),
        ("BertModel", source_shapes),
        ("ModernBertModel", source_shapes),
    ],
)
def test_encoders_are_refused(architecture, open_model, tiny_tokenizer, tmp_path):
    import transformers

    cls = getattr(transformers, architecture)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {name: 1 for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    try:
        config = cls.config_class(vocab_size=384, intermediate_size=64, **sizes, **special)
    except Exception as error:  # of huggingface_hub's own kind: 5.16 and ModernBERT
        pytest.skip(f"transformers {transformers.__version__} cannot make it: {error}")
    cls(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    fails(tmp_path, "no causal language model", open_model)


def test_an_encoder_family_s_decoder_opens(tiny_tokenizer, tmp_path):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=384, intermediate_size=64, is_decoder=True, **sizes)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert open_source(tmp_path).config.is_decoder


def test_surplus_tensors_are_noted(damaged_dir):
    assert open_source(damaged_dir).notes == ()
    edit_weights(damaged_dir, lambda t: t.update({"model.layers.9.x": torch.zeros(2)}))
    (note,) = open_source(damaged_dir).notes
    assert "1 tensor of the checkpoint, first model.layers.9.x, not used" in note
    edit_weights(damaged_dir, lambda t: t.update({"a.x": torch.zeros(2)}))
    (note,) = open_source(damaged_dir).notes
    assert "2 tensors of the checkpoint, first a.x, not used" in note


def test_a_file_that_cannot_be_read_is_not_called_invalid(tmp_path):
    # a folder in its place: permissions do not stop a superuser
    (tmp_path / "config.json").mkdir()
    message = fails(tmp_path / "config.json", "cannot be read", read_json)
    assert "JSON" not in message and str(tmp_path) in message
    (tmp_path / "x.json").write_bytes(b"\xff")
    fails(tmp_path / "x.json", r"x\.json is not valid JSON: it is not UTF-8", read_json)


def test_integer_weight_is_refused(damaged_dir):
    def quantise(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = (100 * tensors[name]).to(torch.int32)

    edit_weights(damaged_dir, quantise)
    fails(damaged_dir, r"layers\.0\.mlp\.up_proj\.weight is torch\.int32, expected floating point")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\x00", '{"a": }', "[" * 5000])
@pytest.mark.parametrize("open_model", [open_source, source_shapes])
def test_config_that_is_no_json_object(damaged_dir, text, open_model):
    (damaged_dir / "config.json").write_text(text)
    assert str(damaged_dir) in fails(damaged_dir, r"config\.json", open_model)


def test_fuzzed_config_opens_or_fails_in_one_line(damaged_dir):
    values = [None, True, -1, 0, 3, 64, 10**6, 10**50, 1.5, "x", "gpt2", [], [1], {}, {"a": 1}]
    path = damaged_dir / "config.json"
    text = path.read_text()
    original = json.loads(text)
    generator = random.Random(0)
    outcomes = set()
    for _ in range(60):
        config = dict(original)
        for _ in range(generator.choice([1, 2, 4])):
            config[generator.choice(list(original))] = generator.choice(values)
        mutated = json.dumps(config)
        if generator.random() < 0.3:
            mutated = text[: generator.randrange(len(text))]
        path.write_text(mutated)
        for open_model in (open_source, source_shapes):
            try:
                open_model(damaged_dir)
                outcomes.add("opened")
            except InputError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert outcomes == {"opened", "refused"}
