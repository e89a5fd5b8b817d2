"""Learning a dictionary: start, alternation, least-squares updates, refit, options."""

from __future__ import annotations

import itertools

import pytest
import torch

from cospadi.errors import FitError, InputError
from cospadi.learn.coding import encode
from cospadi.learn.init import initial_atoms, principal_directions, signal_svd
from cospadi.learn.learner import learn, update_by_least_squares
from cospadi.learn.mod import least_squares_dictionary
from cospadi.learn.options import LearnOptions
from cospadi.learn.refit import refit_coefficients
from cospadi.learn.result import FloatFactor, dense_code, top_support
from cospadi.learn.whitening import whiten_gram


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


def random_code(n, n_atoms, sparsity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(n_atoms, generator=generator)[:sparsity].sort().values for _ in range(n)]
    return torch.stack(rows).int(), torch.randn(n, sparsity, generator=generator)


def test_principal_directions_are_the_right_singular_vectors():
    signals = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = principal_directions(signals, 5)
    expected = torch.linalg.svd(signals)[2][:5]
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(5).double())
    with pytest.raises(InputError, match="n_atoms"):
        principal_directions(signals, 13)


def test_tolerance_zero_runs_all_iterations():
    """Coding anew may raise the error; a run with tolerance 0, the paper's, goes on all the same."""
    signals = torch.randn(30, 10, generator=torch.Generator().manual_seed(0))
    result = learn(signals, 12, 5, LearnOptions(iterations=60, tolerance=0.0))
    assert len(result.history) == 60
    errors = [step.error_after_update for step in result.history]
    assert any(after > before for before, after in itertools.pairwise(errors))
    code = dense_code(result.indices, result.coeffs, 12)
    found = float((signals - code @ result.atoms).norm() / signals.norm())
    assert found == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("solver", ["omp", "ormp"])
@pytest.mark.parametrize("batch", [1, 7, 64, 72, 1000])
def test_coding_batch_changes_no_bit(solver, batch):
    weight, gram = problem()
    signals = whiten_gram(gram, "layer").whiten(weight).float()
    atoms = initial_atoms(signals, 40, "columns", 3)
    whole = encode(signals, atoms, 16, solver)
    parts = encode(signals, atoms, 16, solver, batch=batch)
    assert torch.equal(whole.indices, parts.indices)
    assert torch.equal(whole.coeffs, parts.coeffs)
    assert whole.n_padded == parts.n_padded


def test_least_squares_dictionary_is_lstsq():
    generator = torch.Generator().manual_seed(2)
    signals = torch.randn(60, 9, generator=generator, dtype=torch.float64)
    code = dense_code(*random_code(60, 14, 5), 14).double()
    present = torch.randn(14, 9, generator=generator, dtype=torch.float64)
    found = least_squares_dictionary(signals, code, present)
    torch.testing.assert_close(
        found, torch.linalg.lstsq(code, signals).solution, rtol=1e-5, atol=1e-6
    )


def test_least_squares_dictionary_keeps_unused_atoms_and_never_raises_the_error():
    generator = torch.Generator().manual_seed(3)
    signals = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    indices, coeffs = random_code(6, 10, 4)
    code = dense_code(
        indices, coeffs, 14
    ).double()  # atoms 10 to 13 unused, fewer signals than atoms
    present = torch.randn(14, 9, generator=generator, dtype=torch.float64)
    found = least_squares_dictionary(signals, code, present)
    torch.testing.assert_close(found[10:], present[10:], rtol=0, atol=1e-12)
    assert (
        (signals - code @ found).norm() < 1e-4 * signals.norm() < (signals - code @ present).norm()
    )
    with pytest.raises(FitError, match="finite"):
        least_squares_dictionary(signals, code * float("nan"), present)


def test_mod_update_is_the_least_squares_product_with_unit_atoms():
    generator = torch.Generator().manual_seed(4)
    signals = torch.randn(50, 8, generator=generator)
    atoms = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    code = encode(signals, atoms, 4, "omp")
    dense = dense_code(code.indices, code.coeffs.clone(), 12)
    before = float((signals - dense @ atoms).square().sum())
    expected = dense.double() @ torch.linalg.lstsq(dense.double(), signals.double()).solution
    stats = update_by_least_squares(atoms, signals, code)
    product = dense_code(code.indices, code.coeffs, 12) @ atoms
    torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(12))
    assert stats.objective_before == pytest.approx(before, rel=1e-5)
    assert stats.objective_after == pytest.approx(
        float((signals - product).square().sum()), rel=1e-5
    )
    assert stats.objective_after < stats.objective_before
    assert (stats.n_unused, stats.n_reseeded) == (0, 0)


@pytest.mark.parametrize("unused", ["skip", "reseed"])
def test_mod_treats_unused_atoms_as_asked(unused):
    generator = torch.Generator().manual_seed(5)
    signals = torch.randn(20, 8, generator=generator)
    atoms = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    code = encode(signals, atoms[:9].contiguous(), 2, "omp")
    old = atoms.clone()
    stats = update_by_least_squares(atoms, signals, code, unused=unused)
    assert stats.n_unused == 3
    if unused == "skip":
        assert torch.equal(atoms[9:], old[9:])
        assert stats.n_reseeded == 0
        return
    assert stats.n_reseeded == 3
    residual = signals - dense_code(code.indices, code.coeffs, 12) @ atoms
    worst = residual.norm(dim=1).argsort(descending=True)[:3]
    torch.testing.assert_close(
        atoms[9:], torch.nn.functional.normalize(residual[worst], dim=1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("init", ["svd", "columns", "random"])
def test_mod_alternation_lowers_the_error(init):
    weight, gram = problem()
    signals = whiten_gram(gram, "layer").whiten(weight).float()
    result = learn(
        signals, 32, 16, LearnOptions(update="mod", init=init, iterations=6, tolerance=0)
    )
    errors = [step.error_after_update for step in result.history]
    assert all(
        step.error_after_update <= step.error_after_coding * (1 + 1e-6) for step in result.history
    )
    assert errors[-1] < errors[0]
    torch.testing.assert_close(result.atoms.norm(dim=1), torch.ones(32))


def test_exact_rank_one_ends_no_higher_than_one_power_iteration_after_one_update():
    """From the same code, the best rank-1 term of the first atom lowers the error at least as far."""
    weight, gram = problem()
    signals = whiten_gram(gram, "layer").whiten(weight).float()
    errors = {}
    for power_iterations in (0, 1, 50):
        options = LearnOptions(
            iterations=1, block_size=1, sweeps=1, power_iterations=power_iterations
        )
        errors[power_iterations] = learn(signals, 32, 16, options).history[0].error_after_update
    assert errors[0] < errors[1]
    assert errors[0] == pytest.approx(errors[50], rel=1e-3)


def test_top_support_takes_the_largest_and_breaks_ties_low():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert top_support(scores, 2).tolist() == [[0, 2], [0, 1]]
    with pytest.raises(InputError, match="sparsity"):
        top_support(scores, 5)


def test_float_factor_multiplies_out_both_kinds_of_atoms():
    dictionary = torch.randn(3, 2, dtype=torch.float64)
    factor = FloatFactor(
        dictionary, torch.tensor([[0, 3], [2, 4]]).int(), torch.tensor([[2.0, 3.0], [4.0, 5.0]]), 3
    )
    expected = torch.stack([3 * dictionary[:, 0], 5 * dictionary[:, 1]])
    expected[0, 0] += 2
    expected[1, 2] += 4
    torch.testing.assert_close(factor.dense_weight(), expected)
    assert (factor.d_in, factor.d_out, factor.n_atoms, factor.sparsity) == (3, 2, 2, 2)
    assert not factor.full_support
    with pytest.raises(InputError, match="n_identity"):
        FloatFactor(dictionary, factor.indices, factor.coeffs, 2)
    with pytest.raises(InputError, match="coeffs"):
        FloatFactor(dictionary, factor.indices, factor.coeffs[:, :1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("solver", "lasso"),
        ("init", "zeros"),
        ("update", "svd"),
        ("iterations", -1),
        ("power_iterations", -1),
        ("sweeps", 0),
        ("tolerance", 1.0),
        ("block_size", 2.5),
        ("coding_batch", -1),
    ],
)
def test_bad_options_name_the_argument(key, value):
    with pytest.raises(InputError, match=key):
        LearnOptions(**{key: value})
