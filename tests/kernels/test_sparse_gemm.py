"""The column-sparse GEMM against float64 torch: every shape, dtype, stride; errors; properties."""

from __future__ import annotations

import itertools

import pytest
import torch
from sparse_problems import FLOATS, assert_close, dense_of, make_problem

from cospadi import native
from cospadi.errors import InputError
from cospadi.reference import sparse_gemm_reference

ROWS = (0, 1, 2, 3, 7, 8, 9, 33, 130)
ATOMS = (1, 7, 8, 31, 32, 33, 64, 100, 488)
D_OUT = (1, 5, 16, 17, 100)


def sparsities(n_atoms):
    return sorted({1, max(1, n_atoms // 2), n_atoms})


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("n_atoms", ATOMS)
def test_matches_the_reference(rows, n_atoms):
    for d_out, sparsity in itertools.product(D_OUT, sparsities(n_atoms)):
        z, mask, coeffs, bias = make_problem(rows, n_atoms, d_out, sparsity)
        expected = sparse_gemm_reference(z, mask, coeffs, bias)
        y = native.sparse_gemm(z, mask, coeffs, bias, num_threads=1)
        assert_close(y, z, mask, coeffs, bias)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("coeffs_dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 33, 70])
def test_every_pair_of_dtypes(rows, dtype, coeffs_dtype):
    for n_atoms in (7, 33, 488):
        for sparsity in sparsities(n_atoms):
            z, mask, coeffs, bias = make_problem(
                rows, n_atoms, 37, sparsity, dtype=dtype, coeffs_dtype=coeffs_dtype
            )
            y = native.sparse_gemm(z, mask, coeffs, bias, num_threads=1)
            assert_close(y, z, mask, coeffs, bias)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("coeffs_dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 8, 50])
def test_integers_give_equality(rows, dtype, coeffs_dtype):
    """Sums of small integers are exact, so the only rounding is the last one."""
    problem = make_problem(rows, 300, 65, 150, dtype=dtype, coeffs_dtype=coeffs_dtype, exact=True)
    z, mask, coeffs, bias = problem
    expected = z.double() @ dense_of(mask, coeffs, 300) + bias.double()
    assert torch.equal(native.sparse_gemm(*problem), expected.to(dtype))


def test_more_rows_than_one_block():
    z, mask, coeffs, bias = make_problem(1300, 96, 40, 48, exact=True)
    expected = z.double() @ dense_of(mask, coeffs, 96) + bias.double()
    assert torch.equal(native.sparse_gemm(z, mask, coeffs, bias).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coeffs_dtype", FLOATS)
@pytest.mark.parametrize("rows", [2, 7, 19, 32])
def test_more_atoms_than_stay_in_the_cache(rows, dtype, coeffs_dtype):
    for n_atoms, sparsity in ((1027, 5), (1027, 1027), (3032, 800)):
        problem = make_problem(
            rows, n_atoms, 70, sparsity, dtype=dtype, coeffs_dtype=coeffs_dtype, exact=True
        )
        z, mask, coeffs, bias = problem
        expected = (z.double() @ dense_of(mask, coeffs, n_atoms) + bias.double()).to(dtype)
        assert torch.equal(native.sparse_gemm(*problem), expected)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", FLOATS)
def test_thread_count_changes_no_bit(rows, dtype):
    # wide enough that one row is worth several threads
    problem = make_problem(rows, 321, 6401, 160, dtype=dtype, coeffs_dtype=torch.bfloat16)
    first = native.sparse_gemm(*problem, num_threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(native.sparse_gemm(*problem, num_threads=threads), first)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_layouts_of_z(rows):
    z, mask, coeffs, bias = make_problem(rows, 65, 20, 30, dtype=torch.bfloat16)
    expected = native.sparse_gemm(z, mask, coeffs, bias)
    wide = torch.full((rows, 80), float("nan"), dtype=z.dtype)
    wide[:, 7:72] = z
    repeated = z[:1].expand(rows, 65)  # row stride 0
    assert torch.equal(native.sparse_gemm(wide[:, 7:72], mask, coeffs, bias), expected)
    assert torch.equal(native.sparse_gemm(z.T.contiguous().T, mask, coeffs, bias), expected)
    every_other = native.sparse_gemm(z[::2].contiguous(), mask, coeffs, bias)
    assert torch.equal(native.sparse_gemm(wide[::2, 7:72], mask, coeffs, bias), every_other)
    assert torch.equal(
        native.sparse_gemm(repeated, mask, coeffs, bias), expected[:1].expand(rows, 20)
    )


def test_layouts_of_the_other_operands():
    z, mask, coeffs, bias = make_problem(3, 65, 20, 30)
    expected = native.sparse_gemm(z, mask, coeffs, bias)
    strided = native.sparse_gemm(
        z,
        mask.T.contiguous().T,
        coeffs.repeat_interleave(2, 1)[:, ::2],
        bias.repeat_interleave(3)[::3],
    )
    assert torch.equal(strided, expected)


def test_bias_of_another_dtype():
    z, mask, coeffs, bias = make_problem(3, 65, 20, 30, dtype=torch.bfloat16)
    for dtype in FLOATS:
        assert_close(
            native.sparse_gemm(z, mask, coeffs, bias.to(dtype)), z, mask, coeffs, bias.to(dtype)
        )


def test_half_range():
    """Subnormal and extreme float16 coefficients, and results that overflow float16."""
    mask = native.pack_mask(torch.arange(4, dtype=torch.int32).repeat(3, 1), 4)
    coeffs = torch.tensor(
        [[6e-8, -6e-8, 1e-5, 6.1e-5], [65504.0, -65504.0, 1.0, 0.0], [65504.0, 65504.0, 0.0, 0.0]],
        dtype=torch.float16,
    )
    z = torch.ones(1, 4)
    expected = coeffs.double().sum(1)
    assert torch.equal(native.sparse_gemm(z, mask, coeffs)[0].double(), expected)
    half = native.sparse_gemm(z.half(), mask, coeffs)[0]
    assert torch.equal(half, expected.half())
    assert torch.isinf(half[2])


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_and_special_values(dtype):
    """With one atom of coefficient 1 every float32 passes through the final conversion alone."""
    mask = native.pack_mask(torch.zeros((1, 1), dtype=torch.int32), 1)
    values = torch.tensor([0.0, -0.0, 1e-8, 5.9e-8, 3e-5, 6.1e-5, 1 / 3, -2.0009766, 65519.0, 1e38])
    values = torch.cat([values, torch.randn(200) * 10.0 ** torch.linspace(-8, 4, 200)])
    values = torch.cat([values, torch.tensor([float("inf"), float("-inf"), float("nan")])])
    bias = values.float()
    ones = torch.zeros(1, 1, dtype=dtype)
    y = torch.cat([native.sparse_gemm(ones, mask, torch.ones(1, 1), b.view(1))[0] for b in bias])
    torch.testing.assert_close(y, bias.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_non_finite_rows_stay_apart():
    z, mask, coeffs, bias = make_problem(5, 40, 12, 20)
    expected = native.sparse_gemm(z, mask, coeffs, bias)
    z[2, 3] = float("nan")
    y = native.sparse_gemm(z, mask, coeffs, bias)
    keep = [0, 1, 3, 4]
    assert torch.equal(y[keep], expected[keep])
    assert torch.isnan(y[2]).any()


# ---- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 40])
def test_linear_in_z_and_in_the_coefficients(rows):
    a, mask, coeffs, _ = make_problem(rows, 100, 33, 50, exact=True)
    b, _, other, _ = make_problem(rows, 100, 33, 50, exact=True, seed=1)
    product = native.sparse_gemm
    combined = product(2 * a - 3 * b, mask, coeffs)
    assert torch.equal(combined, 2 * product(a, mask, coeffs) - 3 * product(b, mask, coeffs))
    combined = product(a, mask, coeffs + other)
    assert torch.equal(combined, product(a, mask, coeffs) + product(a, mask, other))


@pytest.mark.parametrize("rows", [1, 40])
def test_outputs_are_independent(rows):
    z, mask, coeffs, bias = make_problem(rows, 77, 50, 38)
    expected = native.sparse_gemm(z, mask, coeffs, bias)
    order = torch.randperm(50)
    permuted = native.sparse_gemm(z, mask[order], coeffs[order], bias[order])
    assert torch.equal(permuted, expected[:, order])


@pytest.mark.parametrize("rows", [1, 40])
def test_full_support_is_a_dense_product(rows):
    z, mask, coeffs, _ = make_problem(rows, 60, 31, 60, exact=True)
    assert torch.equal(native.sparse_gemm(z, mask, coeffs), z @ coeffs.T)


def test_identity_picks_columns():
    indices = torch.tensor([[5], [0], [63], [32]], dtype=torch.int32)
    z = torch.randn(6, 64)
    y = native.sparse_gemm(z, native.pack_mask(indices, 64), torch.ones(4, 1))
    assert torch.equal(y, z[:, [5, 0, 63, 32]])


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(())}, r"z: expected shape \[..., n_atoms\], got a scalar"),
        (
            {"z": torch.zeros(2, 65).double()},
            "z: expected float32 or bfloat16 or float16, got float64",
        ),
        ({"z": torch.zeros(2, 66)[:, :64]}, r"mask: expected shape \[20, 8\], got \[20, 9\]"),
        ({"z": torch.zeros(2, 65, device="meta")}, "z: expected a strided CPU tensor"),
        ({"mask": torch.zeros(20, 9)}, "mask: expected uint8, got float32"),
        ({"mask": torch.zeros(19, 9, dtype=torch.uint8)}, r"mask: expected shape \[20, 9\]"),
        ({"coeffs": torch.zeros(20, 66)}, "s = 66 is more than the 65 atoms"),
        ({"coeffs": torch.zeros(20)}, "coeffs: expected shape"),
        ({"coeffs": torch.zeros(20, 30).int()}, "coeffs: expected float32"),
        ({"bias": torch.zeros(21)}, r"bias: expected shape \[20\], got \[21\]"),
        ({"bias": torch.zeros(20, 1)}, r"bias: expected shape \[20\], got \[20, 1\]"),
        ({"num_threads": 0}, "num_threads: expected at least 1"),
    ],
)
def test_wrong_arguments(change, message):
    z, mask, coeffs, bias = make_problem(2, 65, 20, 30)
    arguments = {"z": z, "mask": mask, "coeffs": coeffs, "bias": bias} | change
    with pytest.raises(InputError, match=message):
        native.sparse_gemm(**arguments)


def test_a_mask_that_lies_gives_numbers_and_no_fault():
    z, mask, coeffs, _ = make_problem(3, 65, 20, 30)
    for wrong in (torch.full_like(mask, 255), torch.zeros_like(mask)):
        assert native.sparse_gemm(z, wrong, coeffs).shape == (3, 20)
        with pytest.raises(InputError, match="mask row 0"):
            native.validate_mask(wrong, 65, 30)
