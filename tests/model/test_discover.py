"""Which linear layers are compressed, which matrices are reported as left out, and patterns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cospadi.errors import InputError
from cospadi.model.discover import decoder_blocks, discover, match_names, weight_of
from cospadi.model.source import source_shapes
from tiny_models import HIDDEN, make_model


def by_name(model, **arguments):
    return {target.name: target for target in discover(model, **arguments)[0]}


def test_llama_targets():
    targets, skipped = discover(make_model("llama"))
    assert skipped == []
    assert len(targets) == 14
    q, k, v, o, gate, up, down = targets[7:]
    assert [t.projection for t in targets[7:]] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert {t.block for t in targets[7:]} == {1}
    assert (k.d_in, k.d_out, k.has_bias, k.layer_type) == (HIDDEN, HIDDEN // 2, False, "linear")
    assert (down.d_in, down.d_out) == (160, HIDDEN)
    assert q.input_group == k.input_group == v.input_group == q.name
    assert gate.input_group == up.input_group == gate.name
    assert (o.input_group, down.input_group) == (o.name, down.name)
    assert [t.n_readers for t in (q, k, v, o, gate, up, down)] == [3, 3, 3, 1, 2, 2, 1]


def test_readers_of_an_input_are_counted_whether_or_not_they_are_targets():
    targets, _ = discover(make_model("llama"), targets=[r".*\.(v_proj|up_proj)"])
    assert [(t.projection, t.n_readers) for t in targets[:2]] == [
        ("self_attn.v_proj", 3),
        ("mlp.up_proj", 2),
    ]
    assert {t.input_group for t in targets} == {t.name for t in targets}


def test_qwen2_keeps_biases_and_tied_head():
    targets = by_name(make_model("qwen2"))
    assert len(targets) == 14
    with_bias = {t.projection for t in targets.values() if t.has_bias}
    assert with_bias == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    with pytest.raises(InputError, match="matches no linear layer"):
        discover(make_model("qwen2"), targets=["lm_head"])


def test_gpt2_conv1d_is_turned():
    model = make_model("gpt2")
    targets = by_name(model)
    assert sorted({t.projection for t in targets.values()}) == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    target = targets["transformer.h.1.attn.c_attn"]
    assert (target.layer_type, target.d_in, target.d_out) == ("conv1d", HIDDEN, 3 * HIDDEN)
    weight, bias = weight_of(model, target)
    x = torch.randn(5, HIDDEN)
    wanted = model.transformer.h[1].attn.c_attn(x)
    torch.testing.assert_close(x @ weight.T + bias, wanted)
    assert weight.is_contiguous()


@pytest.mark.parametrize("family", ["mixtral", "qwen3moe"])
def test_fused_experts_are_reported(family):
    targets, skipped = discover(make_model(family))
    assert {t.projection.split(".")[0] for t in targets} == {"self_attn"}
    fused = {s.name: s for s in skipped if "fused" in s.reason}
    assert sorted(fused) == [
        f"model.layers.{i}.mlp.experts.{name}"
        for i in range(2)
        for name in ("down_proj", "gate_up_proj")
    ]
    assert all(len(s.shape) == 3 for s in fused.values())
    routers = [s for s in skipped if s.name.endswith("mlp.gate.weight")]
    assert len(routers) == 2


def test_every_matrix_in_the_blocks_is_a_target_or_reported():
    for family in ("llama", "qwen2", "gpt2", "mixtral", "qwen3moe"):
        model = make_model(family)
        targets, skipped = discover(model)
        named = {f"{t.name}.weight" for t in targets} | {s.name for s in skipped}
        matrices = {
            f"{prefix}.{name}"
            for prefix, block in decoder_blocks(model)
            for name, p in block.named_parameters()
            if p.ndim > 1
        }
        assert matrices == named


def test_meta_model_gives_the_same_targets(tiny_model_dir):
    for family in ("llama", "gpt2", "mixtral"):
        shapes = source_shapes(tiny_model_dir(family)).model
        assert discover(shapes) == discover(make_model(family))


def test_targets_and_ignore():
    model = make_model("llama")
    chosen, skipped = discover(
        model,
        targets=[r".*\.(q|k)_proj", r"model\.layers\.1\..*"],
        ignore=[r".*\.1\.mlp\..*", r".*\.o_proj"],
    )
    assert [t.name.removeprefix("model.layers.") for t in chosen] == [
        "0.self_attn.q_proj",
        "0.self_attn.k_proj",
        "1.self_attn.q_proj",
        "1.self_attn.k_proj",
        "1.self_attn.v_proj",
    ]
    reasons = {s.name: s.reason for s in skipped}
    assert set(reasons) == {
        "model.layers.1.self_attn.o_proj",
        *(f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")),
    }
    assert all("ignore" in reason for reason in reasons.values())


def test_wildcard_never_takes_the_head():
    for family in ("llama", "qwen2"):
        assert not [n for n in by_name(make_model(family), targets=[".*"]) if "lm_head" in n]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        (r".*\.q_porj", "self_attn.q_proj"),
        ("q_proj", r"'\.\*q_proj\.\*'"),
        (r"model\.layers\.0\.mlp\.upproj", "model.layers.0.mlp.up_proj"),
        ("zzzz", "names look like"),
        ("", "names look like|whole name"),
    ],
)
@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_unmatched_pattern_lists_near_names(pattern, near, argument):
    with pytest.raises(InputError, match=f"{argument} pattern .* matches no linear layer.*{near}"):
        discover(make_model("llama"), **{argument: [pattern]})


def test_pattern_that_is_no_regular_expression():
    with pytest.raises(InputError, match=r"targets pattern '\(' is not a regular expression"):
        match_names("(", ["a"], argument="targets")


def test_nothing_to_compress():
    with pytest.raises(InputError, match="nothing to compress"):
        discover(make_model("llama"), ignore=[".*"])
    with pytest.raises(InputError, match="no list of decoder blocks"):
        discover(nn.Sequential(nn.Linear(32, 32)))


def test_blocks_without_linears():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))

    with pytest.raises(InputError, match="nothing to compress"):
        discover(Model())


def test_small_gates_stay_dense():
    model = make_model("llama")
    model.model.layers[0].mlp.gate = nn.Linear(HIDDEN, 4)
    targets, skipped = discover(model)
    assert len(targets) == 14
    assert [(s.name, s.shape) for s in skipped] == [("model.layers.0.mlp.gate", (4, HIDDEN))]
