"""The largest scores of every row."""

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


def select_largest(
    scores: torch.Tensor, count: int, *, num_threads: int | None = None
) -> torch.Tensor:
    """Indices of the `count` largest scores of every row, ascending.

    Parameters
    ----------
    scores : torch.Tensor
        ``[n, A]`` float32 or float64, non-negative and not NaN; -0.0 counts as 0, infinity is allowed. Checked
        on the CPU only, since a GPU's answer has to be waited for: there NaN is above infinity, and a negative score
        counts as 0.
    count : int
        ``1 <= count <= A``.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        ``[n, count]`` int32, strictly ascending per row; equal scores are broken by the lowest index.

    Raises
    ------
    InputError
        Wrong dtype, shape or count; a score that is negative or NaN (on the CPU).
    CudaUnavailableError
        CUDA tensors, and this build has no CUDA kernels.

    Notes
    -----
    Some ten passes over a row that stays in the cache, whatever `count` is. The result is the same for any thread
    count.
    """
    name = "select_largest"
    check_tensor(
        name, "scores", scores, (None, None), (torch.float32, torch.float64), any_device=True
    )
    n_rows, n_scores = scores.shape
    if not 1 <= count <= n_scores:
        raise InputError(f"{name}: count: expected 1 to {n_scores}, got {count}")
    if not scores.is_cpu:
        found: torch.Tensor = torch.ops.cospadi.select_largest(scores, count)
        return found
    scores = unit_stride_rows(scores)
    indices = torch.empty((n_rows, count), dtype=torch.int32, device=scores.device)
    select = _C.select_largest_f32 if scores.dtype == torch.float32 else _C.select_largest_f64
    with native_errors(name):
        select(
            scores.data_ptr(),
            n_rows,
            n_scores,
            row_stride(scores),
            count,
            indices.data_ptr(),
            thread_count(num_threads),
        )
    return indices
