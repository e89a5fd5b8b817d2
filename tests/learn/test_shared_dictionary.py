"""The dictionary of a group against a dense Kronecker solve."""

from __future__ import annotations

import pytest
import torch

from cospadi.errors import FitError
from cospadi.learn.member import Member, group_error
from cospadi.learn.result import FloatFactor
from cospadi.learn.shared_dictionary import (
    CoupledTerm,
    solve_by_conjugate_gradients,
    solve_dictionary,
    solve_pair,
)
from cospadi.learn.whitening import whiten_gram

D_IN, N_ATOMS, SPARSITY = 6, 5, 3


def random_gram(seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, D_IN, generator=generator, dtype=torch.float64)
    return x.T @ x / 80 * spread


def random_factor(d_out, dictionary, seed, n_atoms=N_ATOMS, n_identity=0):
    generator = torch.Generator().manual_seed(seed)
    total = n_atoms + n_identity
    indices = torch.stack(
        [torch.randperm(total, generator=generator)[:SPARSITY].sort().values for _ in range(d_out)]
    )
    coeffs = torch.randn(d_out, SPARSITY, generator=generator, dtype=torch.float64)
    return FloatFactor(dictionary, indices.int(), coeffs, n_identity)


def group(n_members, *, n_identity=0, spread=10.0):
    """Members with different outputs and very different Grams, and codes over one random dictionary."""
    generator = torch.Generator().manual_seed(99)
    dictionary = torch.randn(D_IN, N_ATOMS, generator=generator, dtype=torch.float64)
    members, factors = [], []
    for index in range(n_members):
        weight = torch.randn(20 + 3 * index, D_IN, generator=generator)
        gram = random_gram(index, spread**index)
        members.append(Member(weight, whiten_gram(gram, f"layer {index}")))
        factors.append(random_factor(weight.shape[0], dictionary, index, n_identity=n_identity))
    return members, factors


def kronecker_solution(members, factors):
    """The normal equations written out: sum_l (B_l kron A_l) vec(D) = vec(sum_l A_l W_l S_l^T)."""
    matrix = torch.zeros((D_IN * N_ATOMS,) * 2, dtype=torch.float64)
    right = torch.zeros((D_IN, N_ATOMS), dtype=torch.float64)
    for member, factor in zip(members, factors, strict=True):
        a = member.whitening.scale * member.whitening.factor.T @ member.whitening.factor
        code = factor.code()
        learned = code[:, factor.n_identity :]
        target = member.weight.double() - (
            code[:, : factor.n_identity] if factor.n_identity else 0.0
        )
        matrix += torch.kron(learned.T @ learned, a)
        right += a @ target.T @ learned
    solution = torch.linalg.solve(matrix, right.T.flatten())
    return solution.reshape(N_ATOMS, D_IN).T


def error(members, factors, dictionary):
    return group_error(
        members,
        [
            FloatFactor(dictionary, f.indices, f.coeffs, f.n_identity).dense_weight()
            for f in factors
        ],
    )


@pytest.mark.parametrize("n_members", [1, 2, 3, 4])
@pytest.mark.parametrize("n_identity", [0, D_IN])
def test_solution_is_that_of_the_kronecker_system(n_members, n_identity):
    members, factors = group(n_members, n_identity=n_identity)
    expected = kronecker_solution(members, factors)
    found = solve_dictionary(members, factors)
    # conjugate gradients stop early by default, so compare what they minimise
    best = error(members, factors, expected)
    assert error(members, factors, found) <= best * (1 + 1e-5)
    if n_members <= 2:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def coupled(n_terms, seed=0):
    generator = torch.Generator().manual_seed(seed)
    terms = []
    for index in range(n_terms):
        code = torch.randn(12, N_ATOMS, generator=generator, dtype=torch.float64)
        terms.append(CoupledTerm(random_gram(seed + index, 5.0**index), code.T @ code))
    return terms, torch.randn(D_IN, N_ATOMS, generator=generator, dtype=torch.float64)


def test_both_solvers_agree_on_pairs():
    terms, right = coupled(2)
    exact = solve_pair(terms, right, ridge=1e-14)
    iterated = solve_by_conjugate_gradients(terms, right, ridge=1e-14, steps=200, tolerance=1e-14)
    torch.testing.assert_close(exact, iterated, rtol=1e-8, atol=1e-10)
    image = sum(term.a @ exact @ term.b for term in terms)
    torch.testing.assert_close(image, right, rtol=1e-5, atol=1e-6)


def test_conjugate_gradients_solve_many_terms_and_lower_the_quadratic_at_every_step():
    terms, right = coupled(5)

    def quadratic(x):
        image = sum(term.a @ x @ term.b for term in terms)
        return float(0.5 * (x * image).sum() - (x * right).sum())

    values = [
        quadratic(solve_by_conjugate_gradients(terms, right, steps=steps, tolerance=0.0))
        for steps in (0, 1, 2, 4, 8, 40)
    ]
    assert values == sorted(values, reverse=True)
    found = solve_by_conjugate_gradients(terms, right, steps=200, tolerance=1e-14)
    image = sum(term.a @ found @ term.b for term in terms)
    torch.testing.assert_close(image, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_members", [2, 3])
def test_unused_atoms_stay_and_partly_used_ones_are_solved(n_members):
    members, factors = group(n_members)
    dictionary = torch.randn(D_IN, N_ATOMS + 2, dtype=torch.float64)
    # atom 5 belongs to the first member alone, atom 6 to nobody
    first = random_factor(20, dictionary, 7, n_atoms=N_ATOMS + 1)
    codes = [first] + [
        FloatFactor(dictionary, factor.indices, factor.coeffs) for factor in factors[1:]
    ]
    found = solve_dictionary(members, codes)
    torch.testing.assert_close(found[:, 6], dictionary[:, 6], rtol=0, atol=1e-9)
    assert not torch.allclose(found[:, 5], dictionary[:, 5])
    # the gradient of the objective vanishes, for three members as far as conjugate gradients go by default
    gradient = torch.zeros_like(found)
    scale = torch.zeros_like(found)
    for member, factor in zip(members, codes, strict=True):
        a = member.whitening.scale * member.whitening.factor.T @ member.whitening.factor
        code = factor.code()
        gradient += a @ (member.weight.double() - code @ found.T).T @ code
        scale += a @ member.weight.double().T @ code
    assert float(gradient.norm()) < 1e-2 * float(scale.norm())


def test_solving_never_raises_the_error():
    for n_members in (1, 2, 3):
        members, factors = group(n_members)
        before = error(members, factors, factors[0].dictionary)
        solved = solve_dictionary(members, factors)
        after = error(members, factors, solved)
        assert after < before
        again = solve_dictionary(
            members, [FloatFactor(solved, f.indices, f.coeffs) for f in factors]
        )
        assert error(members, factors, again) <= after * (1 + 1e-9)


@pytest.mark.parametrize("solve", [solve_pair, solve_by_conjugate_gradients])
def test_an_indefinite_metric_is_a_fit_error(solve):
    terms, right = coupled(2)
    bad = [CoupledTerm(-term.a, term.b) for term in terms]
    with pytest.raises(FitError, match="definite"):
        solve(bad, right)
