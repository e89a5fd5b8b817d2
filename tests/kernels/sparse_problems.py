"""Problems and tolerances shared by the tests of the column-sparse GEMM."""

from __future__ import annotations

import torch

from cospadi import native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

TOLERANCE = {
    # Of sum |z| |S| + |bias|. Sums are in float32 and in any order: a few float32 roundings each.
    torch.float32: 2e-6,
    # One rounding of y to 8 (11) significant bits, at most half a unit of the last one.
    torch.bfloat16: 2.0**-8 * 1.01,
    torch.float16: 2.0**-11 * 1.01,
}
"""Largest error by dtype of y, relative to the sum of magnitudes."""


def random_indices(generator, d_out, n_atoms, sparsity):
    """Return int32 [d_out, sparsity], ascending per row, uniformly at random."""
    order = torch.rand(d_out, n_atoms, generator=generator).argsort(1)[:, :sparsity]
    return order.sort(1).values.int()


def make_problem(
    rows,
    n_atoms,
    d_out,
    sparsity,
    *,
    dtype=torch.float32,
    coeffs_dtype=torch.float32,
    exact=False,
    seed=0,
):
    """Return z, mask, coeffs, bias; with `exact` small integers whose sums no dtype rounds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if exact:
            return torch.randint(-3, 4, shape, generator=generator).float()
        return torch.randn(*shape, generator=generator)

    mask = native.pack_mask(random_indices(generator, d_out, n_atoms, sparsity), n_atoms)
    coeffs = draw(d_out, sparsity).to(coeffs_dtype)
    return draw(rows, n_atoms).to(dtype), mask, coeffs, draw(d_out).to(dtype)


def dense_of(mask, coeffs, n_atoms):
    """Return S [n_atoms, d_out] in float64."""
    indices = native.unpack_mask(mask, n_atoms, coeffs.shape[1]).long()
    dense = torch.zeros(coeffs.shape[0], n_atoms, dtype=torch.float64)
    return dense.scatter_(1, indices, coeffs.double()).T


def assert_close(y, z, mask, coeffs, bias=None):
    """Compare y with float64 arithmetic, relative to the magnitudes that were summed."""
    dense = dense_of(mask, coeffs, z.shape[1])
    expected = z.double() @ dense
    magnitude = z.double().abs() @ dense.abs()
    if bias is not None:
        expected += bias.double()
        magnitude += bias.double().abs()
    assert y.shape == expected.shape
    assert y.dtype == z.dtype
    error = (y.double() - expected).abs()
    allowed = TOLERANCE[z.dtype] * magnitude + torch.finfo(y.dtype).tiny
    assert (error <= allowed).all(), (
        f"largest error {(error / magnitude).max():.2e} of the magnitude"
    )
