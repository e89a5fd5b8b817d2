"""Dense matrix product of the native library, for tests and benches."""

from __future__ import annotations

import torch

from cospadi import _C
from cospadi.errors import InputError
from cospadi.native.support import (
    check_tensor,
    native_errors,
    row_stride,
    thread_count,
    unit_stride_rows,
)


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Dense product ``out = alpha a b + beta out``: the kernels' own, for tests and benchmarks.

    Parameters
    ----------
    a, b : torch.Tensor
        ``[m, k]`` and ``[k, n]``, float32 or float64 on the CPU, any strides (transposes are free).
    out : torch.Tensor, optional
        ``[m, n]``, same dtype, unit inner stride, written in place; must not overlap `a` or `b`.
        Not read when `beta` is 0. Default: a new tensor.
    alpha, beta : float
        `beta` needs `out`.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        `out`.

    Raises
    ------
    InputError
        Wrong dtype, device, shape or layout.

    Notes
    -----
    The result is the same to the bit for any thread count.
    """
    name = "gemm"
    check_tensor(name, "a", a, (None, None), (torch.float32, torch.float64))
    check_tensor(name, "b", b, (a.shape[1], None), (a.dtype,))
    m, k, n = *a.shape, b.shape[1]
    if out is None:
        if beta != 0.0:
            raise InputError(f"{name}: beta: {beta} needs `out`")
        out = a.new_empty((m, n))
    check_tensor(name, "out", out, (m, n), (a.dtype,))
    if out.numel() and unit_stride_rows(out).data_ptr() != out.data_ptr():
        raise InputError(f"{name}: out: written in place, so rows must have unit stride")
    multiply = _C.gemm_f32 if a.dtype == torch.float32 else _C.gemm_f64
    with native_errors(name):
        multiply(
            alpha,
            a.data_ptr(),
            m,
            k,
            a.stride(0),
            a.stride(1),
            b.data_ptr(),
            n,
            b.stride(0),
            b.stride(1),
            beta,
            out.data_ptr(),
            row_stride(out),
            thread_count(num_threads),
        )
    return out
