"""Shared dictionaries: exactness at one member, guarantees of the objective, grouping."""

from __future__ import annotations

import itertools

import pytest
import torch

from cospadi.errors import InputError
from cospadi.learn.budget import sparse_size
from cospadi.learn.group import fit_group
from cospadi.learn.grouping import groups_by_position, groups_by_similarity, whitened_distances
from cospadi.learn.learner import learn
from cospadi.learn.member import Member, group_error
from cospadi.learn.options import LearnOptions
from cospadi.learn.whitening import identity_whitening, relative_error, weighted_energy, whiten_gram

D_IN = 32


def layers(n_members, *, d_out=40, seed=0):
    """Weights that share a part, each with its own strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(d_out, D_IN, generator=generator)
    weights, grams = [], []
    for _ in range(n_members):
        weights.append(common + 0.7 * torch.randn(d_out, D_IN, generator=generator))
        x = torch.randn(200, D_IN, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64)
        grams.append(x.T @ x / 200)
    return weights, grams


def members_of(weights, grams):
    members = [Member(w, whiten_gram(g, "layer")) for w, g in zip(weights, grams, strict=True)]
    return members, whiten_gram(torch.stack(grams).mean(0), "group")


@pytest.mark.parametrize("objective", ["averaged", "exact"])
def test_group_of_one_is_the_learner_to_the_bit(objective):
    (weight,), (gram,) = layers(1)
    members, joint = members_of([weight], [gram])
    options = LearnOptions(iterations=4)
    fit = fit_group(members, joint, 20, 10, options, objective=objective)
    whitening = whiten_gram(gram, "layer")
    plain = learn(whitening.whiten(weight).float(), 20, 10, options)
    dictionary = whitening.unwhiten_atoms(plain.atoms)
    norms = dictionary.norm(dim=0)
    (factor,) = fit.factors
    assert torch.equal(factor.dictionary, dictionary / norms)
    assert torch.equal(factor.indices, plain.indices)
    assert torch.equal(factor.coeffs, plain.coeffs.double() * norms[plain.indices.long()])
    assert len(fit.exact_errors) == 1
    expected = relative_error(gram, weight, factor.dense_weight())
    assert fit.exact_errors[0] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n_members", [2, 3])
@pytest.mark.parametrize("solver", ["omp", "ormp"])
def test_exact_objective_is_never_worse_than_the_averaged_one(n_members, solver):
    weights, grams = layers(n_members)
    members, joint = members_of(weights, grams)
    n_atoms, sparsity = sparse_size(D_IN, 40 * n_members, 0.3)
    options = LearnOptions(iterations=4, solver=solver, tolerance=0.0)
    averaged = fit_group(members, joint, n_atoms, sparsity, options, objective="averaged")
    exact = fit_group(members, joint, n_atoms, sparsity, options, alternations=5)
    assert exact.exact_errors[0] == averaged.exact_errors[0]
    assert len(exact.exact_errors) == 6
    for before, after in itertools.pairwise(exact.exact_errors):
        assert after <= before * (1 + 1e-5)
    assert exact.exact_errors[-1] < 0.97 * averaged.exact_errors[0]

    total = sum(weighted_energy(g, w) for w, g in zip(weights, grams, strict=True))
    for fit, expected in ((averaged, averaged.exact_errors[0]), (exact, min(exact.exact_errors))):
        lost = sum(
            weighted_energy(gram, weight.double() - factor.dense_weight())
            for weight, gram, factor in zip(weights, grams, fit.factors, strict=True)
        )
        assert (lost / total) ** 0.5 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("objective", ["averaged", "exact"])
def test_members_share_one_dictionary_and_may_differ_in_outputs(objective):
    weights, grams = layers(2)
    weights[1] = weights[1][:13]
    members, joint = members_of(weights, grams)
    fit = fit_group(members, joint, 24, 8, LearnOptions(iterations=3), objective=objective)
    first, second = fit.factors
    assert first.dictionary is second.dictionary
    torch.testing.assert_close(first.dictionary.norm(dim=0), torch.ones(24).double())
    assert (first.d_out, second.d_out) == (40, 13)
    for factor in fit.factors:
        assert factor.sparsity == 8
        assert bool((factor.indices.diff(dim=1) > 0).all())
    metrics = {id(member.whitening) for member in fit.members}
    assert metrics == (
        {id(joint)} if objective == "averaged" else {id(m.whitening) for m in members}
    )


def test_equal_members_gain_nothing_from_their_own_grams():
    (weight,), (gram,) = layers(1)
    members, joint = members_of([weight, weight.clone()], [gram, gram])
    fit = fit_group(members, joint, 20, 10, LearnOptions(iterations=4))
    first, second = fit.factors
    torch.testing.assert_close(first.dense_weight(), second.dense_weight(), rtol=1e-4, atol=1e-4)


def test_zero_weights_have_zero_error():
    _, grams = layers(2)
    members, joint = members_of([torch.zeros(4, D_IN)] * 2, grams)
    fit = fit_group(members, joint, 8, 2, LearnOptions(iterations=2))
    assert set(fit.exact_errors) == {0.0}
    assert group_error(members, [f.dense_weight() for f in fit.factors]) == 0.0


def test_groups_by_position():
    assert groups_by_position(5, 2) == [(0, 1), (2, 3), (4,)]
    assert groups_by_position(4, 4) == [(0, 1, 2, 3)]
    assert groups_by_position(3, 1) == [(0,), (1,), (2,)]
    assert groups_by_position(0, 2) == []
    with pytest.raises(InputError, match="group_size"):
        groups_by_position(4, 0)


def inner(distances, groups):
    return sum(float(distances[i, j]) for g in groups for i, j in itertools.combinations(g, 2))


def best_pairing(distances, left):
    """Cheapest perfect matching by trying all; one index may stay alone if their number is odd."""
    if len(left) < 2:
        return 0.0
    first, rest = left[0], left[1:]
    options = [
        float(distances[first, j]) + best_pairing(distances, [k for k in rest if k != j])
        for j in rest
    ]
    if len(left) % 2:
        options.append(best_pairing(distances, rest))
    return min(options)


def random_distances(count, seed):
    points = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)).double()
    return torch.cdist(points, points)


@pytest.mark.parametrize("count", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_by_similarity_are_close_to_the_best_matching(count, seed):
    distances = random_distances(count, seed)
    groups = groups_by_similarity(distances, 2)
    assert sorted(itertools.chain(*groups)) == list(range(count))
    assert sorted(map(len, groups), reverse=True) == [2] * (count // 2) + [1] * (count % 2)
    found, best = inner(distances, groups), best_pairing(distances, list(range(count)))
    assert found <= best * 1.1 + 1e-12
    assert found <= inner(distances, groups_by_position(count, 2)) + 1e-12


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_groups_of_any_size_hold_every_index_once(size):
    distances = random_distances(11, 0)
    groups = groups_by_similarity(distances, size)
    assert sorted(itertools.chain(*groups)) == list(range(11))
    assert sorted(map(len, groups)) == sorted(map(len, groups_by_position(11, size)))
    assert inner(distances, groups) <= inner(distances, groups_by_position(11, size)) + 1e-12


def test_similarity_finds_the_pairs_that_were_planted():
    generator = torch.Generator().manual_seed(1)
    bases = [torch.randn(6, D_IN, generator=generator) for _ in range(3)]
    # outputs in another order, another number, another scale: the span is what counts
    weights = [torch.randn(n, 6, generator=generator) @ bases[b] * scale
               for b, n, scale in ((0, 30, 1.0), (1, 30, 1.0), (2, 30, 1.0),
                                   (2, 40, 5.0), (0, 25, 0.1), (1, 30, 2.0))]  # fmt: skip
    distances = whitened_distances(weights, identity_whitening(D_IN))
    torch.testing.assert_close(distances, distances.T)
    assert groups_by_similarity(distances, 2) == [(0, 4), (1, 5), (2, 3)]


def test_distances_do_not_depend_on_the_order_of_outputs():
    weights, grams = layers(1)
    joint = whiten_gram(grams[0], "layer")
    distances = whitened_distances([weights[0], weights[0].flip(0) * 3], joint)
    torch.testing.assert_close(distances, torch.zeros(2, 2).double(), atol=1e-6, rtol=0)


def test_bad_distances_are_refused():
    with pytest.raises(InputError, match="square"):
        groups_by_similarity(torch.zeros(2, 3), 2)
    with pytest.raises(InputError, match="non-finite"):
        groups_by_similarity(torch.full((2, 2), float("nan")), 2)
