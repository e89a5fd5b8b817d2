"""The library's own dense product against torch."""

from __future__ import annotations

import pytest
import torch

from cospadi import native
from cospadi.errors import InputError

TOLERANCE = {
    # of sum |a| |b|: roundings of a sum over up to 700 terms, in blocks of 256
    torch.float32: 2e-6,
    torch.float64: 1e-14,
}


def assert_product(c, a, b):
    expected = a.double() @ b.double()
    magnitude = a.double().abs() @ b.double().abs()
    assert ((c.double() - expected).abs() <= TOLERANCE[c.dtype] * magnitude + 1e-300).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [0, 1, 13, 14, 15, 100])
@pytest.mark.parametrize("n", [0, 1, 31, 33, 100])
def test_sizes(dtype, m, n):
    for k in (0, 1, 7, 255, 256, 257, 700):
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
        assert_product(native.gemm(a, b, num_threads=1), a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_layouts(dtype, threads):
    a, b = torch.randn(90, 300, dtype=dtype), torch.randn(300, 70, dtype=dtype)
    expected = native.gemm(a, b)
    for a_view in (a, a.T.contiguous().T, a.repeat_interleave(3, 1)[:, ::3]):
        for b_view in (b, b.T.contiguous().T, b.repeat_interleave(2, 0)[::2]):
            c = native.gemm(a_view, b_view, num_threads=threads)
            assert torch.equal(c, expected)  # packing hides the layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_beta_and_strided_output(dtype):
    a, b = torch.randn(40, 50, dtype=dtype), torch.randn(50, 33, dtype=dtype)
    wide = torch.randn(40, 40, dtype=dtype)
    before = wide.clone()
    out = wide[:, 3:36]
    result = native.gemm(a, b, out=out, alpha=-0.5, beta=2.0)
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, 2.0 * before[:, 3:36] - 0.5 * (a @ b), rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, 36:], before[:, 36:])
    out.fill_(float("nan"))
    assert_product(native.gemm(a, b, out=out), a, b)  # beta = 0 does not read


def test_thread_count_and_position_change_no_bit():
    a, b = torch.randn(200, 600), torch.randn(600, 150)
    first = native.gemm(a, b, num_threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(native.gemm(a, b, num_threads=threads), first)
    assert torch.equal(native.gemm(a[37:52], b[:, 11:60]), first[37:52, 11:60])


def test_wrong_arguments():
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    with pytest.raises(InputError, match=r"b: expected shape \[4, \*\], got \[3, 4\]"):
        native.gemm(a, a)
    with pytest.raises(InputError, match="b: expected float32, got float64"):
        native.gemm(a, b.double())
    with pytest.raises(InputError, match="a: expected float32 or float64, got float16"):
        native.gemm(a.half(), b)
    with pytest.raises(InputError, match=r"beta: 1\.0 needs `out`"):
        native.gemm(a, b, beta=1.0)
    with pytest.raises(InputError, match="out: written in place"):
        native.gemm(a, b, out=torch.zeros(5, 3).T)
