"""The atom update kernel against the dense reference, its guarantees and its error cases."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cospadi import native
from cospadi.errors import InputError
from cospadi.native import omp_encode, update_atoms
from cospadi.reference import update_atoms_reference

DTYPES = [torch.float32, torch.float64]
# Largest difference of atoms and of coefficients (about 5 in size) from the float64 reference: a few
# hundred roundings, from sums over some dozen signals and several power iterations.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def make_problem(n_signals, dim, n_atoms, sparsity, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(n_atoms, dim, generator=generator, dtype=torch.float64)
    atoms /= atoms.norm(dim=1, keepdim=True)
    signals = torch.randn(n_signals, dim, generator=generator, dtype=torch.float64)
    codes = omp_encode(atoms @ atoms.T, signals @ atoms.T, sparsity)
    return atoms.to(dtype), signals.to(dtype), codes.indices, codes.coeffs.to(dtype)


def objective(atoms, signals, indices, coeffs):
    x = torch.zeros(signals.shape[0], atoms.shape[0], dtype=torch.float64)
    x.scatter_(1, indices.long(), coeffs.double())
    return (signals.double() - x @ atoms.double()).square().sum().item()


SIZES = [(1, 1, 1, 1), (7, 3, 5, 1), (30, 17, 33, 7), (50, 33, 31, 15), (90, 64, 48, 48)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power_iterations, sweeps", [(1, 1), (1, 3), (4, 1)])
@pytest.mark.parametrize("block_size", [1, 2, 7, 64])
@pytest.mark.parametrize("n_signals, dim, n_atoms, sparsity", SIZES)
def test_equals_reference(
    n_signals, dim, n_atoms, sparsity, block_size, power_iterations, sweeps, dtype
):
    atoms, signals, indices, coeffs = make_problem(n_signals, dim, n_atoms, sparsity, dtype=dtype)
    options = {
        "block_size": block_size,
        "power_iterations": power_iterations,
        "sweeps": sweeps,
    }
    expected_atoms, expected_coeffs = update_atoms_reference(
        atoms, signals, indices, coeffs, **options
    )
    before = objective(atoms, signals, indices, coeffs)
    stats = update_atoms(atoms, signals, indices, coeffs, **options)
    tolerance = {"rtol": 0.0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(atoms.double(), expected_atoms, **tolerance)
    torch.testing.assert_close(coeffs.double(), expected_coeffs, **tolerance)
    after = objective(atoms, signals, indices, coeffs)
    slack = {"rel": 100 * TOLERANCE[dtype], "abs": 1e3 * TOLERANCE[dtype] ** 2 * n_signals}
    assert stats.objective_before == pytest.approx(before, **slack)
    assert stats.objective_after == pytest.approx(after, **slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_objective_never_increases(block_size, dtype):
    atoms, signals, indices, coeffs = make_problem(120, 40, 64, 12, dtype=dtype)
    previous = objective(atoms, signals, indices, coeffs)
    for _ in range(5):
        stats = update_atoms(atoms, signals, indices, coeffs, block_size=block_size)
        assert stats.objective_after <= stats.objective_before * (1 + 1e-6)
        now = objective(atoms, signals, indices, coeffs)
        assert now <= previous * (1 + 1e-6)
        previous = now
    torch.testing.assert_close(
        atoms.norm(dim=1), torch.ones(64, dtype=dtype), rtol=0, atol=TOLERANCE[dtype]
    )


def test_overshooting_blocks_are_halved():
    """All atoms in one block against unstructured signals correct the same residual many times over."""
    atoms, signals, indices, coeffs = make_problem(30, 17, 33, 7)
    stats = update_atoms(atoms, signals, indices, coeffs, block_size=64)
    assert stats.n_halved > 0
    assert stats.objective_after < stats.objective_before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "block_size, size",
    [(16, (300, 257, 64, 31)), (1, (4400, 512, 4, 2))],  # sequential: enough rows for threads
)
def test_threads_do_not_change_a_bit(block_size, size, dtype):
    results = []
    for num_threads in (1, 2):
        atoms, signals, indices, coeffs = make_problem(*size, dtype=dtype)
        update_atoms(
            atoms, signals, indices, coeffs, block_size=block_size, num_threads=num_threads
        )
        results.append((atoms, coeffs))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def with_unused_atoms(dtype):
    """Atoms 0, 5 and 9 of 12 are used by nobody."""
    atoms, signals, _, _ = make_problem(20, 16, 12, 3, dtype=dtype)
    allowed = torch.tensor([1, 2, 3, 4, 6, 7, 8, 10, 11])
    gram = atoms[allowed] @ atoms[allowed].T
    codes = omp_encode(gram, signals @ atoms[allowed].T, 3)
    return atoms, signals, allowed[codes.indices.long()].int(), codes.coeffs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4])
def test_unused_atoms_are_skipped(block_size, dtype):
    atoms, signals, indices, coeffs = with_unused_atoms(dtype)
    old = atoms.clone()
    stats = update_atoms(atoms, signals, indices, coeffs, block_size=block_size)
    assert stats.n_unused == 3
    assert stats.n_reseeded == 0
    assert torch.equal(atoms[[0, 5, 9]], old[[0, 5, 9]])
    assert not torch.equal(atoms[1], old[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4])
def test_unused_atoms_are_reseeded(block_size, dtype):
    atoms, signals, indices, coeffs = with_unused_atoms(dtype)
    options = {"block_size": block_size, "unused": "reseed"}
    expected, _ = update_atoms_reference(atoms, signals, indices, coeffs, **options)
    stats = update_atoms(atoms, signals, indices, coeffs, **options)
    assert stats.n_unused == stats.n_reseeded == 3
    torch.testing.assert_close(atoms.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    # Each signal serves once, so the new atoms differ.
    assert torch.pdist(atoms[[0, 5, 9]]).min() > 0.1


@pytest.mark.parametrize("block_size", [1, 4])
def test_more_unused_atoms_than_signals(block_size):
    atoms, signals, indices, coeffs = make_problem(2, 8, 12, 2)
    stats = update_atoms(atoms, signals, indices, coeffs, block_size=block_size, unused="reseed")
    assert stats.n_unused >= 8
    assert stats.n_reseeded <= 2
    assert atoms.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4])
def test_zero_update_leaves_the_atom(block_size, dtype):
    """Coefficients of zero give a direction of norm zero."""
    atoms, signals, indices, coeffs = make_problem(20, 16, 12, 3, dtype=dtype)
    coeffs[indices == 4] = 0
    old = atoms[4].clone()
    update_atoms(atoms, signals, indices, coeffs, block_size=block_size)
    assert torch.equal(atoms[4], old)
    assert not coeffs[indices == 4].any()
    zeros = torch.zeros_like(signals)
    none = torch.zeros_like(coeffs)
    kept = atoms.clone()
    stats = update_atoms(atoms, zeros, indices, none, block_size=block_size)
    assert torch.equal(atoms, kept)
    assert stats.objective_before == stats.objective_after == 0.0


@pytest.mark.parametrize("block_size", [1, 4])
def test_only_coefficients_on_the_support_change(block_size):
    atoms, signals, indices, coeffs = make_problem(20, 16, 12, 3)
    old_indices, old_signals = indices.clone(), signals.clone()
    update_atoms(atoms, signals, indices, coeffs, block_size=block_size)
    assert torch.equal(indices, old_indices)
    assert torch.equal(signals, old_signals)
    assert coeffs.shape == (20, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recovers_a_rank_one_matrix(dtype):
    """One atom, one coefficient per signal: the update is the power method on the signals."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(40, 1, generator=generator, dtype=dtype)
    right = torch.randn(1, 20, generator=generator, dtype=dtype)
    signals = left @ right
    atoms = torch.ones(1, 20, dtype=dtype) / 20**0.5
    indices = torch.zeros(40, 1, dtype=torch.int32)
    coeffs = signals @ atoms.T
    stats = update_atoms(atoms, signals, indices, coeffs, power_iterations=3)
    assert stats.objective_after <= 1e-9 * stats.objective_before


def with_gaps(n_signals, dim, n_atoms, sparsity, dtype):
    """Signals made of few planted atoms, and atoms near them: every E has a first singular value well apart."""
    generator = torch.Generator().manual_seed(1)

    def unit_rows(*shape):
        rows = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return rows / rows.norm(dim=1, keepdim=True)

    planted = torch.linalg.qr(unit_rows(dim, n_atoms)).Q.T
    order = torch.rand(n_signals, n_atoms, generator=generator).argsort(1)
    indices = order[:, :sparsity].sort(1).values
    coeffs = 1 + torch.rand(n_signals, sparsity, generator=generator, dtype=torch.float64)
    signals = (coeffs[:, :, None] * planted[indices]).sum(1)
    signals += 0.05 * torch.randn(n_signals, dim, generator=generator, dtype=torch.float64)
    atoms = planted + 0.1 * unit_rows(n_atoms, dim)
    atoms /= atoms.norm(dim=1, keepdim=True)
    return atoms.to(dtype), signals.to(dtype), indices.int(), coeffs.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_convergence_gives_the_first_singular_vectors(block_size, dtype):
    atoms, signals, indices, coeffs = with_gaps(200, 40, 24, 3, dtype)
    expected_atoms, expected_coeffs = update_atoms_reference(
        atoms, signals, indices, coeffs, power_iterations=0, block_size=block_size
    )
    update_atoms(atoms, signals, indices, coeffs, power_iterations=0, block_size=block_size)
    # At convergence a step is at most the stated 1e-6 or 1e-12, and what is left is of that size.
    tolerance = {"rtol": 0.0, "atol": 5e-6 if dtype == torch.float32 else 5e-12}
    torch.testing.assert_close(atoms.double(), expected_atoms, **tolerance)
    torch.testing.assert_close(coeffs.double(), expected_coeffs, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convergence_is_a_rank_one_optimum(dtype):
    """One atom alone: the error that is left is what the second and later singular values hold."""
    generator = torch.Generator().manual_seed(3)
    signals = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    signals += 5 * torch.outer(torch.randn(30, generator=generator), torch.ones(12)).double()
    signals = signals.to(dtype)
    atoms = torch.eye(1, 12, dtype=dtype)
    indices = torch.zeros(30, 1, dtype=torch.int32)
    stats = update_atoms(atoms, signals, indices, signals @ atoms.T, power_iterations=0)
    expected = torch.linalg.svdvals(signals.double())[1:].square().sum().item()
    assert stats.objective_after == pytest.approx(expected, rel=100 * TOLERANCE[dtype])


@pytest.mark.parametrize("block_size", [1, 8])
def test_convergence_ends_without_a_gap(block_size):
    """Equal singular values: any direction is as good, and the iteration count is bounded."""
    atoms, signals = torch.eye(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    indices = torch.arange(8, dtype=torch.int32).repeat(8, 1)
    coeffs = torch.ones(8, 8, dtype=torch.float64)
    stats = update_atoms(atoms, signals, indices, coeffs, power_iterations=0, block_size=block_size)
    assert atoms.isfinite().all()
    assert stats.objective_after <= stats.objective_before


@pytest.mark.parametrize("block_size", [1, 64])
def test_empty_problems(block_size):
    for n_signals, dim, n_atoms, sparsity in [
        (0, 4, 3, 2),
        (5, 4, 3, 0),
        (0, 0, 0, 0),
        (3, 0, 2, 1),
    ]:
        atoms = torch.ones(n_atoms, dim)
        indices = torch.arange(sparsity, dtype=torch.int32).repeat(n_signals, 1)
        coeffs = torch.ones(n_signals, sparsity)
        signals = torch.ones(n_signals, dim)
        stats = update_atoms(atoms, signals, indices, coeffs, block_size=block_size)
        assert torch.equal(atoms, torch.ones(n_atoms, dim))
        assert stats.n_unused >= n_atoms - sparsity


@pytest.mark.parametrize("block_size", [1, 4])
def test_views_with_row_strides(block_size):
    atoms, signals, indices, coeffs = make_problem(20, 16, 12, 3)
    wide_atoms, wide_coeffs = torch.zeros(12, 20).double(), torch.zeros(20, 5).double()
    wide_atoms[:, :16], wide_coeffs[:, :3] = atoms, coeffs
    transposed = signals.T.contiguous().T
    update_atoms(wide_atoms[:, :16], transposed, indices, wide_coeffs[:, :3], block_size=block_size)
    update_atoms(atoms, signals, indices, coeffs, block_size=block_size)
    assert torch.equal(wide_atoms[:, :16], atoms)
    assert torch.equal(wide_coeffs[:, :3], coeffs)
    assert not wide_atoms[:, 16:].any()
    assert not wide_coeffs[:, 3:].any()


def example():
    return {
        "atoms": torch.eye(3),
        "signals": torch.ones(2, 3),
        "indices": torch.tensor([[0, 1], [1, 2]], dtype=torch.int32),
        "coeffs": torch.ones(2, 2),
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"atoms": torch.eye(3).half()}, "atoms: expected float32 or float64, got float16"),
        ({"signals": torch.ones(2, 4)}, r"signals: expected shape \[\*, 3\], got \[2, 4\]"),
        ({"signals": torch.ones(2, 3).double()}, "signals: expected float32, got float64"),
        ({"indices": torch.zeros(2, 2).long()}, "indices: expected int32, got int64"),
        ({"indices": torch.tensor([[1, 1], [0, 1]]).int()}, r"indices: element \[0, 1\] is 1"),
        ({"indices": torch.tensor([[0, 1], [0, 3]]).int()}, r"indices: element \[1, 1\] is 3"),
        ({"indices": torch.tensor([[-1, 1], [0, 2]]).int()}, r"indices: element \[0, 0\] is -1"),
        ({"coeffs": torch.ones(2, 3)}, r"coeffs: expected shape \[2, 2\], got \[2, 3\]"),
        ({"coeffs": torch.full((2, 2), torch.nan)}, r"coeffs: element \[0, 0\] is not finite"),
        ({"signals": torch.full((2, 3), torch.inf)}, r"signals: element \[0, 0\] is not finite"),
        ({"atoms": torch.eye(3, 6)[:, ::2]}, "atoms: updated in place"),
        ({"power_iterations": -1}, "power_iterations: expected at least 1, or 0 .* got -1"),
        ({"block_size": 0}, "block_size: expected at least 1, got 0"),
        ({"sweeps": 0}, "sweeps: expected at least 1, got 0"),
        ({"unused": "drop"}, "unused: expected 'skip' or 'reseed', got 'drop'"),
        ({"num_threads": -1}, "num_threads: expected at least 1"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(change, message):
    arguments = example() | change
    with pytest.raises(InputError, match=message):
        update_atoms(**arguments)
    untouched = example()
    for name in {"atoms", "coeffs"} - change.keys():
        assert torch.equal(arguments[name], untouched[name])


ISA_SCRIPT = """
import sys, torch
from cospadi import native
assert native.runtime_info()["isa"] == sys.argv[2], native.runtime_info()
problems = torch.load(sys.argv[1])
for problem in problems:
    native.update_atoms(*problem["arguments"], block_size=problem["block_size"], power_iterations=2)
torch.save(problems, sys.argv[1] + ".out")
"""


@pytest.mark.parametrize("isa", native.runtime_info()["available_isas"])
def test_every_instruction_set(isa, tmp_path):
    problems = [
        {"arguments": make_problem(*size, dtype=dtype), "block_size": block_size}
        for size in SIZES
        for dtype in DTYPES
        for block_size in (1, 8)
    ]
    path = tmp_path / "problems.pt"
    torch.save(problems, path)
    subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT, str(path), isa],
        check=True,
        env={**os.environ, "COSPADI_ISA": isa},
    )
    for problem, done in zip(problems, torch.load(f"{path}.out"), strict=True):
        atoms = problem["arguments"][0]
        expected_atoms, expected_coeffs = update_atoms_reference(
            *problem["arguments"], block_size=problem["block_size"], power_iterations=2
        )
        tolerance = {"rtol": 0.0, "atol": TOLERANCE[atoms.dtype]}
        torch.testing.assert_close(done["arguments"][0].double(), expected_atoms, **tolerance)
        torch.testing.assert_close(done["arguments"][3].double(), expected_coeffs, **tolerance)
