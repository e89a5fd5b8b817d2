"""The arithmetic of large matrix products on CUDA devices.

Tensor cores round float32 operands to 10 bits of mantissa (TF32). In the rise of augmented dictionaries that is not for
free: emulated on weights drawn at random (docs/results.md), errors were 4 to 6 % higher at a ratio of 0.2 and 0.5 %
at 0.5, with bfloat16 15 to 92 %. Operands cut into two parts of that many bits give three products whose sum has
nearly the accuracy of float32, at a third of the tensor cores' rate: errors stayed within 0.3 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Products = Literal["float32", "tf32x3", "tf32"]
PRODUCTS: tuple[Products, ...] = ("float32", "tf32x3", "tf32")

_KEPT_BITS = -(1 << 13)
"""Of a float32: sign, exponent and 10 bits of mantissa."""


def multiply(a: torch.Tensor, b: torch.Tensor, products: Products) -> torch.Tensor:
    """``a [n, m] @ b [m, k]`` in float32, on a CUDA device by the tensor cores where ``products`` says so.

    ``tf32``: one product of rounded operands; ``tf32x3``: three of operands in two parts; ``float32``: neither.
    """
    if products == "float32" or a.device.type != "cuda":
        return a @ b
    with tf32_products():
        return a @ b if products == "tf32" else in_three_products(a, b, torch.matmul)


def in_three_products(
    a: torch.Tensor,
    b: torch.Tensor,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """``a @ b`` by a product whose operands are rounded to TF32; only that of the two small parts is left out."""
    (a_large, a_small), (b_large, b_small) = _parts(a), _parts(b)
    small = product(a_small, b_large) + product(a_large, b_small)
    return small.add_(product(a_large, b_large))


def _parts(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What TF32 holds exactly, and the rest."""
    large = (values.contiguous().view(torch.int32) & _KEPT_BITS).view(torch.float32)
    return large, values - large


@contextmanager
def tf32_products() -> Iterator[None]:
    """Let torch round the operands of float32 products on CUDA devices to TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
