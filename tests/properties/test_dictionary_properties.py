"""Laws that the atom update obeys on any input."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.native import omp_encode, update_atoms

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def problems(draw):
    """Random signals, atoms that need not have unit norm, arbitrary supports and coefficients."""
    n_signals = draw(st.integers(1, 40))
    dim = draw(st.integers(1, 40))
    n_atoms = draw(st.integers(1, 40))
    sparsity = draw(st.integers(1, n_atoms))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    atoms = torch.randn(n_atoms, dim, generator=generator, dtype=torch.float64)
    signals = torch.randn(n_signals, dim, generator=generator, dtype=torch.float64)
    order = torch.rand(n_signals, n_atoms, generator=generator).argsort(1)
    indices = order[:, :sparsity].sort(1).values.int()
    coeffs = torch.randn(n_signals, sparsity, generator=generator, dtype=torch.float64)
    return atoms, signals, indices, coeffs


def objective(atoms, signals, indices, coeffs):
    x = torch.zeros(signals.shape[0], atoms.shape[0], dtype=torch.float64)
    x.scatter_(1, indices.long(), coeffs)
    return (signals - x @ atoms).square().sum().item()


@SETTINGS
@given(problems(), st.sampled_from([1, 3, 64]), st.integers(0, 3), st.integers(1, 2))
def test_objective_never_increases(problem, block_size, power_iterations, sweeps):
    atoms, signals, indices, coeffs = problem
    before = objective(*problem)
    stats = update_atoms(
        *problem, block_size=block_size, power_iterations=power_iterations, sweeps=sweeps
    )
    after = objective(atoms, signals, indices, coeffs)
    noise = 1e-10 * (before + signals.square().sum().item())
    assert after <= before + noise
    assert abs(stats.objective_before - before) <= noise
    assert abs(stats.objective_after - after) <= noise


@SETTINGS
@given(problems(), st.sampled_from([1, 3, 64]))
def test_used_atoms_have_unit_norm(problem, block_size):
    atoms, _, indices, _ = problem
    update_atoms(*problem, block_size=block_size)
    norms = atoms[indices.unique().long()].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-12)


@SETTINGS
@given(problems(), st.sampled_from([1, 3]), st.integers(-10, 10))
def test_scaling_the_problem_scales_the_coefficients(problem, block_size, exponent):
    atoms, signals, indices, coeffs = problem
    factor = 2.0**exponent
    scaled_atoms, scaled_coeffs = atoms.clone(), coeffs * factor
    update_atoms(scaled_atoms, signals * factor, indices, scaled_coeffs, block_size=block_size)
    update_atoms(atoms, signals, indices, coeffs, block_size=block_size)
    torch.testing.assert_close(scaled_atoms, atoms, rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled_coeffs, coeffs * factor, rtol=1e-10, atol=1e-12 * factor)


@SETTINGS
@given(st.integers(0, 2**31), st.sampled_from([1, 8]))
def test_alternation_lowers_the_error(seed, block_size):
    """Coding and update in turn, as the learner does: the coded error falls over the iterations."""
    generator = torch.Generator().manual_seed(seed)
    signals = torch.randn(80, 24, generator=generator, dtype=torch.float64)
    atoms = torch.nn.functional.normalize(signals[:20].clone(), dim=1)
    errors = []
    for _ in range(4):
        result = omp_encode(
            atoms @ atoms.T, signals @ atoms.T, 6, signal_energies=signals.square().sum(1)
        )
        errors.append(result.residual_energies.sum().item())
        update_atoms(atoms, signals, result.indices, result.coeffs, block_size=block_size)
    assert errors[-1] < errors[0]
