"""Activation Grams against a direct computation, sharing, passes, and errors that name the module."""

from __future__ import annotations

import pytest
import torch
from decoder_models import RoutedModel

from cospadi.calibration.capture import GramAccumulator
from cospadi.calibration.statistics import collect_grams
from cospadi.errors import CospadiError, InputError
from cospadi.model.discover import discover
from tiny_models import CONTEXT, VOCABULARY, make_model


def token_ids(n=6, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (n, length), generator=generator)


def inputs_of(model, names, ids):
    """Every input of every module, fp64, by plain hooks on a full forward pass."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


def all_grams(model, targets, ids, **arguments):
    grams = {}
    for finished in collect_grams(model, targets, ids, **arguments):
        assert not grams.keys() & finished.grams.keys()
        grams.update(finished.grams)
    return grams


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_grams_equal_the_direct_computation(family):
    model = make_model(family)
    targets, _ = discover(model)
    ids = token_ids()
    grams = all_grams(model, targets, ids, batch_size=4)
    members = [name for gram in grams.values() for name in gram.members]
    assert sorted(members) == sorted(t.name for t in targets)
    reference = inputs_of(model, members, ids)
    for key, found in grams.items():
        assert key == found.members[0]
        assert (found.n_tokens, found.n_nonfinite) == (ids.numel(), 0)
        assert found.gram.dtype == torch.float64
        assert torch.equal(found.gram, found.gram.T)
        for name in found.members:
            x = reference[name]
            wanted = x.T @ x / ids.numel()
            assert (found.gram - wanted).norm() < 1e-6 * wanted.norm()


def test_inputs_are_shared_where_the_tensor_is_the_same():
    model = make_model("llama")
    targets, _ = discover(model)
    grams = all_grams(model, targets, token_ids())
    shared = [
        [name.rpartition(".")[2] for name in gram.members]
        for key, gram in grams.items()
        if ".layers.0." in key
    ]
    assert sorted(shared) == [
        ["down_proj"],
        ["gate_proj", "up_proj"],
        ["o_proj"],
        ["q_proj", "k_proj", "v_proj"],
    ]
    forecast = {target.name: target.input_group for target in targets}
    assert {n: k for k, gram in grams.items() for n in gram.members} == forecast


def test_equal_values_in_different_tensors_are_not_shared():
    model = make_model("llama")
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    targets, _ = discover(model, targets=[r".*\.(q|k|v)_proj"])
    # hooks registered earlier run earlier: k_proj sees a clone
    grams = all_grams(model, targets, token_ids())
    members = sorted(len(gram.members) for gram in grams.values())
    assert members == [1, 1, 2, 2]


def test_batch_size_only_changes_rounding():
    model = make_model("llama")
    targets, _ = discover(model)
    ids = token_ids(7)
    whole = all_grams(model, targets, ids, batch_size=8)
    single = all_grams(model, targets, ids, batch_size=2)
    for key, gram in whole.items():
        torch.testing.assert_close(gram.gram, single[key].gram, rtol=1e-5, atol=1e-6)
        assert gram.n_tokens == single[key].n_tokens == ids.numel()


def test_passes_hold_the_bound_and_give_equal_grams():
    model = make_model("llama")
    targets, _ = discover(model)
    ids = token_ids()
    one = list(collect_grams(model, targets, ids, batch_size=2))
    assert [p.n_passes for p in one] == [1]
    limit = 8 * 160 * 160 + 8 * 64 * 64
    progress = []
    blocks_run = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: blocks_run.append(1))
    several = []
    for finished in collect_grams(
        model,
        targets,
        ids,
        batch_size=2,
        max_gram_bytes=limit,
        progress=lambda *a: progress.append(a),
    ):
        several.append((finished.index, finished.n_passes, len(blocks_run)))
        assert sum(g.gram.nbytes for g in finished.grams.values()) <= limit
        for key in list(finished.grams):
            assert torch.equal(finished.grams.pop(key).gram, one[0].grams.pop(key).gram)
    assert not one[0].grams
    n = several[0][1]
    assert [s[0] for s in several] == list(range(n))
    assert n > 2
    assert progress == [(i + 1, 3 * n) for i in range(3 * n)]
    # the first pass needs block 0 only: block 1 ran in the probe and never before the later passes
    assert several[0][2] == 1


def test_forward_stops_before_the_head_and_after_the_last_needed_block():
    model = make_model("llama")
    ran = []
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append("head"))
    model.model.norm.register_forward_pre_hook(lambda *_: ran.append("norm"))
    targets, _ = discover(model)
    ran_before = len(ran)
    all_grams(model, targets, token_ids(), batch_size=1)
    assert ran[ran_before:] == ["norm"]  # the probe alone


def test_skipped_targets_are_left_out():
    model = make_model("llama")
    targets, _ = discover(model)
    skip = frozenset(t.name for t in targets if t.block == 0 or t.projection == "self_attn.q_proj")
    grams = all_grams(model, targets, token_ids(), skip_targets=skip)
    assert "model.layers.1.self_attn.k_proj" in grams
    assert sum(len(g.members) for g in grams.values()) == 6
    everything = frozenset(t.name for t in targets)
    assert all_grams(model, targets, token_ids(), skip_targets=everything) == {}


def test_hooks_and_mode_are_restored():
    model = make_model("llama").train()
    targets, _ = discover(model)
    running = collect_grams(model, targets, token_ids(), max_gram_bytes=8 * 160 * 160)
    next(running)
    running.close()
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activation_names_the_module(value):
    model = make_model("llama")

    def poison(_module, _args, output):
        output = output.clone()
        output[-1, -1, 3] = value
        return output

    model.model.layers[1].mlp.up_proj.register_forward_hook(poison)
    targets, _ = discover(model)
    with pytest.raises(InputError, match=r"enters model\.layers\.1\.mlp\.down_proj is not finite"):
        all_grams(model, targets, token_ids())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_overflowing_square_is_an_error():
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data *= 1e30
    targets, _ = discover(model)
    with pytest.raises(InputError, match=r"down_proj is not finite: .*(overflow|infinite)"):
        all_grams(model, targets, token_ids())


def test_module_that_the_first_tokens_miss_has_its_own_tokens():
    model = RoutedModel()
    targets, _ = discover(model)
    ids = token_ids(3, 10)
    ids[:, 0] = torch.tensor([2, 3, 3])
    grams = all_grams(model, targets, ids, batch_size=1)
    assert {k: g.n_tokens for k, g in grams.items()} == {"layers.0.a": 10, "layers.0.b": 20}
    with pytest.raises(InputError, match=r"no calibration token reached layers\.0\.b"):
        all_grams(model, targets, ids[:1])


class UnstableModel(RoutedModel):
    """Shares an input in its first call, and no longer."""

    calls = 0

    def forward(self, input_ids, use_cache):  # noqa: D102
        x = self.embed(input_ids)
        self.calls += 1
        self.layers[0]["a"](x)
        return self.layers[0]["b"](x if self.calls == 1 else x + 1)


def test_input_that_stops_being_shared_is_an_error():
    model = UnstableModel()
    with pytest.raises(CospadiError, match=r"layers\.0\.b shared its input with layers\.0\.a"):
        all_grams(model, discover(model)[0], token_ids())


class InPlaceModel(RoutedModel):
    """Changes the tensor between the two calls."""

    def forward(self, input_ids, use_cache):  # noqa: D102
        x = self.embed(input_ids)
        self.layers[0]["a"](x)
        x.mul_(2)
        return self.layers[0]["b"](x)


def test_same_tensor_with_new_values_is_not_shared():
    model = InPlaceModel()
    grams = all_grams(model, discover(model)[0], token_ids())
    torch.testing.assert_close(grams["layers.0.b"].gram, 4 * grams["layers.0.a"].gram)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.tensor([[0, VOCABULARY]]), "vocabulary"),
        (torch.tensor([[0, -1]]), "vocabulary"),
        (torch.zeros(1, CONTEXT + 1, dtype=torch.int64), "exceed the model's context"),
        (torch.zeros(4, dtype=torch.int64), r"\[n_samples, length\]"),
        (torch.zeros(0, 4, dtype=torch.int64), "non-empty"),
        (torch.zeros(2, 4), "integer"),
    ],
)
def test_bad_ids(ids, match):
    model = make_model("gpt2")
    with pytest.raises(InputError, match=match):
        collect_grams(model, discover(model)[0], ids)


def test_bad_arguments():
    model = make_model("llama")
    targets, _ = discover(model)
    with pytest.raises(InputError, match="batch_size"):
        collect_grams(model, targets, token_ids(), batch_size=0)
    with pytest.raises(InputError, match=r"less than the Gram of .* needs"):
        list(collect_grams(model, targets, token_ids(), max_gram_bytes=1000))


def accumulator_of(d):
    return GramAccumulator("a_module", d, torch.device("cpu"))


@pytest.mark.parametrize("d", [1, 7, 192, 193, 600])
@pytest.mark.parametrize("n_rows", [1, 50, 700])
def test_accumulator_equals_fp64(d, n_rows):
    generator = torch.Generator().manual_seed(d)
    rows = torch.randn(3, n_rows, d, generator=generator)
    accumulator = accumulator_of(d)
    for batch in rows:
        accumulator.add(batch)
    x = rows.double().reshape(-1, d)
    gram = accumulator.mean()
    torch.testing.assert_close(gram, x.T @ x / (3 * n_rows), rtol=1e-5, atol=1e-5)
    assert torch.equal(gram, gram.T)


def test_batches_of_any_size_add_up():
    # 2 * 8 gathered rows at most: fills, overfills and passes by the gathered rows, in every order
    sizes = [1, 15, 1, 8, 8, 3, 9, 20, 5, 16, 2, 2]
    rows = torch.randn(sum(sizes), 8, generator=torch.Generator().manual_seed(0))
    accumulator = accumulator_of(8)
    for batch in torch.split(rows, sizes):
        accumulator.add(batch)
    assert accumulator.n_tokens == sum(sizes)
    x = rows.double()
    torch.testing.assert_close(accumulator.mean(), x.T @ x / sum(sizes), rtol=1e-5, atol=1e-6)


def test_gathered_rows_are_copies():
    rows = torch.ones(2, 8)
    accumulator = accumulator_of(8)
    accumulator.add(rows)
    rows.fill_(7)
    assert (accumulator.mean() == 1).all()


def test_accumulation_loses_nothing_over_many_batches():
    # in fp32, adding 1 to 2^24 changes nothing: the sum would stop growing
    accumulator = accumulator_of(1)
    accumulator.add(torch.full((1, 1), 4096.0))
    for _ in range(50):
        accumulator.add(torch.ones(2, 1))
    assert accumulator.mean().item() * 101 == pytest.approx(2**24 + 100, rel=1e-12)


@pytest.mark.parametrize("d", [300, 4])
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("n_rows", [2, 1000])  # gathered, and multiplied at once
def test_non_finite_values_show_anywhere(d, position, n_rows):
    rows = torch.zeros(n_rows, d)
    rows[1, position] = float("nan")
    accumulator = accumulator_of(d)
    with pytest.raises(InputError, match=f"enters a_module is not finite: 1 of {rows.numel()}"):
        accumulator.add(rows)
        accumulator.mean()


def test_half_precision_rows_are_multiplied_in_fp32():
    for n_rows in (2, 100):
        rows = torch.full((n_rows, 2), 300.0, dtype=torch.float16)  # 300^2 overflows fp16
        accumulator = accumulator_of(2)
        accumulator.add(rows)
        assert accumulator.mean()[0, 0] == 90_000


def test_grams_are_the_same_bits_in_every_run():
    model = make_model("llama")
    targets, _ = discover(model)
    runs = [all_grams(model, targets, token_ids(), batch_size=1) for _ in range(2)]
    for key, gram in runs[0].items():
        assert torch.equal(gram.gram, runs[1][key].gram)
