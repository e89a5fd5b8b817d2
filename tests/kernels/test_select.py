"""Selection of the largest scores against a stable sort, special values and error cases."""

from __future__ import annotations

import pytest
import torch

from cospadi import native
from cospadi.errors import InputError
from cospadi.reference import select_largest_reference

DTYPES = [torch.float32, torch.float64]
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 47, 100, 2016]


def counts(n):
    return sorted({1, max(1, n // 3), max(1, n // 2), max(1, n - 1), n})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_equals_stable_sort(n, dtype):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randn(20, n, generator=generator, dtype=dtype).abs()
    for count in counts(n):
        indices = native.select_largest(scores, count)
        assert indices.dtype == torch.int32
        assert torch.equal(indices, select_largest_reference(scores, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("n", SIZES)
def test_ties_take_the_lowest_index(n, levels, dtype):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(0, levels, (20, n), generator=generator).to(dtype)
    for count in counts(n):
        assert torch.equal(
            native.select_largest(scores, count), select_largest_reference(scores, count)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wide_range_of_magnitudes(dtype):
    """Denormals, huge numbers, zeros of both signs and infinities in one row."""
    generator = torch.Generator().manual_seed(0)
    limits = torch.finfo(dtype)
    exponents = torch.empty(50, 200, dtype=torch.float64).uniform_(-330, 320, generator=generator)
    scores = (10**exponents).to(dtype)  # rounds to 0 and infinity too
    scores[:, ::7] *= -0.0
    scores = torch.where(scores.isnan(), -torch.zeros_like(scores), scores)
    scores[:, 3] = limits.max
    scores[:, 5] = limits.smallest_normal * limits.eps  # the smallest denormal
    for count in (1, 20, 60, 100, 150, 199):
        assert torch.equal(
            native.select_largest(scores, count), select_largest_reference(scores, count)
        )


def test_denormals_differ_also_where_they_are_flushed():
    scores = torch.zeros(1, 40)
    scores[0, [9, 30]] = torch.tensor([2.0**-149, 2.0**-148])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert native.select_largest(scores, 1).tolist() == [[30]]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    scores = torch.rand(37, 90, dtype=dtype)
    expected = native.select_largest(scores, 30)
    wide = torch.full((37, 101), torch.nan, dtype=dtype)
    wide[:, 4:94] = scores
    for view in (wide[:, 4:94], scores.T.contiguous().T, scores.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(native.select_largest(view, 30), expected)
    assert torch.equal(native.select_largest(scores[::3], 30), expected[::3])
    assert torch.equal(
        native.select_largest(scores[:1].expand(5, 90), 30), expected[:1].repeat(5, 1)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype):
    scores = torch.rand(900, 333, dtype=dtype).mul(50).round()
    first = native.select_largest(scores, 100, num_threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(native.select_largest(scores, 100, num_threads=threads), first)


def test_no_rows():
    assert native.select_largest(torch.empty(0, 5), 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("scores", "count", "message"),
    [
        (torch.ones(2, 4), 0, "count: expected 1 to 4, got 0"),
        (torch.ones(2, 4), 5, "count: expected 1 to 4, got 5"),
        (torch.ones(2, 0), 1, "count: expected 1 to 0, got 1"),
        (torch.ones(4), 1, r"scores: expected shape \[\*, \*\], got \[4\]"),
        (torch.ones(2, 4).half(), 1, "scores: expected float32 or float64, got float16"),
        (torch.tensor([[1.0, 0.0], [2.0, -1.0]]), 1, r"element \[1, 1\] is negative or NaN: -1"),
        (torch.tensor([[1.0, torch.nan], [-2.0, 1.0]]), 1, r"element \[0, 1\] is negative or NaN"),
        (torch.tensor([[1.0, -torch.inf]]), 2, r"element \[0, 1\] is negative or NaN: -inf"),
    ],
)
def test_wrong_arguments(scores, count, message):
    with pytest.raises(InputError, match=message):
        native.select_largest(scores, count)


def test_threads_must_be_positive():
    with pytest.raises(InputError, match="num_threads"):
        native.select_largest(torch.ones(1, 1), 1, num_threads=0)
