"""Sparse coders against exhaustive search, each other and their own guarantees."""

from __future__ import annotations

import itertools

import pytest
import torch

from cospadi.errors import InputError
from cospadi.learn.coding import SOLVERS, coding_problem, encode, solver_for
from cospadi.learn.coding.iterative import saliency_threshold
from cospadi.learn.refit import solve_on_support

ITERATIVE = ("obs", "niht", "htp", "admm")


def problem(n=40, n_atoms=24, d=32, *, coherence=0.3, seed=0):
    """Signals with a decaying spectrum and mildly coherent atoms of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(d, generator=generator)
    atoms = torch.randn(n_atoms, d, generator=generator) + coherence * common
    atoms *= torch.logspace(-1, 1, n_atoms)[:, None]
    mixing = torch.randn(d, d, generator=generator) * torch.arange(1, d + 1) ** -0.5
    return torch.randn(n, d, generator=generator) @ mixing, atoms


def squared_errors(signals, atoms, code):
    return (signals - code.dense(atoms.shape[0]) @ atoms).double().square().sum(1)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sparsity", [1, 7, 24])
def test_a_code_has_exactly_s_ascending_atoms_and_least_squares_coefficients(solver, sparsity):
    signals, atoms = problem()
    code = encode(signals, atoms, sparsity, solver)
    assert code.indices.shape == code.coeffs.shape == (40, sparsity)
    assert code.indices.dtype == torch.int32
    assert bool((code.indices.diff(dim=1) > 0).all())
    for row in range(0, 40, 7):
        chosen = atoms[code.indices[row].long()].double()
        solution = torch.linalg.lstsq(chosen.T, signals[row].double()[:, None]).solution[:, 0]
        best = (signals[row].double() - solution @ chosen).square().sum()
        assert float(squared_errors(signals, atoms, code)[row]) <= float(best) * 1.001 + 1e-6


@pytest.mark.parametrize("solver", ITERATIVE)
def test_close_to_the_best_support(solver):
    """On eight atoms every support can be tried; no coder may be far above the optimum on average."""
    signals, atoms = problem(n=30, n_atoms=8, d=10, seed=3)
    supports = [list(c) for c in itertools.combinations(range(8), 3)]
    errors = []
    for support in supports:
        chosen = atoms[support].double()
        projection = torch.linalg.pinv(chosen) @ chosen
        errors.append((signals.double() - signals.double() @ projection).square().sum(1))
    best = torch.stack(errors).min(0).values
    found = squared_errors(signals, atoms, encode(signals, atoms, 3, solver))
    assert bool((found >= best * (1 - 1e-4)).all())
    assert float(found.mean() / best.mean()) < (1.5 if solver == "niht" else 1.15)


@pytest.mark.parametrize("solver", SOLVERS)
def test_orthogonal_atoms_give_the_largest_coefficients(solver):
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1))).Q
    signals = torch.randn(9, 20, generator=torch.Generator().manual_seed(2))
    code = encode(signals, basis, 6, solver)
    if solver == "admm":  # not exact: the penalty may freeze a support before its last swaps
        lost = squared_errors(signals, basis, code).sum()
        assert (
            float(lost / squared_errors(signals, basis, encode(signals, basis, 6, "omp")).sum())
            < 1.05
        )
        return
    expected = (signals @ basis.T).abs().topk(6).indices.sort().values
    assert torch.equal(code.indices.long(), expected)
    torch.testing.assert_close(code.coeffs, (signals @ basis.T).gather(1, expected))


@pytest.mark.parametrize("solver", ITERATIVE)
def test_the_scale_of_atoms_does_not_matter(solver):
    signals, atoms = problem()
    scales = torch.logspace(-4, 4, 24)[torch.randperm(24)]
    plain, scaled = (encode(signals, a, 9, solver) for a in (atoms, atoms * scales[:, None]))
    assert float((plain.indices == scaled.indices).float().mean()) > 0.99
    same = (plain.indices == scaled.indices).all(1)
    torch.testing.assert_close(
        plain.coeffs[same],
        scaled.coeffs[same] * scales[scaled.indices[same].long()],
        rtol=1e-2,
        atol=1e-4,
    )


@pytest.mark.parametrize("solver", ITERATIVE)
def test_zero_and_dependent_atoms(solver):
    signals, atoms = problem()
    atoms[3] = 0.0
    atoms[8] = atoms[5] * 2.0
    atoms[9] = atoms[5] + atoms[6]
    code = encode(signals, atoms, 10, solver)
    assert bool(torch.isfinite(code.coeffs).all())
    greedy = encode(signals, atoms, 10, "omp")
    ratio = (
        squared_errors(signals, atoms, code).sum() / squared_errors(signals, atoms, greedy).sum()
    )
    assert float(ratio) < {"niht": 2.0, "obs": 1.3}.get(solver, 1.1)


def test_admm_over_identity_atoms_beats_the_saliency_threshold():
    """What it is for: an ill-conditioned Gram, where removing coefficients one by one is far from optimal."""
    generator = torch.Generator().manual_seed(4)
    d = 48
    mixing = torch.randn(d, d, generator=generator) * torch.arange(1, d + 1) ** -1.0
    gram = mixing @ mixing.T + 1e-5 * torch.eye(d)
    factor = torch.linalg.cholesky(gram).T
    weight = torch.randn(64, d, generator=generator)
    signals = weight @ factor.T
    errors = {
        solver: float(
            squared_errors(signals, factor.T, encode(signals, factor.T, 24, solver)).sum()
        )
        for solver in ("obs", "admm")
    }
    assert errors["admm"] < 0.9 * errors["obs"]


def test_a_good_start_helps_admm_or_changes_nothing():
    signals, atoms = problem()
    start = encode(signals, atoms, 9, "ormp").dense(24)
    code = encode(signals, atoms, 9, "admm", start=start)
    plain = encode(signals, atoms, 9, "admm")
    total = squared_errors(signals, atoms, code).sum(), squared_errors(signals, atoms, plain).sum()
    assert float(total[0]) < 1.05 * float(total[1])


def test_auto_looks_at_the_condition():
    signals, atoms = problem()
    assert solver_for(coding_problem(signals, atoms).gram) == "obs"
    atoms[1] = atoms[0] * 1.0001 + 1e-4 * atoms[2]
    assert solver_for(coding_problem(signals, atoms).gram) == "admm"


def test_saliency_is_the_rise_of_the_error():
    """Removing one atom from the full solution costs x_j^2 / (G^-1)_jj."""
    signals, atoms = problem(n=1)
    problem_ = coding_problem(signals, atoms)
    indices, code = saliency_threshold(problem_, 23, ridge=0.0)
    removed = (set(range(24)) - set(indices[0].tolist())).pop()

    def error(keep):
        mask = torch.zeros(1, 24)
        mask[0, keep] = 1.0
        x = solve_on_support(problem_.gram, problem_.correlations, mask, 0 * code, steps=200)
        return float((x @ problem_.gram * x).sum() - 2 * (x * problem_.correlations).sum())

    errors = [error([j for j in range(24) if j != left]) for left in range(24)]
    assert min(range(24), key=errors.__getitem__) == removed


def test_unknown_solver():
    signals, atoms = problem()
    with pytest.raises(InputError, match="solver: expected one of auto, omp"):
        encode(signals, atoms, 3, "lasso")


@pytest.mark.parametrize("sparsity", [0, 25])
@pytest.mark.parametrize("solver", SOLVERS)
def test_sparsity_out_of_range(solver, sparsity):
    signals, atoms = problem()
    with pytest.raises(InputError, match="sparsity"):
        encode(signals, atoms, sparsity, solver)
