"""Laws of packed fields and of the product with them, on any input."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi import native

SETTINGS = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def fields(draw):
    """Width, and int32 [rows, n] that any field of that width holds."""
    bits = draw(st.integers(2, 16))
    shape = draw(st.tuples(st.integers(0, 20), st.integers(0, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return bits, torch.randint(-(2 ** (bits - 1)), 2**bits, shape, generator=generator).int()


@SETTINGS
@given(fields())
def test_round_trip(problem):
    bits, values = problem
    packed = native.pack_fields(values, bits)
    assert packed.shape == (values.shape[0], -(-values.shape[1] * bits // 8))
    signed = native.unpack_fields(packed, values.shape[1], bits, signed=True)
    unsigned = native.unpack_fields(packed, values.shape[1], bits, signed=False)
    assert torch.equal(unsigned, values % 2**bits)
    assert torch.equal(signed, (values + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1))
    assert torch.equal(native.pack_fields(signed, bits), packed)
    assert torch.equal(native.pack_fields(unsigned, bits), packed)


@SETTINGS
@given(fields())
def test_padding_is_zero(problem):
    bits, values = problem
    n_bits = bits * values.shape[1]
    if n_bits % 8 and len(values):
        packed = native.pack_fields(values, bits)
        assert (packed[:, -1] >> (n_bits % 8) == 0).all()


@SETTINGS
@given(
    st.sampled_from([name for name, form in native.CODE_FORMATS.items() if form.has_scale]),
    st.integers(1, 60),
    st.integers(1, 70),
    st.sampled_from([1, 4, 40]),
    st.integers(0, 2**31),
)
def test_grouped_scales_that_agree_are_one_scale(name, n_atoms, group, rows, seed):
    """Powers of two scale without rounding, so both ways of applying them give the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    bits = native.CODE_FORMATS[name].bits
    values = torch.randint(-3, 4, (9, n_atoms), generator=generator).int()
    codes = native.pack_fields(values, bits)
    scale = 2.0 ** torch.randint(-3, 4, (9, 1), generator=generator)
    z = torch.randint(-3, 4, (rows, n_atoms), generator=generator).float()
    one = native.packed_gemm(z, None, codes, n_atoms, name, scale, 0, None)
    n_groups = -(-n_atoms // group)
    many = native.packed_gemm(z, None, codes, n_atoms, name, scale.expand(9, n_groups), group, None)
    assert torch.equal(one, z @ (values * scale).T)
    assert torch.equal(many, one)
