"""Laws that orthogonal matching pursuit obeys on any input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.native import omp_encode

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def problems(draw, max_atoms=70):
    """Random atoms of any norm and coherence, possibly more than dimensions, some of them repeated."""
    n_atoms = draw(st.integers(1, max_atoms))
    dim = draw(st.integers(1, 80))
    n_signals = draw(st.integers(1, 5))
    sparsity = draw(st.integers(1, n_atoms))
    decay = draw(st.sampled_from([0.0, 0.5, 1.0]))
    selection = draw(st.sampled_from(["omp", "ormp"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -decay
    atoms = torch.randn(n_atoms, dim, generator=generator, dtype=torch.float64) * scale
    if n_atoms > 3 and draw(st.booleans()):
        atoms[-1] = -2 * atoms[0]
        atoms[1] = 0
    signals = torch.randn(n_signals, dim, generator=generator, dtype=torch.float64) * scale
    return atoms, signals, sparsity, selection


def encode(atoms, signals, sparsity, selection):
    energies = signals.square().sum(1)
    return omp_encode(
        atoms @ atoms.T,
        signals @ atoms.T,
        sparsity,
        signal_energies=energies,
        selection=selection,
        num_threads=1,
    )


def dense_code(result, n_atoms):
    x = torch.zeros(result.indices.shape[0], n_atoms, dtype=torch.float64)
    return x.scatter_(1, result.indices.long(), result.coeffs)


@SETTINGS
@given(problems())
def test_support_and_residual(problem):
    """Exactly s ascending atoms; the reported residual is the true one and orthogonal to the support."""
    atoms, signals, sparsity, selection = problem
    result = encode(atoms, signals, sparsity, selection)
    assert result.indices.shape == (signals.shape[0], sparsity)
    assert (result.indices.diff(dim=1) > 0).all()
    assert (result.indices >= 0).all()
    assert (result.indices < atoms.shape[0]).all()
    assert result.coeffs.isfinite().all()
    residual = signals - dense_code(result, atoms.shape[0]) @ atoms
    energy = signals.square().sum(1)
    torch.testing.assert_close(
        residual.square().sum(1),
        result.residual_energies,
        rtol=1e-5,
        atol=1e-8 * energy.max().item(),
    )
    assert (result.residual_energies <= energy * (1 + 1e-12)).all()


@SETTINGS
@given(problems())
def test_more_atoms_are_never_worse(problem):
    """OMP is greedy: the support for s is contained in the support for s + 1."""
    atoms, signals, sparsity, selection = problem
    if sparsity == 1:
        return
    larger = encode(atoms, signals, sparsity, selection)
    smaller = encode(atoms, signals, sparsity - 1, selection)
    slack = 1e-9 * signals.square().sum(1)
    assert (larger.residual_energies <= smaller.residual_energies + slack).all()
    if larger.n_padded == 0:
        for few, many in zip(smaller.indices.tolist(), larger.indices.tolist(), strict=True):
            assert set(few) < set(many)


@SETTINGS
@given(problems(), st.integers(-20, 20))
def test_scaling_a_signal_scales_its_code(problem, exponent):
    atoms, signals, sparsity, selection = problem
    one = encode(atoms, signals, sparsity, selection)
    scaled = encode(atoms, signals * 2.0**exponent, sparsity, selection)
    assert torch.equal(one.indices, scaled.indices)
    assert torch.equal(one.coeffs * 2.0**exponent, scaled.coeffs)


@SETTINGS
@given(problems(), st.integers(0, 2**31))
def test_signals_are_independent(problem, seed):
    """The order of the signals and their company do not matter, to the bit."""
    atoms, signals, sparsity, selection = problem
    order = torch.randperm(signals.shape[0], generator=torch.Generator().manual_seed(seed))
    gram, correlations = atoms @ atoms.T, signals @ atoms.T
    result = omp_encode(gram, correlations, sparsity, selection=selection)
    permuted = omp_encode(gram, correlations[order], sparsity, selection=selection)
    assert torch.equal(result.indices[order], permuted.indices)
    assert torch.equal(result.coeffs[order], permuted.coeffs)


@SETTINGS
@given(st.integers(1, 60), st.integers(0, 2**31), st.data())
def test_permuting_atoms_permutes_the_code(n_atoms, seed, data):
    generator = torch.Generator().manual_seed(seed)
    sparsity = data.draw(st.integers(1, n_atoms))
    atoms = torch.randn(n_atoms, n_atoms + 20, generator=generator, dtype=torch.float64)
    signals = torch.randn(3, n_atoms + 20, generator=generator, dtype=torch.float64)
    order = torch.randperm(n_atoms, generator=generator)
    code = dense_code(encode(atoms, signals, sparsity, "omp"), n_atoms)
    permuted = dense_code(encode(atoms[order], signals, sparsity, "omp"), n_atoms)
    torch.testing.assert_close(permuted, code[:, order], rtol=1e-8, atol=1e-10)


@SETTINGS
@given(st.integers(1, 60), st.integers(0, 2**31), st.sampled_from(["omp", "ormp"]), st.data())
def test_orthonormal_dictionary_recovers_exactly(dim, seed, selection, data):
    generator = torch.Generator().manual_seed(seed)
    sparsity = data.draw(st.integers(1, dim))
    atoms = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q.T
    code = torch.zeros(4, dim, dtype=torch.float64)
    for row in code:
        chosen = torch.randperm(dim, generator=generator)[:sparsity]
        row[chosen] = torch.rand(sparsity, generator=generator, dtype=torch.float64) + 0.5
    result = encode(atoms.contiguous(), code @ atoms, sparsity, selection)
    torch.testing.assert_close(dense_code(result, dim), code, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("selection", ["omp", "ormp"])
def test_all_atoms_give_the_least_squares_solution(selection):
    generator = torch.Generator().manual_seed(3)
    atoms = torch.randn(30, 50, generator=generator, dtype=torch.float64)
    signals = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    result = encode(atoms, signals, 30, selection)
    exact = torch.linalg.lstsq(atoms.T, signals.T).solution.T
    torch.testing.assert_close(result.coeffs, exact, rtol=1e-9, atol=1e-10)
