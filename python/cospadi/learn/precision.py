"""The arithmetic of matrix products on CUDA devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Products = Literal["float32", "tf32"]
PRODUCTS: tuple[Products, ...] = ("float32", "tf32")


@contextmanager
def products_in(products: Products, device: torch.device) -> Iterator[None]:
    """Run float32 products on a CUDA device with inputs rounded to TF32 (10 bits of mantissa), sums in float32.

    Nothing changes for ``float32``, on other devices, and for float64.
    """
    if products == "float32" or device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
