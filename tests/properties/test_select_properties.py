"""Laws of the selection of the largest scores."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.native import select_largest

SETTINGS = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def rows(draw):
    """Any bit patterns that are non-negative numbers, many of them equal or nearly so."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    width = 32 if dtype == torch.float32 else 64
    pool = draw(
        st.lists(
            st.floats(min_value=0.0, width=width, allow_nan=False) | st.just(-0.0),
            min_size=1,
            max_size=20,
        )
    )
    scores = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=70))
    return torch.tensor([scores], dtype=dtype), draw(st.integers(1, len(scores)))


@SETTINGS
@given(rows())
def test_everything_left_out_is_smaller_or_a_later_tie(problem):
    scores, count = problem
    indices = select_largest(scores, count)[0].tolist()
    assert len(set(indices)) == count
    assert indices == sorted(indices)
    values = scores[0].tolist()
    worst = max(indices, key=lambda i: (-values[i], i))
    for i in set(range(len(values))) - set(indices):
        assert values[i] < values[worst] or (values[i] == values[worst] and i > worst)


@SETTINGS
@given(rows())
def test_one_more_keeps_the_others(problem):
    scores, count = problem
    if count > 1:
        fewer = select_largest(scores, count - 1)[0].tolist()
        assert set(fewer) < set(select_largest(scores, count)[0].tolist())
