"""Products in parts."""

from __future__ import annotations

import torch

from cospadi.learn.precision import in_three_products, multiply, tf32_products


def rounded(x):
    """Nearest values with 10 bits of mantissa."""
    bits = x.contiguous().view(torch.int32)
    bits = bits + 0xFFF + (bits >> 13 & 1)
    return (bits & -(1 << 13)).view(torch.float32)


def product_of_rounded(a, b):
    return rounded(a) @ rounded(b)


def test_three_products_are_nearly_float32():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 300, generator=generator) * torch.logspace(-3, 3, 300)
    b = torch.randn(300, 40, generator=generator)
    exact = a.double() @ b.double()

    def error(found):
        return float((found.double() - exact).norm() / exact.norm())

    assert error(product_of_rounded(a, b)) > 1e-4
    assert error(in_three_products(a, b, product_of_rounded)) < 2e-6
    assert error(a @ b) < 1e-6


def test_other_devices_multiply_as_they_are():
    a, b = torch.randn(5, 6), torch.randn(6, 7)
    for products in ("float32", "tf32", "tf32x3"):
        assert torch.equal(multiply(a, b, products), a @ b)


def test_the_setting_of_torch_comes_back():
    before = torch.backends.cuda.matmul.fp32_precision
    with tf32_products():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before
