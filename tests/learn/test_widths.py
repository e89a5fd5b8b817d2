"""Integers by budget: what is chosen fits, uses its bytes, and keeps every weight where it can."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.learn.budget import stored_bits
from cospadi.learn.methods import factor_size
from cospadi.learn.widths import (
    LOWEST_BITS,
    deal_bits,
    full_bits,
    integer_ratios,
    integer_types,
    kept_bits,
    removed_share,
)
from cospadi.pipeline.plan import storage_widths

WIDTHS = [64, 100, 576, 1536, 4096]


def used_bits(bits, d_in, d_out=48):
    types = integer_types(bits, d_in)
    widths = storage_widths(types)
    size = factor_size(
        "cospadi", d_in, d_out, removed_share(bits), widths=widths, dictionary="identity"
    )
    stored = stored_bits(
        d_in,
        d_out,
        size.n_atoms,
        size.sparsity,
        n_identity=size.n_identity,
        full_support=size.full_support,
        widths=widths,
    )
    return types, size, stored / (d_in * d_out)


@pytest.mark.parametrize("d_in", WIDTHS)
@pytest.mark.parametrize("bits", [1.5, 2.25, 2.75, 3.25, 4.25, 5.0, 6.0, 7.5, 8.5, 12.0])
def test_what_is_chosen_fits(bits, d_in):
    types, size, used = used_bits(bits, d_in)
    assert used <= bits + 1e-9
    if bits < 4:
        assert used > bits - 0.25
    if bits >= full_bits(4, d_in):
        assert size.full_support
        assert types.coeffs != "int3"


@pytest.mark.parametrize(
    ("bits", "coeffs", "group"),
    [
        (2.25, "int3", 0),
        (3.25, "int4", 0),
        (4.03, "int4", 0),
        (4.25, "int4", 64),
        (5.0, "int4", 32),
        (6.03, "int6", 0),
        (9.0, "int8", 32),
    ],
)
def test_types_of_a_small_model(bits, coeffs, group):
    types = integer_types(bits, 576)
    assert (types.coeffs, types.coeffs_group) == (coeffs, group)


@pytest.mark.parametrize("d_in", WIDTHS)
def test_ratios_worth_choosing_ascend_and_use_their_bytes(d_in):
    ratios = integer_ratios(d_in)
    assert all(a < b for a, b in itertools.pairwise(ratios))
    assert kept_bits(ratios[0]) == pytest.approx(full_bits(8, d_in))
    assert kept_bits(ratios[-1]) == pytest.approx(LOWEST_BITS)
    for ratio in ratios:
        _, size, used = used_bits(kept_bits(ratio), d_in)
        assert kept_bits(ratio) - 0.2 < used <= kept_bits(ratio) + 1e-9
        assert size.full_support == any(
            kept_bits(ratio) == pytest.approx(full_bits(width, d_in)) for width in (3, 4, 5, 6, 8)
        )


def mean_bits(dealt, shapes):
    total = sum(bits * math.prod(shape) for bits, shape in zip(dealt, shapes, strict=True))
    return total / sum(math.prod(shape) for shape in shapes)


@given(
    st.lists(
        st.tuples(st.sampled_from(WIDTHS), st.sampled_from([8, 48, 576, 1536])),
        min_size=1,
        max_size=40,
    ),
    st.floats(LOWEST_BITS, 15.0),
)
def test_linears_together_never_take_more_than_the_budget(shapes, bits):
    dealt = deal_bits(shapes, bits)
    assert mean_bits(dealt, shapes) <= bits + 1e-6
    for own, (d_in, _) in zip(dealt, shapes, strict=True):
        sizes = [kept_bits(ratio) for ratio in integer_ratios(d_in)]
        assert own == bits or any(own == pytest.approx(size) for size in sizes)
        _, _, used = used_bits(own, d_in)
        assert used <= own + 1e-6


BLOCK = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]


@pytest.mark.parametrize("bits", [2.25, 2.9, 3.0, 3.25, 4.0, 4.25, 5.0, 6.0, 7.0, 8.0])
def test_a_model_of_thirty_blocks_uses_its_budget(bits):
    shapes = BLOCK * 30
    assert bits - 0.011 < mean_bits(deal_bits(shapes, bits), shapes) <= bits + 1e-9


def test_eight_bits_are_int8_but_for_two_linears_in_the_middle():
    dealt = deal_bits(BLOCK * 30, 8.0)
    others = [i for i, bits in enumerate(dealt) if bits < 8]
    assert len(others) == 2
    assert all(90 < i < 120 for i in others)
    assert all(math.prod(BLOCK[i % 7]) == 576 * 1536 for i in others)


def test_what_is_left_over_raises_the_smallest_linears_first():
    dealt = deal_bits(BLOCK * 2, 4.25)
    by_size = sorted(zip((math.prod(shape) for shape in BLOCK * 2), dealt, strict=True))
    assert by_size[0][1] > 5
    assert by_size[-1][1] < 4.1


def test_between_sizes_with_a_mask_all_get_the_same():
    assert set(deal_bits(BLOCK * 3, 3.25)) == {3.25}
