"""Block-wise reconstruction: its errors against whole models, and what it may and may not change."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from decoder_models import make_decoder, token_ids

from cospadi.calibration.reconstruction import ReconstructionOptions, reconstruct_blocks
from cospadi.errors import InputError
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.learn.tunable import TunableLinear
from cospadi.model.discover import decoder_blocks, discover, weight_of
from cospadi.model.layers import build_layers, replace_modules

N, LENGTH = 44, 24
OPTIONS = ReconstructionOptions(epochs=4, rate=0.01, batch_size=4, held_back=4, seed=1)


def coarse_factor(weight, bias, *, n_atoms=6, kept=0.5, dtype=torch.bfloat16):
    """A low-rank part and the largest entries of the rest."""
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    atoms = (v[:n_atoms].T).to(dtype)
    inner = (u[:, :n_atoms] * s[:n_atoms]).float()
    rest = weight - inner @ atoms.float().T
    n_kept = int(kept * weight.shape[1])
    chosen = rest.abs().topk(n_kept, dim=1).indices.sort(dim=1).values
    learned = weight.shape[1] + torch.arange(n_atoms).expand(len(weight), -1)
    return SparseFactor.from_indices(
        atoms.contiguous(),
        torch.cat([chosen, learned], dim=1).int(),
        torch.cat([rest.gather(1, chosen), inner], dim=1).to(dtype),
        None if bias is None else bias.to(dtype),
        n_identity=weight.shape[1],
    )


def pruned_int8(weight, bias):
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    fields = (weight / scale.float()).round().clamp(-127, 127).int()
    return SparseFactor.from_indices(
        None, None, fields, None if bias is None else bias.bfloat16(),
        n_identity=weight.shape[1], packed_dtype="int8", coeffs_scale=scale,
    )  # fmt: skip


def problem(family):
    model = make_decoder(family)
    targets, _ = discover(model)
    factors = {t.name: coarse_factor(*weight_of(model, t)) for t in targets}
    return model, targets, factors


def stream_errors(model, targets, factors, ids):
    """Relative squared error per token behind every block, by hooks on the two whole models."""
    compressed = copy.deepcopy(model)
    types = {t.name: t.layer_type for t in targets}
    replace_modules(compressed, build_layers(factors, {}, layer_types=types, dtype=torch.float32))
    hidden = []
    for one in (model, compressed):
        seen = []
        handles = [
            block.register_forward_hook(
                lambda _m, _a, out, seen=seen: seen.append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            for _, block in decoder_blocks(one)
        ]
        with torch.no_grad():
            one(input_ids=ids)
        for handle in handles:
            handle.remove()
        hidden.append(torch.stack(seen))
    lost = (hidden[0] - hidden[1]).square().sum(-1) / hidden[0].square().sum(-1)
    return lost.flatten(1).mean(1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi", "gemma3"])
def test_errors_are_those_of_the_model_and_fall(family):
    model, targets, factors = problem(family)
    before_state = copy.deepcopy(model.state_dict())
    ids = token_ids(N, LENGTH)
    plain = stream_errors(model, targets, factors, ids[-OPTIONS.held_back :])
    results = list(reconstruct_blocks(model, factors, ids, OPTIONS))
    assert [result.block for result in results] == list(range(len(decoder_blocks(model))))
    tuned = dict(factors)
    for result in results:
        assert set(result.factors) == {t.name for t in targets if t.block == result.block}
        tuned.update(result.factors)
    after = stream_errors(model, targets, tuned, ids[-OPTIONS.held_back :])
    assert float(plain[0]) == pytest.approx(results[0].before, rel=1e-3)
    for result in results:
        wanted = float(after[result.block])
        assert wanted == pytest.approx(result.after if result.is_kept else result.before, rel=1e-3)
        assert result.is_kept == (result.after < result.before)
    assert results[0].is_kept
    assert results[0].after < 0.8 * results[0].before
    assert after[-1] < 0.8 * plain[-1]
    for name, factor in tuned.items():
        old = factors[name]
        assert torch.equal(factor.mask, old.mask)
        assert factor.spec == old.spec
        assert factor.bias is old.bias
    assert any(not torch.equal(tuned[n].coeffs, factors[n].coeffs) for n in tuned)
    assert any(not torch.equal(tuned[n].dictionary, factors[n].dictionary) for n in tuned)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before_state[name])


def test_finished_blocks_continue_to_the_same_bits():
    model, _, factors = problem("llama")
    ids = token_ids(N, LENGTH)
    whole = {}
    for result in reconstruct_blocks(model, factors, ids, OPTIONS):
        whole.update(result.factors)
    first = next(reconstruct_blocks(model, factors, ids, OPTIONS))
    rest = list(reconstruct_blocks(model, factors, ids, OPTIONS, finished=first.factors))
    assert [result.block for result in rest] == [1]
    for name, factor in {**first.factors, **rest[0].factors}.items():
        assert torch.equal(factor.coeffs, whole[name].coeffs)
        assert torch.equal(factor.dictionary, whole[name].dictionary)
    assert not list(reconstruct_blocks(model, factors, ids, OPTIONS, finished=whole))


def test_a_block_that_gains_nothing_stays():
    model, _, factors = problem("llama")
    options = dataclasses.replace(OPTIONS, rate=0.9, epochs=1)
    for result in reconstruct_blocks(model, factors, token_ids(N, LENGTH), options):
        assert not result.is_kept
        assert result.after >= result.before
        for name, factor in result.factors.items():
            assert factor is factors[name]


def test_shared_dictionaries_and_integers_stay():
    model, targets, factors = problem("llama")
    packed = [t for t in targets if t.name.endswith("up_proj")]
    for target in packed:
        factors[target.name] = pruned_int8(*weight_of(model, target))
    shared = [t.name for t in targets if t.name.endswith("q_proj")]
    seen = set()
    for result in reconstruct_blocks(model, factors, token_ids(N, LENGTH), OPTIONS, shared=shared):
        assert not {t.name for t in packed} & set(result.factors)
        assert result.is_kept
        for name in set(shared) & set(result.factors):
            seen.add(name)
            assert torch.equal(result.factors[name].dictionary, factors[name].dictionary)
            assert not torch.equal(result.factors[name].coeffs, factors[name].coeffs)
    assert seen == set(shared)


def test_only_integers_leave_nothing_to_do():
    model, targets, _ = problem("llama")
    factors = {t.name: pruned_int8(*weight_of(model, t)) for t in targets}
    assert not list(reconstruct_blocks(model, factors, token_ids(N, LENGTH), OPTIONS))
    with pytest.raises(InputError, match="integers"):
        TunableLinear(next(iter(factors.values())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tunable_layer_is_the_factor(dtype):
    torch.manual_seed(0)
    factor = coarse_factor(torch.randn(24, 16), torch.randn(24), dtype=dtype)
    layer = TunableLinear(factor)
    assert (layer.weight() - factor.dense_weight()).abs().max() < 1e-5
    x = torch.randn(5, 16)
    wanted = x @ factor.dense_weight().T + factor.bias.float()
    assert (layer(x) - wanted).abs().max() < 1e-4
    same = layer.rounded()
    assert torch.equal(same.coeffs, factor.coeffs)
    assert torch.equal(same.dictionary, factor.dictionary)
    # a step moves values on the support, and nothing else
    optimizer = torch.optim.SGD([p for p, _ in layer.step_sizes()], lr=0.1)
    layer(x).square().mean().backward()
    optimizer.step()
    moved = layer.rounded()
    assert torch.equal(moved.mask, factor.mask)
    assert (moved.dense_weight() - layer.weight()).abs().max() < 0.05
    assert not torch.equal(moved.coeffs, factor.coeffs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"rate": 0.0}, "rate"),
        ({"held_back": 0}, "held_back"),
        ({"held_back": N}, "held_back"),
    ],
)
def test_bad_options_are_refused(change, message):
    model, _, factors = problem("llama")
    with pytest.raises(InputError, match=message):
        list(
            reconstruct_blocks(
                model, factors, token_ids(N, LENGTH), dataclasses.replace(OPTIONS, **change)
            )
        )
