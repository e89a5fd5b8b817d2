"""Quantisers against brute force and against the meaning of the formats."""

from __future__ import annotations

import itertools
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cospadi.errors import FitError, InputError
from cospadi.learn.quantize import (
    CLIP_FACTORS,
    StorageTypes,
    quantise_bfloat14,
    quantise_coeffs,
    quantise_dictionary,
    quantise_integers,
)


def random_values(n=7, s=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, s, generator=generator) * torch.logspace(-3, 3, n)[:, None]


def brute_force(values, weights, bits):
    """Try every factor on one group of numbers, in plain Python."""
    limit = 2 ** (bits - 1) - 1
    largest = max(abs(v) for v in values)
    best = None
    for factor in CLIP_FACTORS:
        scale = float(torch.tensor(largest * (factor / limit)).bfloat16())
        fields = [max(-limit, min(limit, round(v / scale))) for v in values]
        error = sum(
            w * (v - f * scale) ** 2 for v, f, w in zip(values, fields, weights, strict=True)
        )
        if best is None or error < best[0]:
            best = (error, scale)
    return best


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [0, 1, 8, 23, 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_the_best_of_the_grid(bits, group, weighted):
    values = random_values()
    weights = torch.rand(7, 23, generator=torch.Generator().manual_seed(1)) if weighted else None
    found = quantise_integers(values, bits, group=group, weights=weights)
    limit = 2 ** (bits - 1) - 1
    size = group or 23
    assert found.scale.dtype == torch.bfloat16
    assert found.scale.shape == (7, -(-23 // size))
    assert found.fields.dtype == torch.int32
    assert int(found.fields.abs().max()) <= limit
    spread = found.scale.float().repeat_interleave(size, dim=1)[:, :23]
    assert torch.equal(found.values, found.fields * spread)
    for row in range(7):
        for g, start in enumerate(range(0, 23, size)):
            part = slice(start, start + size)
            cost = (weights[row, part] if weighted else torch.ones(23)[part]).tolist()
            expected, _ = brute_force(values[row, part].tolist(), cost, bits)
            lost = (values[row, part] - found.values[row, part]).double().square()
            assert float((lost * torch.tensor(cost)).sum()) == pytest.approx(
                expected, rel=1e-4, abs=1e-12
            )
            assert float(found.scale[row, g]) > 0


def test_clipping_pays_at_four_bits_and_weights_move_the_scale():
    values = torch.randn(50, 300, generator=torch.Generator().manual_seed(2))

    def error(quantised, weights):
        return float(((quantised.values - values).square() * weights).sum())

    ones = torch.ones_like(values)
    plain = quantise_integers(values, 4, clip_factors=(1.0,))
    clipped = quantise_integers(values, 4)
    assert error(clipped, ones) < 0.85 * error(plain, ones)
    weights = torch.logspace(0, -6, 300).expand_as(values)
    assert error(quantise_integers(values, 4, weights=weights), weights) < error(clipped, weights)


def test_zeros_denormals_and_huge_values_have_positive_finite_scales():
    values = torch.tensor([[0.0, 0.0], [1e-42, -1e-42], [3e38, -3e38], [-0.0, 1.0]])
    for bits in (3, 8):
        found = quantise_integers(values, bits)
        assert bool((found.scale > 0).all())
        assert bool(torch.isfinite(found.scale).all())
        assert bool(torch.isfinite(found.values).all())
        assert torch.equal(found.values[0], torch.zeros(2))
        torch.testing.assert_close(found.values[2:], values[2:], rtol=5e-3, atol=0)


def decode_bfloat14(field):
    """The 14 bits are the upper ones of a float32, most significant first: sign, exponent, 5 of mantissa."""
    return struct.unpack("<f", struct.pack("<I", field << 18))[0]


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(FINITE)
def test_bfloat14_is_the_nearest_of_its_neighbours(value):
    found = quantise_bfloat14(torch.tensor([[value]]))
    field = int(found.fields)
    assert 0 <= field < 1 << 14
    decoded = decode_bfloat14(field)
    assert decoded == float(found.values)
    magnitude = field & 0x1FFF
    neighbours = [
        decode_bfloat14((field & 0x2000) | m)
        for m in (magnitude - 1, magnitude + 1)
        if 0 <= m < 0x1FE0
    ]
    exact = float(torch.tensor(value))
    for neighbour in neighbours:
        assert abs(decoded - exact) <= abs(neighbour - exact)
        if abs(decoded - exact) == abs(neighbour - exact):
            assert magnitude % 2 == 0


@given(FINITE)
def test_truncation_drops_two_bits_of_the_bfloat16(value):
    if not bool(torch.isfinite(torch.tensor(value).bfloat16())):
        return  # beyond bfloat16: a separate test
    found = quantise_bfloat14(torch.tensor([[value]]), rounding="truncate")
    bits = int(torch.tensor(value).bfloat16().view(torch.int16)) & 0xFFFF
    assert int(found.fields) == bits >> 2
    assert decode_bfloat14(bits >> 2) == float(found.values)


def test_bfloat14_saturates_and_rounding_halves_the_error():
    largest = decode_bfloat14(0xFE << 5 | 0x1F)
    found = quantise_bfloat14(torch.tensor([[3.4e38, -3.4e38]]))
    assert found.values.tolist() == [[largest, -largest]]
    values = random_values(20, 500)
    nearest = (quantise_bfloat14(values).values - values).norm()
    truncated = (quantise_bfloat14(values, rounding="truncate").values - values).norm()
    assert nearest < 0.6 * truncated
    assert float(((quantise_bfloat14(values).values - values) / values).abs().max()) <= 2**-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_floating_types_are_torchs(dtype):
    values = torch.randn(4, 5)
    types = StorageTypes(dictionary=dtype, coeffs=dtype)
    expected = values.to(getattr(torch, dtype)).float()
    coeffs, dictionary = quantise_coeffs(values, types), quantise_dictionary(values, types)
    for found in (coeffs, dictionary):
        assert found.dtype == dtype
        assert torch.equal(found.values, expected)
        assert found.fields is None
        assert found.scale is None


def test_int8_dictionary_has_one_row_and_one_scale_per_atom():
    dictionary = random_values(9, 5).double()
    found = quantise_dictionary(dictionary, StorageTypes(dictionary="int8"))
    assert found.fields.shape == (5, 9)
    assert found.scale.shape == (5,)
    assert torch.equal(found.values, (found.fields * found.scale.float()[:, None]).T)
    assert float((found.values - dictionary).norm() / dictionary.norm()) < 0.01


def test_types_reach_their_quantisers():
    values = random_values()
    assert quantise_coeffs(
        values, StorageTypes(coeffs="bfloat14", rounding="truncate")
    ).fields.equal(quantise_bfloat14(values, rounding="truncate").fields)
    for bits, group in itertools.product((3, 4, 8), (0, 8)):
        found = quantise_coeffs(values, StorageTypes(coeffs=f"int{bits}", coeffs_group=group))
        assert (found.dtype, found.group) == (f"int{bits}", group)
        assert torch.equal(found.fields, quantise_integers(values, bits, group=group).fields)


@pytest.mark.parametrize("shape", [(0, 4), (3, 1)])
def test_edge_shapes(shape):
    values = torch.randn(shape)
    for bits in (3, 8):
        found = quantise_integers(values, bits, group=3)
        assert found.values.shape == shape
        assert found.scale.shape == (shape[0], -(-shape[1] // 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(bad):
    values = torch.tensor([[1.0, bad]])
    for coeffs in ("bfloat16", "bfloat14", "int4"):
        with pytest.raises(InputError, match=r"(coeffs|values): "):
            quantise_coeffs(values, StorageTypes(coeffs=coeffs))
    with pytest.raises(InputError, match="dictionary"):
        quantise_dictionary(values, StorageTypes(dictionary="int8"))


def test_overflow_of_a_floating_type_is_a_fit_error():
    with pytest.raises(FitError, match=r"coeffs.*float16"):
        quantise_coeffs(torch.tensor([[1e6]]), StorageTypes(coeffs="float16"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dictionary", "int4"),
        ("coeffs", "int9"),
        ("coeffs", "float64"),
        ("rounding", "up"),
        ("coeffs_group", -1),
    ],
)
def test_bad_types_name_the_argument(key, value):
    with pytest.raises(InputError, match=key):
        StorageTypes(**{key: value})


def test_a_group_needs_scales_and_bits_a_range():
    with pytest.raises(InputError, match="coeffs_group"):
        StorageTypes(coeffs="bfloat14", coeffs_group=64)
    for bits in (1, 9):
        with pytest.raises(InputError, match="bits"):
            quantise_integers(torch.ones(1, 1), bits)
