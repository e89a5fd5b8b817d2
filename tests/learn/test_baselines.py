"""Baselines against the plain statement of each method."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cospadi.errors import InputError
from cospadi.learn.baselines import (
    basis_sharing,
    compot,
    gptq,
    low_rank,
    magnitude,
    rocket,
    round_to_nearest,
    sparsegpt,
    wanda,
)
from cospadi.learn.quantize import quantise_integers
from cospadi.learn.whitening import identity_whitening, relative_error, whiten_gram


def problem(d_in=24, d_out=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, d_in, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    return torch.randn(d_out, d_in, generator=generator), x.T @ x / 300


def assert_valid(factor, sparsity, n_atoms, n_identity=0):
    assert factor.sparsity == sparsity
    assert (factor.n_atoms, factor.n_identity) == (n_atoms, n_identity)
    assert factor.indices.dtype == torch.int32
    assert bool((factor.indices.diff(dim=1) > 0).all())
    assert int(factor.indices.min()) >= 0
    assert int(factor.indices.max()) < n_atoms + n_identity
    assert bool(torch.isfinite(factor.dense_weight()).all())


@pytest.mark.parametrize("sparsity", [1, 11, 24])
def test_pruning_keeps_exactly_s_of_every_output(sparsity):
    weight, gram = problem()
    for factor in (
        magnitude(weight, sparsity),
        wanda(weight, gram, sparsity),
        sparsegpt(weight, gram, sparsity, block_size=7),
        sparsegpt(weight, gram, sparsity, block_size=7, quota="even"),
    ):
        assert_valid(factor, sparsity, 0, 24)


def test_magnitude_and_wanda_are_their_definitions():
    weight, gram = problem()
    for factor, scores in (
        (magnitude(weight, 9), weight.abs()),
        (wanda(weight, gram, 9), weight.abs() * gram.diagonal().sqrt()),
    ):
        threshold = scores.topk(9, dim=1).values[:, -1:]
        expected = torch.where(scores >= threshold, weight, 0.0)
        assert torch.equal(factor.dense_weight(), expected.double())


def test_equal_scores_keep_the_lowest_inputs():
    factor = magnitude(torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), 2)
    assert factor.indices.tolist() == [[0, 1], [0, 1]]


def slow_obs(weight, gram, sparsity, block_size, damping, quota):
    """One output at a time, the inverse of the remaining Gram formed anew at every column."""
    d = weight.shape[1]
    damped = gram + damping * gram.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    result = torch.zeros_like(weight, dtype=torch.float64)
    # cost of removing column j once all before it are final
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(d)]
    costs = torch.stack([inverse[0, 0] for inverse in inverses]).sqrt()
    for n, row in enumerate(weight.double()):
        w, kept = row.clone(), []
        for start in range(0, d, block_size):
            stop = min(start + block_size, d)
            if quota == "running":
                rivals, due = range(start, d), sparsity
            else:
                rivals, due = range(start, stop), stop * sparsity // d
            ranked = sorted(rivals, key=lambda j: -abs(float(w[j] / costs[j])))
            chosen = ranked[: due - len(kept)]
            for j in range(start, stop):
                if j in chosen:
                    kept.append(j)
                    continue
                w[j:] -= w[j].clone() / inverses[j][0, 0] * inverses[j][0]
                w[j] = 0.0
        result[n] = w
    return result


@pytest.mark.parametrize("quota", ["running", "even"])
@pytest.mark.parametrize("block_size", [1, 5, 24])
def test_sparsegpt_is_the_optimal_brain_surgeon(block_size, quota):
    weight, gram = problem()
    factor = sparsegpt(weight.double(), gram, 10, block_size=block_size, quota=quota)
    expected = slow_obs(weight, gram, 10, block_size, 0.01, quota)
    torch.testing.assert_close(factor.dense_weight(), expected, rtol=1e-8, atol=1e-9)


def test_updates_and_data_pay():
    weight, gram = problem(64, 80)

    def error(factor):
        return relative_error(gram, weight, factor.dense_weight())

    assert error(sparsegpt(weight, gram, 40)) < error(wanda(weight, gram, 40))
    assert error(wanda(weight, gram, 40)) < error(magnitude(weight, 40))


@pytest.mark.parametrize("sparsity", [0, 25])
def test_pruning_refuses_a_sparsity_out_of_range(sparsity):
    weight, gram = problem()
    with pytest.raises(InputError, match="sparsity"):
        magnitude(weight, sparsity)
    with pytest.raises(InputError, match="sparsity"):
        sparsegpt(weight, gram, sparsity)
    with pytest.raises(InputError, match="quota"):
        sparsegpt(weight, gram, 3, quota="none")


def test_compot_never_rises_and_is_orthonormal_in_whitened_space():
    weight, gram = problem(24, 60)
    whitening = whiten_gram(gram, "layer")
    errors = []
    for iterations in range(6):
        factor = compot(weight, whitening, 18, 9, iterations=iterations)
        assert_valid(factor, 9, 18)
        atoms = whitening.whiten_atoms(factor.dictionary)
        torch.testing.assert_close(atoms @ atoms.T, torch.eye(18).double(), atol=1e-8, rtol=0)
        errors.append(relative_error(gram, weight, factor.dense_weight()))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.98 * errors[0]


def test_compot_with_all_atoms_and_full_support_is_exact():
    weight, gram = problem(12, 40)
    factor = compot(weight, whiten_gram(gram, "layer"), 12, 12)
    torch.testing.assert_close(factor.dense_weight(), weight.double(), rtol=1e-6, atol=1e-6)


def test_compot_handles_more_atoms_than_outputs():
    weight, gram = problem(24, 5)
    assert_valid(compot(weight, whiten_gram(gram, "layer"), 20, 4), 4, 20)


def test_rocket_is_its_definition():
    weight, gram = problem(24, 60)
    whitening = whiten_gram(gram, "layer")
    factor = rocket(weight, whitening, 18, 9)
    assert_valid(factor, 9, 18)
    target = whitening.factor @ weight.double().T
    basis = torch.linalg.svd(target)[0][:, :18]
    code = basis.T @ target
    importance = (
        code.abs() * torch.linalg.solve(whitening.factor, basis).norm(dim=0)[:, None] ** 0.5
    )
    code = torch.where(importance >= importance.topk(9, dim=0).values[-1], code, 0.0)
    dictionary = torch.linalg.lstsq(code.T, target.T).solution.T
    expected = torch.linalg.solve(whitening.factor, dictionary @ code).T
    torch.testing.assert_close(factor.dense_weight(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [compot, rocket])
def test_orthonormal_bases_have_at_most_d_in_atoms(method):
    weight, gram = problem()
    with pytest.raises(InputError, match="max_atoms"):
        method(weight, whiten_gram(gram, "layer"), 25, 5)


def test_basis_sharing_of_one_is_svd_llm():
    weight, gram = problem()
    whitening = whiten_gram(gram, "layer")
    (shared,) = basis_sharing([weight], whitening, 7)
    single = low_rank(weight, whitening, 7)
    assert torch.equal(shared.dictionary, single.dictionary)
    assert torch.equal(shared.coeffs, single.coeffs)


def test_basis_sharing_error_is_the_dropped_singular_values_of_the_joined_weights():
    (first, gram_a), (second, gram_b) = problem(24, 17, 0), problem(24, 30, 1)
    whitening = whiten_gram(gram_a + gram_b, "group")
    factors = basis_sharing([first, second], whitening, 9)
    for factor, d_out in zip(factors, (17, 30), strict=True):
        assert_valid(factor, 9, 9)
        assert factor.full_support
        assert factor.d_out == d_out
        assert factor.dictionary is factors[0].dictionary
    joined = torch.cat([whitening.whiten(first), whitening.whiten(second)])
    found = torch.cat([whitening.whiten(factor.dense_weight()) for factor in factors])
    dropped = torch.linalg.svdvals(joined)[9:].square().sum()
    assert float((joined - found).square().sum()) == pytest.approx(float(dropped), rel=1e-6)


def test_plain_svd_is_the_whitened_one_with_identity():
    weight, _ = problem()
    left, values, right = torch.linalg.svd(weight.double())
    torch.testing.assert_close(
        low_rank(weight, identity_whitening(24), 11).dense_weight(),
        left[:, :11] * values[:11] @ right[:11],
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [0, 7, 24])
def test_round_to_nearest_is_within_half_a_step_of_the_largest_magnitude(bits, group):
    weight, _ = problem()
    factor, quantised = round_to_nearest(weight, bits, group=group)
    assert_valid(factor, 24, 0, 24)
    assert factor.full_support
    limit = 2 ** (bits - 1) - 1
    n_groups = math.ceil(24 / (group or 24))
    assert quantised.scale.shape == (17, n_groups)
    for g, part in enumerate(weight.split(group or 24, dim=1)):
        step = quantised.scale[:, g].float()
        expected = (part.abs().amax(1) / limit).bfloat16()
        assert torch.equal(quantised.scale[:, g], expected)
        found = quantised.values[:, g * (group or 24) :][:, : part.shape[1]]
        # a scale rounded down to bfloat16 clips the largest value a little
        slack = part.abs().amax(1) - step * limit
        assert bool(((found - part).abs().amax(1) <= torch.maximum(step / 2, slack) * 1.001).all())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [0, 8])
def test_gptq_loses_less_output_than_rounding_the_same_scales(bits, group):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(24, 32, generator=generator)
    x = torch.randn(300, 32, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(32, 32, generator=generator, dtype=torch.float64)
    gram = x.T @ x / 300
    factor, quantised = gptq(weight, gram, bits, group=group)
    plain = quantise_integers(weight, bits, group=group)
    assert torch.equal(quantised.scale, plain.scale)
    assert int(quantised.fields.abs().max()) <= 2 ** (bits - 1) - 1
    torch.testing.assert_close(factor.dense_weight().float(), quantised.values)

    def lost(values):
        difference = (weight - values).double()
        return float(((difference @ gram) * difference).sum())

    assert lost(quantised.values) < 0.9 * lost(plain.values)


def test_gptq_with_uncorrelated_inputs_is_rounding():
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    _, quantised = gptq(weight, torch.eye(32, dtype=torch.float64), 4)
    assert torch.equal(quantised.fields, quantise_integers(weight, 4).fields)
