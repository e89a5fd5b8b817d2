"""Sparse coding without a model: against scikit-learn, and by what must hold."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp
from sklearn.utils.estimator_checks import parametrize_with_checks

import cospadi
from cospadi.errors import InputError
from cospadi.sparse_coding import BATCH

RTOL = {np.float32: 2e-4, np.float64: 1e-10}
"""Relative to the largest coefficient; triangular solves of ten well conditioned atoms lose a digit or two."""


def problem(dtype=np.float64, n_atoms=48, n_features=24, n_signals=40, seed=0):
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((n_atoms, n_features))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    return atoms.astype(dtype), rng.standard_normal((n_signals, n_features)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sparsity", [1, 4, 10])
def test_omp_is_scikit_learns(dtype, sparsity):
    atoms, signals = problem(dtype)
    code = cospadi.omp(atoms, signals, sparsity)
    theirs = orthogonal_mp(
        atoms.T.astype(np.float64), signals.T.astype(np.float64), n_nonzero_coefs=sparsity
    ).T
    found = code.dense()
    assert found.dtype == code.coeffs.dtype == dtype and code.indices.dtype == np.int32
    assert found.shape == theirs.shape
    np.testing.assert_allclose(found, theirs, atol=RTOL[dtype] * np.abs(theirs).max())


def test_ormp_never_loses_more_than_omp_at_its_first_difference():
    atoms, signals = problem()
    errors = {
        selection: np.linalg.norm(
            signals - cospadi.omp(atoms, signals, 6, selection=selection).dense() @ atoms
        )
        for selection in ("omp", "ormp")
    }
    assert errors["ormp"] < errors["omp"]


def test_arrays_give_arrays_and_tensors_give_tensors():
    atoms, signals = problem(np.float32)
    ours = cospadi.omp(torch.from_numpy(atoms), torch.from_numpy(signals), 5)
    assert isinstance(ours.coeffs, torch.Tensor) and isinstance(ours.dense(), torch.Tensor)
    theirs = cospadi.omp(atoms, signals, 5)
    assert isinstance(theirs.coeffs, np.ndarray) and isinstance(theirs.dense(), np.ndarray)
    np.testing.assert_array_equal(ours.dense().numpy(), theirs.dense())
    learned = cospadi.ksvd(torch.from_numpy(signals), 8, 2, iterations=2)
    assert isinstance(learned.atoms, torch.Tensor) and isinstance(
        learned.code.indices, torch.Tensor
    )


def test_layouts_of_numpy_do_not_matter():
    atoms, signals = problem()
    expected = cospadi.omp(atoms, signals, 5).dense()
    read_only = signals.copy()
    read_only.flags.writeable = False
    backwards = np.ascontiguousarray(signals[:, ::-1])[:, ::-1]
    for given in (read_only, backwards, np.asfortranarray(signals), signals.astype(">f8")):
        np.testing.assert_allclose(cospadi.omp(atoms, given, 5).dense(), expected, atol=1e-12)
    whole = np.eye(3, dtype=np.int64)
    np.testing.assert_array_equal(cospadi.omp(whole, 2 * whole, 1).dense(), 2.0 * whole)


def test_batches_change_nothing():
    atoms, _ = problem(n_atoms=6, n_features=4)
    signals = np.random.default_rng(1).standard_normal((BATCH + 3, 4))
    code = cospadi.omp(atoms, signals, 2)
    assert code.indices.shape == (BATCH + 3, 2)
    tail = cospadi.omp(atoms, signals[-5:], 2)
    np.testing.assert_array_equal(code.indices[-5:], tail.indices)
    np.testing.assert_allclose(code.coeffs[-5:], tail.coeffs, atol=1e-12)
    assert cospadi.omp(atoms, signals[:0], 2).dense().shape == (0, 6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ksvd_states_its_error_and_finds_planted_atoms(dtype):
    rng = np.random.default_rng(3)
    planted, _ = problem(np.float64, n_atoms=20, n_features=16, seed=5)
    code = np.zeros((1500, 20))
    for row in code:
        row[rng.choice(20, 2, replace=False)] = rng.choice([-1, 1], 2) * rng.uniform(0.5, 2, 2)
    signals = (code @ planted).astype(dtype)
    found = cospadi.ksvd(signals, 20, 2, iterations=60, seed=3)
    assert found.atoms.dtype == dtype
    rest = signals - found.code.dense() @ found.atoms
    stated = np.linalg.norm(rest) / np.linalg.norm(signals)
    assert found.errors[-1] == pytest.approx(stated, rel=1e-3, abs=1e-5)
    assert found.errors[-1] < 0.5 * found.errors[0]
    np.testing.assert_allclose(np.linalg.norm(found.atoms, axis=1), 1.0, atol=1e-5)
    # K-SVD ends in a local minimum: 14 to 20 of the 20 are found, by seed; by chance none would be
    closest = np.abs(found.atoms @ planted.T).max(0)
    assert (closest > 0.99).sum() >= 16


def test_ksvd_is_repeatable_starts_where_it_is_told_and_stops_when_told():
    _, signals = problem(n_signals=200)
    first, again = (cospadi.ksvd(signals, 30, 3, iterations=4, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.atoms, again.atoms)
    assert not np.array_equal(first.atoms, cospadi.ksvd(signals, 30, 3, iterations=4, seed=8).atoms)
    before = first.atoms.copy()
    further = cospadi.ksvd(signals, 30, 3, iterations=2, atoms=first.atoms)
    np.testing.assert_array_equal(first.atoms, before)  # not changed in place
    assert further.errors[-1] < first.errors[0]
    stopped = cospadi.ksvd(signals, 30, 3, iterations=50, tolerance=0.05)
    assert len(stopped.errors) < 50


def test_more_atoms_than_signals_and_signals_of_zeros():
    _, signals = problem(n_signals=5)
    signals[2] = 0.0
    found = cospadi.ksvd(signals, 12, 1, iterations=2)
    assert found.errors[-1] < 1e-6 and np.isfinite(found.atoms).all()
    assert cospadi.ksvd(np.zeros((4, 3)), 2, 1).errors == (0.0,) * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 0}, "^sparsity: expected an integer, 1 to n_atoms = 48, got 0"),
        ({"sparsity": 49}, "^sparsity: expected an integer, 1 to n_atoms = 48, got 49"),
        ({"sparsity": 3.0}, r"^sparsity: expected an integer, 1 to n_atoms = 48, got 3\.0"),
        ({"sparsity": True}, "^sparsity: expected an integer, .* got True"),
        ({"num_threads": 1.5}, "^num_threads: expected an integer of at least 1"),
        ({"selection": "mp"}, "^selection: expected 'omp' or 'ormp'"),
        ({"signals": np.zeros((3, 5))}, "atoms: expected 5 features as in the signals, got 24"),
        ({"signals": np.zeros(24)}, r"signals: expected a matrix, got shape \(24,\)"),
        (
            {"signals": np.zeros((3, 24), np.float32)},
            "atoms: expected the type of the signals, float32, got float64; convert",
        ),
        ({"signals": torch.zeros((3, 24)).double()}, "^atoms: .* signals, Tensor, got ndarray"),
        ({"signals": np.full((3, 24), np.nan)}, "^signals: hold values that are not finite"),
        ({"signals": np.full((3, 24), 1.7e308)}, "^signals: too large"),
        ({"atoms": np.full((9, 24), np.inf)}, "^atoms: hold values that are not finite"),
        ({"atoms": np.full((9, 24), 1e200)}, "^atoms: too large, their products overflow"),
        ({"signals": np.zeros((3, 24), complex)}, "signals: expected real numbers, got complex128"),
        ({"signals": torch.zeros((3, 24)).half()}, "signals: expected float32 or float64"),
    ],
)
def test_bad_input_is_named(change, message):
    atoms, signals = problem()
    with pytest.raises(InputError, match=message):
        cospadi.omp(**{"atoms": atoms, "signals": signals, "sparsity": 3, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_atoms": 0}, "n_atoms: expected an integer of at least 1"),
        ({"n_atoms": 8.0}, r"^n_atoms: expected an integer of at least 1, got 8\.0"),
        ({"sparsity": 9}, "^sparsity: expected an integer, 1 to n_atoms = 8, got 9"),
        ({"sparsity": 2.5}, "^sparsity: expected an integer"),
        ({"seed": 1.5}, r"^seed: expected an integer of at least 0, got 1\.5"),
        ({"seed": 2**63}, r"^seed: expected an integer in \[0, 2\^63\)"),
        ({"sweeps": 1.0}, "^sweeps: expected an integer of at least 1"),
        ({"power_iterations": -1}, "^power_iterations: expected an integer of at least 0"),
        ({"block_size": "64"}, "^block_size: expected an integer of at least 1"),
        (
            {"signals": np.zeros((0, 24))},
            r"^signals: expected at least one value, got shape \(0, 24\)",
        ),
        ({"signals": np.full((3, 24), 1e200)}, "^signals: too large, their squares overflow"),
        ({"signals": np.full((3, 24), 1e25, np.float32)}, "^signals: too large, their squares"),
        ({"atoms": torch.eye(24)[:8].double()}, "^atoms: .* signals, ndarray, got Tensor"),
        ({"iterations": 0}, "iterations: expected an integer of at least 1"),
        ({"atoms": np.eye(24)}, "atoms: expected n_atoms = 8 rows, got 24"),
        ({"signals": np.full((3, 24), np.inf)}, "signals: hold values that are not finite"),
    ],
)
def test_bad_settings_of_ksvd_are_named(change, message):
    _, signals = problem()
    with pytest.raises(InputError, match=message):
        cospadi.ksvd(**{"signals": signals, "n_atoms": 8, "sparsity": 2, **change})


def test_numpy_integers_are_integers():
    atoms, signals = problem()
    expected = cospadi.omp(atoms, signals, 3).dense()
    np.testing.assert_array_equal(cospadi.omp(atoms, signals, np.int64(3)).dense(), expected)
    learned = cospadi.ksvd(signals, np.int32(8), np.int64(2), iterations=2, seed=np.int64(1))
    again = cospadi.ksvd(signals, 8, 2, iterations=2, seed=1)
    np.testing.assert_array_equal(learned.atoms, again.atoms)
    assert type(learned.code.n_atoms) is int


# ---- scikit-learn ---------------------------------------------------------------------


@parametrize_with_checks([cospadi.SparseDictionary(), cospadi.SparseDictionary(5, 2, iterations=3)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_the_estimator_is_ksvd_and_omp():
    _, signals = problem(n_signals=300)
    model = cospadi.SparseDictionary(32, 3, iterations=5, random_state=0).fit(signals)
    code = model.transform(signals)
    assert model.n_iter_ == len(model.errors_) == 5 and code.shape == (300, 32)
    assert ((code != 0).sum(1) <= 3).all()
    error = np.linalg.norm(signals - model.inverse_transform(code)) / np.linalg.norm(signals)
    assert error == pytest.approx(model.errors_[-1], rel=0.1)
    assert list(model.get_feature_names_out()[:2]) == ["sparsedictionary0", "sparsedictionary1"]
    given = cospadi.SparseDictionary(32, 3, iterations=5, random_state=0).fit(
        torch.from_numpy(signals)
    )
    np.testing.assert_array_equal(given.components_, model.components_)


def test_without_scikit_learn_the_rest_works_and_the_estimator_says_what_is_missing():
    program = """
import sys
sys.modules["sklearn"] = None
import numpy, cospadi
print(cospadi.omp(numpy.eye(3), numpy.eye(3), 1).coeffs.sum())
try:
    cospadi.SparseDictionary
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("3.0\n") and 'pip install "scikit-learn>=1.6"' in done.stdout
