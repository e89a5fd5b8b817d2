"""Rounding with refits: never worse, exact bookkeeping, groups and identity atoms."""

from __future__ import annotations

import pytest
import torch

from cospadi.learn import rounding
from cospadi.learn.baselines import low_rank, magnitude
from cospadi.learn.budget import sparse_size
from cospadi.learn.group import fit_group
from cospadi.learn.member import Member, group_error
from cospadi.learn.options import LearnOptions
from cospadi.learn.quantize import StorageTypes, quantise_coeffs, quantise_dictionary
from cospadi.learn.result import FloatFactor
from cospadi.learn.rounding import balance_atoms, round_factors
from cospadi.learn.whitening import whiten_gram

D_IN = 32


def problem(d_out=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, D_IN, generator=generator, dtype=torch.float64)
    # a few strong directions, as activations have them: there coefficients must be exact
    x = x * torch.logspace(1, -1, D_IN, dtype=torch.float64)
    x = x @ torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64)
    return torch.randn(d_out, D_IN, generator=generator), x.T @ x / 400


def fitted(n_members=1, objective="exact"):
    pairs = [problem(48 - 8 * i, i) for i in range(n_members)]
    members = [Member(weight, whiten_gram(gram, "layer")) for weight, gram in pairs]
    joint = whiten_gram(torch.stack([gram for _, gram in pairs]).mean(0), "group")
    size = sparse_size(D_IN, sum(weight.shape[0] for weight, _ in pairs), 0.2)
    return fit_group(members, joint, *size, LearnOptions(iterations=3), objective=objective)


def error(fit, rounded):
    return group_error(fit.members, [factor.decoded().dense_weight() for factor in rounded])


ALL_TYPES = [
    StorageTypes(),
    StorageTypes("float32", "float32"),
    StorageTypes(coeffs="bfloat14"),
    StorageTypes(coeffs="bfloat14", rounding="truncate"),
    StorageTypes(coeffs="int8"),
    StorageTypes(coeffs="int4", coeffs_group=8),
    StorageTypes("int8", "int8"),
    StorageTypes("int8", "int4"),
    StorageTypes("int8", "bfloat16"),
]


@pytest.mark.parametrize("types", ALL_TYPES, ids=lambda t: f"{t.dictionary}-{t.coeffs}")
@pytest.mark.parametrize(("n_members", "objective"), [(1, "exact"), (2, "exact"), (3, "averaged")])
def test_refitting_never_loses_and_stored_numbers_decode(types, n_members, objective):
    fit = fitted(n_members, objective)
    plain = round_factors(fit.members, fit.factors, types, refit=False)
    refitted = round_factors(fit.members, fit.factors, types)
    assert error(fit, refitted) <= error(fit, plain)
    for factors in (plain, refitted):
        assert all(factor.dictionary is factors[0].dictionary for factor in factors)
        for original, factor in zip(fit.factors, factors, strict=True):
            assert torch.equal(factor.indices, original.indices)
            assert (factor.dictionary.dtype, factor.coeffs.dtype) == (
                types.dictionary,
                types.coeffs,
            )
    # stored numbers are fixed points of their types: storing them again loses nothing
    dictionary = refitted[0].dictionary
    if dictionary.fields is None:
        assert torch.equal(quantise_dictionary(dictionary.values, types).values, dictionary.values)
    for factor in refitted:
        if factor.coeffs.scale is None:
            again = quantise_coeffs(factor.coeffs.values, types)
            assert torch.equal(again.values, factor.coeffs.values)


def test_without_refit_the_values_are_those_of_the_factor():
    fit = fitted()
    types = StorageTypes("int8", "bfloat14", rounding="truncate")
    (rounded,) = round_factors(fit.members, fit.factors, types, refit=False)
    (factor,) = fit.factors
    assert torch.equal(rounded.coeffs.fields, quantise_coeffs(factor.coeffs, types).fields)
    diagonal = fit.members[0].whitening.factor.square().sum(0)
    expected = quantise_dictionary(factor.dictionary, types, diagonal)
    assert torch.equal(rounded.dictionary.fields, expected.fields)


def test_four_bits_gain_much_from_the_dictionarys_refit():
    fit = fitted()
    types = StorageTypes(coeffs="int4", coeffs_group=8)
    plain = error(fit, round_factors(fit.members, fit.factors, types, refit=False))
    one = error(fit, round_factors(fit.members, fit.factors, types, rounds=1))
    many = error(fit, round_factors(fit.members, fit.factors, types, rounds=8))
    assert many < one < 0.8 * plain


@pytest.mark.parametrize("n_members", [1, 2])
def test_balanced_atoms_keep_the_product_and_suit_integers(n_members):
    fit = fitted(n_members)
    balanced = balance_atoms(fit.members, fit.factors)
    assert all(factor.dictionary is balanced[0].dictionary for factor in balanced)
    for before, after in zip(fit.factors, balanced, strict=True):
        torch.testing.assert_close(after.dense_weight(), before.dense_weight())
    assert float(balanced[0].dictionary.norm(dim=0).max()) == pytest.approx(1.0)
    types = StorageTypes(coeffs="int4")

    def rounded(factors):
        plain = round_factors(fit.members, factors, types, refit=False)
        return error(fit, plain)

    assert rounded(balanced) < rounded(fit.factors)


def test_unused_atoms_and_identity_atoms_survive_balancing():
    weight, gram = problem()
    member = Member(weight, whiten_gram(gram, "layer"))
    generator = torch.Generator().manual_seed(4)
    dictionary = torch.randn(D_IN, 5, generator=generator, dtype=torch.float64)
    dictionary[:, 1] = 0.0
    # identity atom 3, the zero atom and atom 2 are used; atoms 0, 3, 4 are not
    indices = torch.tensor([[3, D_IN + 1, D_IN + 2]]).int().expand(48, 3)
    factor = FloatFactor(dictionary, indices, torch.randn(48, 3, generator=generator), D_IN)
    (balanced,) = balance_atoms([member], [factor])
    torch.testing.assert_close(balanced.dense_weight(), factor.dense_weight())
    assert bool(torch.isfinite(balanced.dictionary).all())
    torch.testing.assert_close(balanced.coeffs[:, 0], factor.coeffs[:, 0].double())


def test_float32_refit_ends_below_the_learned_state():
    """With nothing lost to rounding the rounds are plain alternations on the fixed support."""
    fit = fitted()
    before = group_error(fit.members, [factor.dense_weight() for factor in fit.factors])
    after = error(fit, round_factors(fit.members, fit.factors, StorageTypes("float32", "float32")))
    assert after < before


def test_pruned_weights_are_rounded_and_nothing_else():
    weight, gram = problem()
    member = Member(weight, whiten_gram(gram, "layer"))
    factor = magnitude(weight, 9)
    (rounded,) = round_factors([member], [factor], StorageTypes(), refit=False)
    assert torch.equal(rounded.decoded().dense_weight(), factor.dense_weight().bfloat16().double())
    assert rounded.n_identity == D_IN


@pytest.mark.parametrize("coeffs", ["bfloat16", "int4"])
def test_identity_atoms_without_a_dictionary_can_be_refitted(coeffs):
    weight, gram = problem()
    member = Member(weight, whiten_gram(gram, "layer"))
    factor = magnitude(weight, 9)
    types = StorageTypes(coeffs=coeffs)
    plain, refitted = (
        round_factors([member], [factor], types, refit=refit)[0] for refit in (False, True)
    )
    assert member.error(refitted.decoded().dense_weight()) < 0.99 * member.error(
        plain.decoded().dense_weight()
    )


def test_both_kinds_of_atoms_are_refitted_together():
    weight, gram = problem()
    member = Member(weight, whiten_gram(gram, "layer"))
    base = low_rank(weight, member.whitening, 6)
    outliers = magnitude(weight - base.dense_weight(), 3)
    mixed = FloatFactor(
        base.dictionary,
        torch.cat([outliers.indices, base.indices + D_IN], dim=1),
        torch.cat([outliers.coeffs, base.coeffs], dim=1),
        D_IN,
    )
    before = member.error(mixed.dense_weight())
    (rounded,) = round_factors([member], [mixed], StorageTypes("float32", "float32"))
    assert rounded.dictionary.values.shape == (D_IN, 6)
    assert member.error(rounded.decoded().dense_weight()) < 0.99 * before


@pytest.mark.parametrize("n_identity", [0, D_IN])
def test_feedback_lowers_the_error_of_integers(n_identity, monkeypatch):
    """With the same refits, plain rounding of every coefficient against rounding with feedback."""
    weight, gram = problem()
    member = Member(weight, whiten_gram(gram, "layer"))
    if n_identity:
        factors, members = [magnitude(weight, 20)], [member]
    else:
        fit = fitted()
        factors, members = list(fit.factors), list(fit.members)
    types = StorageTypes(coeffs="int4")
    with_feedback = round_factors(members, factors, types)
    monkeypatch.setattr(rounding, "_with_feedback", lambda coeffs, *_: coeffs)
    without = round_factors(members, factors, types)
    errors = [
        group_error(members, [f.decoded().dense_weight() for f in state])
        for state in (with_feedback, without)
    ]
    assert errors[0] < errors[1] * (0.95 if n_identity else 0.99)
