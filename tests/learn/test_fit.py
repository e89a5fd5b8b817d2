"""Fitting one weight: low-rank optimality, the alternation, the refit, the reported errors."""

from __future__ import annotations

import pytest
import torch

from cospadi.errors import FitError, InputError
from cospadi.learn.budget import low_rank_size, sparse_size
from cospadi.learn.fit import fit_low_rank, fit_module
from cospadi.learn.init import initial_atoms, signal_svd
from cospadi.learn.learner import learn
from cospadi.learn.options import LearnOptions
from cospadi.learn.refit import refit_coefficients
from cospadi.learn.whitening import identity_whitening, relative_error, whiten_gram


def problem(d_in: int = 48, d_out: int = 72, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, d_in, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    weight = torch.randn(d_out, d_in, generator=generator)
    return weight, x.T @ x / 600


@pytest.mark.parametrize(("n", "d"), [(30, 12), (12, 30), (20, 20), (1, 5)])
def test_svd_reconstructs_and_equals_lapack(n, d):
    signals = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    svd = signal_svd(signals)
    torch.testing.assert_close(svd.left * svd.values @ svd.right, signals)
    torch.testing.assert_close(svd.values, torch.linalg.svdvals(signals), rtol=1e-9, atol=1e-9)


def test_low_rank_error_is_the_sum_of_dropped_singular_values():
    weight, gram = problem()
    whitening = whiten_gram(gram, "layer")
    rank = low_rank_size(48, 72, 0.3)
    dictionary, coeffs = fit_low_rank(weight, whitening, rank)
    dropped = torch.linalg.svdvals(whitening.whiten(weight))[rank:].square().sum()
    signals = whitening.whiten(weight)
    error = (signals - whitening.whiten(coeffs @ dictionary.T)).square().sum()
    assert float(error) == pytest.approx(float(dropped), rel=1e-6)


def test_plain_svd_is_the_whitened_one_with_identity():
    weight, _ = problem()
    dictionary, coeffs = fit_low_rank(weight, identity_whitening(48), 11)
    left, values, right = torch.linalg.svd(weight.double())
    torch.testing.assert_close(coeffs @ dictionary.T, left[:, :11] * values[:11] @ right[:11])


@pytest.mark.parametrize("init", ["svd", "columns", "random"])
@pytest.mark.parametrize("n_atoms", [5, 20, 33])
def test_initial_atoms_are_unit_and_reproducible(init, n_atoms):
    signals = torch.randn(24, 20)
    signals[3] = 0.0
    atoms = initial_atoms(signals, n_atoms, init, seed=1)
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(n_atoms))
    assert torch.equal(atoms, initial_atoms(signals, n_atoms, init, seed=1))


@pytest.mark.parametrize("solver", ["omp", "ormp"])
@pytest.mark.parametrize("init", ["svd", "columns"])
def test_alternation_lowers_the_error_and_beats_the_svd(solver, init):
    weight, gram = problem()
    signals = whiten_gram(gram, "layer").whiten(weight).float()
    options = LearnOptions(
        solver=solver, init=init, iterations=6, block_size=1, sweeps=1, tolerance=0.0
    )
    result = learn(signals, 32, 16, options)
    errors = [step.error_after_update for step in result.history]
    assert len(errors) == 6
    assert all(
        step.error_after_update <= step.error_after_coding * (1 + 1e-5) for step in result.history
    )
    assert errors[-1] < errors[0]
    reconstruction = (
        torch.zeros(72, 32).scatter_(1, result.indices.long(), result.coeffs) @ result.atoms
    )
    error = float((signals - reconstruction).norm() / signals.norm())
    assert error == pytest.approx(min(errors), rel=1e-4)


def test_zero_iterations_code_the_initial_dictionary_once():
    weight, gram = problem()
    signals = whiten_gram(gram, "layer").whiten(weight).float()
    result = learn(signals, 16, 4, LearnOptions(iterations=0))
    assert result.history == ()
    torch.testing.assert_close(result.atoms, initial_atoms(signals, 16, "svd", 42))


def test_early_stop():
    weight, gram = problem()
    signals = whiten_gram(gram, "layer").whiten(weight).float()
    result = learn(signals, 32, 16, LearnOptions(iterations=50, tolerance=0.2))
    assert len(result.history) < 10


def test_refit_is_the_least_squares_solution_on_the_support():
    generator = torch.Generator().manual_seed(5)
    signals = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    atoms = (
        torch.randn(14, 30, generator=generator, dtype=torch.float64)
        * torch.logspace(-3, 3, 14)[:, None]
    )
    indices = torch.stack(
        [torch.randperm(14, generator=generator)[:5].sort().values for _ in range(9)]
    ).int()
    refitted = refit_coefficients(
        signals, atoms, indices, torch.zeros(9, 5), steps=60, tolerance=1e-24
    )
    for row in range(9):
        chosen = atoms[indices[row].long()]
        expected = torch.linalg.lstsq(chosen.T, signals[row, :, None]).solution[:, 0]
        torch.testing.assert_close(refitted[row], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["cospadi", "svd-llm", "svd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reported_error_is_that_of_the_stored_factor(method, dtype):
    weight, gram = problem()
    whitening = whiten_gram(gram, "layer") if method != "svd" else identity_whitening(48)
    if method == "cospadi":
        n_atoms, sparsity = sparse_size(48, 72, 0.2)
    else:
        n_atoms = sparsity = low_rank_size(48, 72, 0.2)
    factor, report = fit_module(
        "layer", weight, None, gram, whitening,
        method=method, n_atoms=n_atoms, sparsity=sparsity,
        options=LearnOptions(iterations=3), storage_dtype=dtype,
    )  # fmt: skip
    factor.validate("layer")
    assert factor.dictionary.dtype == dtype
    found = relative_error(gram, weight, factor.dense_weight(torch.float64))
    assert report.relative_error == pytest.approx(found, rel=1e-9)
    if report.history:
        # the refit after rounding to bf16 costs less than it gains
        assert report.relative_error < report.history[-1].error_after_update * 1.005


def test_cospadi_beats_svd_llm_at_equal_stored_bytes():
    weight, gram = problem(96, 160)
    whitening = whiten_gram(gram, "layer")
    n_atoms, sparsity = sparse_size(96, 160, 0.3)
    rank = low_rank_size(96, 160, 0.3)
    options = LearnOptions(iterations=8)
    _, sparse = fit_module("a", weight, None, gram, whitening, method="cospadi", n_atoms=n_atoms, sparsity=sparsity, options=options)  # fmt: skip  # noqa: E501
    _, low_rank = fit_module("a", weight, None, gram, whitening, method="svd-llm", n_atoms=rank, sparsity=rank, options=options)  # fmt: skip  # noqa: E501
    assert sparse.relative_error < low_rank.relative_error


def test_overflowing_storage_type_is_a_fit_error():
    weight, gram = problem()
    with pytest.raises(FitError, match=r"model\.layer"):
        fit_module(
            "model.layer", weight * 1e6, None, gram, whiten_gram(gram, "layer"),
            method="cospadi", n_atoms=16, sparsity=8, options=LearnOptions(iterations=1),
            storage_dtype=torch.float16,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("solver", "lasso"),
        ("init", "zeros"),
        ("iterations", -1),
        ("sweeps", 0),
        ("tolerance", 1.0),
        ("block_size", 2.5),
    ],
)
def test_bad_options_name_the_argument(key, value):
    with pytest.raises(InputError, match=key):
        LearnOptions(**{key: value})
