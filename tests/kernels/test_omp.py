"""The OMP kernel against the brute-force reference, scikit-learn and SPAMS, and its edge cases."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from cospadi import native
from cospadi.errors import InputError
from cospadi.native import omp_encode
from cospadi.reference import omp_encode_reference

# Coefficients against the float64 reference, relative to the largest one: the Gram's condition number
# (up to about 1e3 here) times the rounding.
TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-10}
DTYPES = [torch.float32, torch.float64]
SELECTIONS = ["omp", "ormp"]


def make_problem(n_atoms, dim, n_signals, *, dtype=torch.float64, seed=0, spectrum=0.2):
    """Unit-norm random atoms with a decaying spectrum, so that they are mildly coherent; float64 Gram."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -spectrum
    atoms = torch.randn(n_atoms, dim, generator=generator, dtype=torch.float64) * scale
    atoms /= atoms.norm(dim=1, keepdim=True)
    signals = torch.randn(n_signals, dim, generator=generator, dtype=torch.float64) * scale
    return atoms.to(dtype), signals.to(dtype)


def encode(atoms, signals, sparsity, **options):
    return omp_encode(
        atoms @ atoms.T,
        signals @ atoms.T,
        sparsity,
        signal_energies=signals.square().sum(1),
        **options,
    )


def assert_valid(result, n_signals, n_atoms, sparsity):
    """Support well formed, everything finite."""
    assert result.indices.shape == result.coeffs.shape == (n_signals, sparsity)
    assert result.indices.dtype == torch.int32
    assert (result.indices.diff(dim=1) > 0).all()
    if n_signals:
        assert result.indices.min() >= 0
        assert result.indices.max() < n_atoms
    assert result.coeffs.isfinite().all()
    assert (result.residual_energies >= 0).all()


def true_residual(atoms, signals, result):
    x = torch.zeros(signals.shape[0], atoms.shape[0], dtype=torch.float64)
    x.scatter_(1, result.indices.long(), result.coeffs.double())
    return (signals.double() - x @ atoms.double()).square().sum(1)


# k around the vector widths (4, 8, 16 lanes, panels of 24 and 48), s = 1 and s = k included.
SIZES = [
    (1, 1, 4),
    (7, 3, 9),
    (15, 7, 20),
    (16, 16, 20),
    (17, 1, 20),
    (31, 15, 40),
    (33, 33, 40),
    (47, 20, 50),
    (49, 24, 50),
    (97, 48, 120),
]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("n_atoms, sparsity, dim", SIZES)
def test_equals_brute_force(n_atoms, sparsity, dim, selection):
    atoms, signals = make_problem(n_atoms, dim, 12)
    result = encode(atoms, signals, sparsity, selection=selection)
    indices, coeffs, residual = omp_encode_reference(
        atoms @ atoms.T,
        signals @ atoms.T,
        sparsity,
        signal_energies=signals.square().sum(1),
        selection=selection,
    )
    assert_valid(result, 12, n_atoms, sparsity)
    assert torch.equal(result.indices, indices)
    torch.testing.assert_close(result.coeffs, coeffs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result.residual_energies, residual, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        true_residual(atoms, signals, result), residual, rtol=1e-9, atol=1e-10
    )
    assert result.n_padded == 0


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("n_atoms, sparsity, dim", SIZES)
def test_float32_codes_as_well_as_the_reference(n_atoms, sparsity, dim, selection):
    """Rounding may exchange atoms of nearly equal score, so the residual is compared, not the support."""
    atoms, signals = make_problem(n_atoms, dim, 12, dtype=torch.float32, seed=1)
    result = encode(atoms, signals, sparsity, selection=selection)
    exact_atoms, exact_signals = atoms.double(), signals.double()
    indices, _, residual = omp_encode_reference(
        exact_atoms @ exact_atoms.T,
        exact_signals @ exact_atoms.T,
        sparsity,
        signal_energies=exact_signals.square().sum(1),
        selection=selection,
    )
    assert_valid(result, 12, n_atoms, sparsity)
    scale = exact_signals.square().sum(1).max().item()
    torch.testing.assert_close(
        true_residual(atoms, signals, result), residual, rtol=1e-2, atol=1e-5 * scale
    )
    torch.testing.assert_close(
        result.residual_energies.double(),
        true_residual(atoms, signals, result),
        rtol=1e-4,
        atol=1e-5 * scale,
    )
    assert (result.indices == indices).all(1).double().mean() > 0.7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_coefficients_are_the_least_squares_solution(selection, dtype):
    atoms, signals = make_problem(60, 80, 10, dtype=dtype)
    result = encode(atoms, signals, 30, selection=selection)
    for signal, indices, coeffs in zip(signals, result.indices, result.coeffs, strict=True):
        chosen = atoms[indices.long()].double()
        exact = torch.linalg.lstsq(chosen.T, signal.double()[:, None]).solution[:, 0]
        error = (coeffs.double() - exact).abs().max() / exact.abs().max()
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("block_size", [2, 5, 8, 24, 64])
def test_block_size_does_not_change_a_bit(block_size, selection, dtype):
    """Speculative rows get the same sums in the same order as in the plain algorithm (block 1)."""
    atoms, signals = make_problem(203, 260, 10, dtype=dtype, spectrum=0.5)
    plain = encode(atoms, signals, 100, selection=selection, block_size=1)
    blocked = encode(atoms, signals, 100, selection=selection, block_size=block_size)
    assert torch.equal(plain.indices, blocked.indices)
    assert torch.equal(plain.coeffs, blocked.coeffs)
    assert torch.equal(plain.residual_energies, blocked.residual_energies)
    assert blocked.n_passes < plain.n_passes
    assert plain.n_rows == 10 * 99


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype):
    atoms, signals = make_problem(90, 100, 33, dtype=dtype)
    one = encode(atoms, signals, 40, num_threads=1)
    two = encode(atoms, signals, 40, num_threads=2)
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.coeffs, two.coeffs)
    assert two.workspace_bytes > one.workspace_bytes


def test_equals_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    atoms, signals = make_problem(48, 64, 16)
    result = encode(atoms, signals, 20)
    codes = linear_model.orthogonal_mp_gram(
        (atoms @ atoms.T).numpy(), (signals @ atoms.T).T.numpy(), n_nonzero_coefs=20
    ).T
    dense = torch.zeros(16, 48, dtype=torch.float64)
    dense.scatter_(1, result.indices.long(), result.coeffs)
    torch.testing.assert_close(dense, torch.from_numpy(codes.copy()), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n_atoms, sparsity, dim", [(48, 20, 64), (128, 64, 160), (60, 1, 60)])
def test_ormp_equals_spams(n_atoms, sparsity, dim):
    spams = pytest.importorskip("spams", reason="SPAMS (spams-bin) is not installed")
    atoms, signals = make_problem(n_atoms, dim, 16, spectrum=0.5)
    result = encode(atoms, signals, sparsity, selection="ormp")
    codes = spams.omp(
        signals.T.numpy().copy(order="F"),
        atoms.T.numpy().copy(order="F"),
        L=sparsity,
        eps=0.0,
        numThreads=1,
    ).T.toarray()
    dense = torch.zeros(16, n_atoms, dtype=torch.float64)
    dense.scatter_(1, result.indices.long(), result.coeffs)
    assert torch.equal(dense != 0, torch.from_numpy(codes != 0))
    torch.testing.assert_close(dense, torch.from_numpy(codes), rtol=1e-8, atol=1e-9)


def test_omp_and_ormp_differ():
    """The two selections must not silently be the same on coherent atoms."""
    atoms, signals = make_problem(60, 60, 20, spectrum=1.0)
    omp = encode(atoms, signals, 20, selection="omp")
    ormp = encode(atoms, signals, 20, selection="ormp")
    assert not torch.equal(omp.indices, ormp.indices)
    assert ormp.residual_energies.mean() < omp.residual_energies.mean()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_signals(dtype):
    result = omp_encode(torch.eye(5, dtype=dtype), torch.empty(0, 5, dtype=dtype), 2)
    assert result.indices.shape == (0, 2)
    assert result.coeffs.shape == (0, 2)
    assert result.residual_energies is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_zero_signal(selection, dtype):
    atoms, _ = make_problem(20, 30, 1, dtype=dtype)
    result = encode(atoms, torch.zeros(3, 30, dtype=dtype), 6, selection=selection)
    assert torch.equal(result.indices, torch.arange(6, dtype=torch.int32).repeat(3, 1))
    assert not result.coeffs.any()
    assert not result.residual_energies.any()
    assert result.n_padded == 0


def test_ties_take_the_lowest_index():
    gram = torch.eye(40)
    correlations = torch.ones(2, 40)
    correlations[1, ::2] = -1.0
    result = omp_encode(gram, correlations, 7)
    assert torch.equal(result.indices, torch.arange(7, dtype=torch.int32).repeat(2, 1))
    assert torch.equal(result.coeffs, correlations[:, :7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_duplicated_atoms_are_chosen_once(selection, dtype):
    base, signals = make_problem(20, 40, 8, dtype=dtype)
    atoms = torch.cat([base, base, -base])
    result = encode(atoms, signals, 20, selection=selection)
    assert_valid(result, 8, 60, 20)
    assert torch.equal((result.indices % 20).sort(1).values, torch.arange(20).int().repeat(8, 1))
    assert result.n_padded == 0
    # All 20 directions are used: the twenty-first atom has to be padding.
    padded = encode(atoms, signals, 23, selection=selection)
    assert_valid(padded, 8, 60, 23)
    assert padded.n_padded == 8 * 3
    assert ((padded.coeffs == 0).sum(1) == 3).all()
    unused = [sorted(set(range(60)) - set(row)) for row in result.indices.tolist()]
    for row, free in zip(padded.indices.tolist(), unused, strict=True):
        assert sorted(set(row) & set(free)) == free[:3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_rank_deficient_gram(selection, dtype):
    atoms, signals = make_problem(64, 24, 8, dtype=dtype)
    result = encode(atoms, signals, 40, selection=selection)
    assert_valid(result, 8, 64, 40)
    assert result.n_padded == 8 * 16
    assert result.coeffs.abs().max() < 1e4
    scale = signals.square().sum(1).max()
    assert (true_residual(atoms, signals, result) < 1e-4 * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_atoms_are_never_chosen(dtype):
    atoms, signals = make_problem(20, 30, 4, dtype=dtype)
    atoms[::3] = 0
    result = encode(atoms, signals, 13)
    assert result.n_padded == 0
    assert not (result.indices % 3 == 0).any()
    full = encode(atoms, signals, 20)
    assert full.n_padded == 4 * 7
    assert not full.coeffs[:, ::3].any()
    all_zero = omp_encode(torch.zeros(4, 4, dtype=dtype), torch.zeros(2, 4, dtype=dtype), 3)
    assert all_zero.n_padded == 6
    assert torch.equal(all_zero.indices, torch.arange(3).int().repeat(2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_and_tiny_signals(dtype):
    """Squares of these correlations overflow or vanish in float32; codes must scale exactly."""
    atoms, signals = make_problem(30, 40, 3, dtype=dtype)
    expected = encode(atoms, signals, 12)
    for exponent in (-90, 70):
        factor = 2.0**exponent
        result = omp_encode(atoms @ atoms.T, (signals @ atoms.T) * factor, 12)
        assert torch.equal(result.indices, expected.indices)
        assert torch.equal(result.coeffs, expected.coeffs * factor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_signals(dtype):
    correlations = torch.zeros(2, 30, dtype=dtype)
    correlations[:, [3, 7]] = torch.finfo(dtype).smallest_normal * 2**-10
    result = omp_encode(torch.eye(30, dtype=dtype), correlations, 2)
    assert torch.equal(result.indices, torch.tensor([[3, 7]] * 2, dtype=torch.int32))
    assert torch.equal(result.coeffs, correlations[:, [3, 7]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_non_contiguous_inputs(dtype):
    atoms, signals = make_problem(20, 30, 6, dtype=dtype)
    gram, correlations = atoms @ atoms.T, signals @ atoms.T
    expected = omp_encode(gram, correlations, 8)
    wide = torch.full((20, 33), torch.nan, dtype=dtype)
    wide[:, :20] = gram
    transposed = correlations.T.contiguous().T
    result = omp_encode(wide[:, :20], transposed, 8)
    assert torch.equal(result.indices, expected.indices)
    assert torch.equal(result.coeffs, expected.coeffs)
    every_other = omp_encode(gram, correlations[::2], 8)
    assert torch.equal(every_other.coeffs, expected.coeffs[::2])


def test_workspace_is_bounded():
    atoms, signals = make_problem(64, 80, 40)
    few = encode(atoms, signals[:2], 32, num_threads=1)
    many = encode(atoms, signals, 32, num_threads=1)
    assert few.workspace_bytes == many.workspace_bytes


def nan_at(tensor, *position):
    tensor = tensor.clone()
    tensor[position] = float("nan")
    return tensor


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gram": torch.eye(4)[:3]}, r"gram: expected shape \[3, 3\], got \[3, 4\]"),
        ({"gram": torch.eye(4).half()}, "gram: expected float32 or float64, got float16"),
        ({"gram": torch.eye(4).to_sparse()}, "gram: expected a strided CPU tensor"),
        ({"correlations": torch.ones(2, 5)}, r"correlations: expected shape \[\*, 4\]"),
        (
            {"correlations": torch.ones(2, 4).double()},
            "correlations: expected float32, got float64",
        ),
        ({"sparsity": 0}, "sparsity: expected 1 to n_atoms = 4, got 0"),
        ({"sparsity": 5}, "sparsity: expected 1 to n_atoms = 4, got 5"),
        ({"selection": "mp"}, "selection: expected 'omp' or 'ormp', got 'mp'"),
        ({"num_threads": 0}, "num_threads: expected at least 1"),
        ({"block_size": -1}, "block_size: expected 0"),
        ({"signal_energies": torch.ones(3)}, r"signal_energies: expected shape \[2\], got \[3\]"),
        ({"gram": nan_at(torch.eye(4), 1, 2)}, r"gram: element \[1, 2\] is not finite"),
        ({"gram": -torch.eye(4)}, "gram: diagonal element 0 is negative"),
        (
            {"correlations": nan_at(torch.ones(2, 4), 1, 3)},
            r"correlations: element \[1, 3\] is not finite",
        ),
        (
            {"signal_energies": nan_at(torch.ones(2), 1)},
            r"signal_energies: element \[1\] is not finite",
        ),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {"gram": torch.eye(4), "correlations": torch.ones(2, 4), "sparsity": 2} | change
    with pytest.raises(InputError, match=message):
        omp_encode(**arguments)


ISA_SCRIPT = """
import sys, torch
from cospadi import native
assert native.runtime_info()["isa"] == sys.argv[2], native.runtime_info()
results = []
for problem in torch.load(sys.argv[1]):
    result = native.omp_encode(*problem["arguments"], selection=problem["selection"])
    results.append((result.indices, result.coeffs))
torch.save(results, sys.argv[1] + ".out")
"""


@pytest.mark.parametrize("isa", native.runtime_info()["available_isas"])
def test_every_instruction_set(isa, tmp_path):
    problems = []
    for n_atoms, sparsity, dim in [*SIZES, (203, 100, 260)]:
        for dtype in DTYPES:
            for selection in SELECTIONS:
                atoms, signals = make_problem(n_atoms, dim, 5, dtype=dtype)
                arguments = (atoms @ atoms.T, signals @ atoms.T, sparsity)
                problems.append({"arguments": arguments, "selection": selection})
    path = tmp_path / "problems.pt"
    torch.save(problems, path)
    subprocess.run(
        [sys.executable, "-c", ISA_SCRIPT, str(path), isa],
        check=True,
        env={**os.environ, "COSPADI_ISA": isa},
    )
    for problem, (indices, coeffs) in zip(problems, torch.load(f"{path}.out"), strict=True):
        expected = omp_encode(*problem["arguments"], selection=problem["selection"])
        same = (indices == expected.indices).all(1)
        # Fused and unfused products round differently, so nearly equal scores may change places.
        assert same.all() if coeffs.dtype == torch.float64 else same.double().mean() > 0.5
        torch.testing.assert_close(
            coeffs[same],
            expected.coeffs[same],
            rtol=TOLERANCE[coeffs.dtype],
            atol=TOLERANCE[coeffs.dtype],
        )


def test_unknown_instruction_set_lists_what_is_there():
    script = "from cospadi import native; native.runtime_info()"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "COSPADI_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "COSPADI_ISA=mmx" in done.stderr
    assert "generic" in done.stderr
