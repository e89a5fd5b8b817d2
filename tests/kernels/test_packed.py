"""Packed coefficients: fields, decoding, and the product against float64 torch; errors."""

from __future__ import annotations

import pytest
import torch
from packed_problems import SCALED, coeffs_of, full_mask, make_packed, random_fields
from sparse_problems import FLOATS, assert_close

from cospadi import native
from cospadi.errors import InputError
from cospadi.reference import (
    decode_coeffs_reference,
    pack_fields_reference,
    packed_gemm_reference,
    unpack_fields_reference,
)

BITS = range(2, 17)
FORMATS = list(native.CODE_FORMATS)
GROUPS = (0, 1, 5, 32, 128)


def form_and_group():
    return [(name, group) for name in FORMATS for group in (GROUPS if name in SCALED else (0,))]


# ---- fields --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_fields_match_the_reference(bits):
    generator = torch.Generator().manual_seed(bits)
    for n in (0, 1, 3, 7, 8, 9, 31, 32, 33, 100):
        values = torch.randint(-(2 ** (bits - 1)), 2**bits, (4, n), generator=generator).int()
        packed = native.pack_fields(values, bits)
        assert torch.equal(packed, pack_fields_reference(values, bits))
        for signed in (True, False):
            fields = native.unpack_fields(packed, n, bits, signed=signed)
            assert torch.equal(fields, unpack_fields_reference(packed, n, bits, signed=signed))
            assert torch.equal(fields % 2**bits, values % 2**bits)


def test_layout_of_the_format():
    """What FORMAT.md states: int8 is one byte each, int4 has even fields in the low nibble."""
    assert native.pack_fields(torch.tensor([[1, -1, -127]]).int(), 8).tolist() == [[1, 255, 129]]
    assert native.pack_fields(torch.tensor([[1, -1, 7]]).int(), 4).tolist() == [[0xF1, 0x07]]
    assert native.pack_fields(torch.tensor([[1, 2, 3]]).int(), 3).tolist() == [[0b11010001, 0]]
    assert native.pack_fields(torch.tensor([[0x2ABC, 1]]).int(), 14).tolist() == [
        [0xBC, 0x6A, 0, 0]
    ]


def test_strided_and_empty_fields():
    values = torch.arange(12, dtype=torch.int32).view(3, 4)
    expected = native.pack_fields(values.T.contiguous(), 5)
    assert torch.equal(native.pack_fields(values.T, 5), expected)
    strided = expected.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(native.unpack_fields(strided, 3, 5, signed=False), values.T)
    assert native.pack_fields(torch.empty((0, 4), dtype=torch.int32), 5).shape == (0, 3)
    assert native.unpack_fields(torch.empty((0, 3)).byte(), 4, 5, signed=True).shape == (0, 4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_fields_by_several_threads(threads):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (700, 1001), generator=generator).int()
    packed = native.pack_fields(values, 3, num_threads=threads)
    assert torch.equal(packed, native.pack_fields(values, 3, num_threads=1))
    assert torch.equal(native.unpack_fields(packed, 1001, 3, signed=True), values)
    wrong = values.clone()
    wrong[511, 3] = wrong[620, 1] = 100
    with pytest.raises(InputError, match=r"values row 511: .* got 100 in column 3"):
        native.pack_fields(wrong, 3, num_threads=threads)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: native.pack_fields(torch.tensor([[0, 0], [7, 8]]).int(), 3),
            r"values row 1: expected -4 \.\. 7 for 3 bits, got 8 in column 1",
        ),
        (
            lambda: native.pack_fields(torch.tensor([[-5]]).int(), 3),
            r"values row 0: expected -4 \.\. 7 for 3 bits, got -5 in column 0",
        ),
        (lambda: native.pack_fields(torch.zeros(2, 3).int(), 1), "bits: expected 2 to 16, got 1"),
        (lambda: native.pack_fields(torch.zeros(2, 3).int(), 17), "bits: expected 2 to 16, got 17"),
        (lambda: native.pack_fields(torch.zeros(2, 3).long(), 4), "values: expected int32"),
        (
            lambda: native.unpack_fields(
                torch.zeros(2, 3).byte(), 7, 3, signed=True, num_threads=0
            ),
            "num_threads: expected at least 1",
        ),
        (
            lambda: native.unpack_fields(torch.zeros(2, 3).byte(), 9, 3, signed=True),
            r"packed: expected shape \[\*, 4\], got \[2, 3\]",
        ),
        (
            lambda: native.unpack_fields(torch.zeros(2, 3).byte(), -1, 3, signed=True),
            "n: expected at least 0",
        ),
    ],
)
def test_wrong_fields(call, message):
    with pytest.raises(InputError, match=message):
        call()


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [1, 7, 31, 32, 33, 100])
@pytest.mark.parametrize(("code_format", "group"), form_and_group())
def test_decoding_is_exact(code_format, group, sparsity):
    problem = make_packed(0, sparsity, 6, sparsity, code_format, group=group, all_atoms=True)
    bits = native.CODE_FORMATS[code_format].bits
    expected = decode_coeffs_reference(problem[2], sparsity, bits, problem[5], group)
    assert torch.equal(native.decode_coeffs(*problem[2:7]), expected.float())
    assert torch.equal(coeffs_of(problem), expected)


@pytest.mark.parametrize("code_format", SCALED)
def test_every_integer_field(code_format):
    """Also -2^(bits - 1), which no quantiser writes, is the integer it looks like."""
    bits = native.CODE_FORMATS[code_format].bits
    values = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int32).view(1, -1)
    codes = native.pack_fields(values, bits)
    decoded = native.decode_coeffs(codes, values.shape[1], code_format, torch.ones(1, 1), 0)
    assert torch.equal(decoded, values.float())
    y = native.packed_gemm(
        torch.eye(values.shape[1]),
        None,
        codes,
        values.shape[1],
        code_format,
        torch.ones(1, 1),
        0,
        None,
    )
    assert torch.equal(y.T, values.float())


def test_bfloat14_is_a_bfloat16_without_two_bits():
    values = torch.tensor([[1.0, -2.5, 1e38, -1e-38, 3e-41, 0.0, -0.0, float("inf")]]).bfloat16()
    bits = values.view(torch.int16).int() & 0xFFFC
    codes = native.pack_fields(bits >> 2, 14)
    expected = bits.to(torch.uint16).view(torch.bfloat16).float()
    assert torch.equal(native.decode_coeffs(codes, 8, "bfloat14", None, 0), expected)


# ---- product -------------------------------------------------------------------------------------


def assert_product(problem, **options):
    z, mask, _, sparsity, *_, bias = problem
    coeffs = coeffs_of(problem)
    if mask is None:
        mask = full_mask(coeffs.shape[0], sparsity)
    y = native.packed_gemm(*problem, **options)
    assert_close(y, z, mask, coeffs, bias)
    return y


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 9, 33, 70])
@pytest.mark.parametrize(("code_format", "group"), form_and_group())
def test_product(rows, code_format, group):
    for n_atoms, d_out, sparsity in ((1, 1, 1), (7, 5, 3), (33, 17, 16), (488, 37, 244)):
        for all_atoms in (False, True):
            assert_product(
                make_packed(
                    rows,
                    n_atoms,
                    d_out,
                    sparsity,
                    code_format,
                    group=group,
                    all_atoms=all_atoms,
                ),
                num_threads=1,
            )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("all_atoms", [False, True])
@pytest.mark.parametrize(("code_format", "group"), [("bfloat14", 0), ("int8", 0), ("int4", 32)])
def test_dtypes_of_z(code_format, group, all_atoms, dtype):
    for rows in (1, 5, 50):
        problem = make_packed(
            rows, 300, 65, 150, code_format, group=group, all_atoms=all_atoms, dtype=dtype
        )
        assert_product(problem)
        *operands, bias = problem
        for bias_dtype in FLOATS:
            assert_product((*operands, bias.to(bias_dtype)))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 8, 50, 1300])
@pytest.mark.parametrize(("code_format", "group"), [("bfloat14", 0), ("int8", 0), ("int4", 128)])
def test_integers_give_equality(rows, code_format, group, dtype):
    """Sums of small integers are exact, so the only rounding is the last one."""
    problem = make_packed(rows, 300, 65, 150, code_format, group=group, dtype=dtype, exact=True)
    z, mask, *_, bias = problem
    expected = packed_gemm_reference(z, mask, coeffs_of(problem), bias)
    assert torch.equal(native.packed_gemm(*problem), expected.to(dtype))


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("group", [0, 16])
def test_dtypes_of_the_scale(group, scale_dtype):
    z, mask, codes, sparsity, name, scale, group, bias = make_packed(
        4, 65, 20, 30, "int8", group=group
    )
    assert_product((z, mask, codes, sparsity, name, scale.to(scale_dtype), group, bias))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("code_format", "group"), [("bfloat14", 0), ("int8", 0), ("int4", 64)])
def test_thread_count_changes_no_bit(rows, code_format, group):
    problem = make_packed(rows, 321, 6401, 160, code_format, group=group, dtype=torch.bfloat16)
    first = native.packed_gemm(*problem, num_threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(native.packed_gemm(*problem, num_threads=threads), first)


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_unpacked_product(rows, dtype):
    """bfloat14 coefficients are bfloat16 ones, so both products do the same arithmetic."""
    problem = make_packed(rows, 300, 70, 150, "bfloat14", dtype=dtype)
    z, mask, *_, bias = problem
    expected = native.sparse_gemm(z, mask, coeffs_of(problem).bfloat16(), bias)
    assert torch.equal(native.packed_gemm(*problem), expected)


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_no_mask_is_a_mask_of_ones(rows):
    for name, group in (("bfloat14", 0), ("int8", 0), ("int4", 16)):
        for n_atoms in (5, 64, 77):
            z, _, *rest = make_packed(rows, n_atoms, 19, 0, name, group=group, all_atoms=True)
            expected = native.packed_gemm(z, full_mask(19, n_atoms), *rest)
            assert torch.equal(native.packed_gemm(z, None, *rest), expected)


def test_an_int8_dictionary():
    """How x D is computed from a dictionary stored atom by atom."""
    generator = torch.Generator().manual_seed(0)
    dictionary = random_fields(generator, 40, 30, "int8").to(torch.int8)  # [n_atoms, d_in]
    scale = 0.01 + torch.rand(40, generator=generator).bfloat16()
    x = torch.randn(5, 30, generator=generator)
    y = native.packed_gemm(
        x, None, dictionary.view(torch.uint8), 30, "int8", scale[:, None], 0, None
    )
    expected = x.double() @ (dictionary.double() * scale.double()[:, None]).T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 40])
def test_layouts(rows):
    z, mask, codes, sparsity, name, scale, group, bias = make_packed(
        rows, 65, 20, 30, "int4", group=8
    )
    expected = native.packed_gemm(z, mask, codes, sparsity, name, scale, group, bias)
    wide = torch.full((rows, 80), float("nan"))
    wide[:, 7:72] = z
    strided = native.packed_gemm(
        wide[:, 7:72],
        mask.T.contiguous().T,
        codes.repeat_interleave(2, 1)[:, ::2],
        sparsity,
        name,
        scale.T.contiguous().T,
        group,
        bias.repeat_interleave(3)[::3],
    )
    assert torch.equal(strided, expected)
    batched = native.packed_gemm(z[:, None], mask, codes, sparsity, name, scale, group, bias)
    assert torch.equal(batched[:, 0], expected)


def test_empty_operands():
    z, mask, codes, sparsity, name, scale, group, bias = make_packed(2, 9, 4, 3, "int8")
    none = (mask[:0], codes[:0], sparsity, name, scale[:0], group, bias[:0])
    assert native.packed_gemm(z, *none).shape == (2, 0)
    no_atoms = native.packed_gemm(
        torch.empty(2, 0), None, torch.empty(4, 0).byte(), 0, name, scale, 0, bias
    )
    assert torch.equal(no_atoms, bias.expand(2, 4))
    no_coeffs = native.packed_gemm(
        z, torch.zeros_like(mask), codes[:, :0], 0, name, torch.ones(4, 0), 128, bias
    )
    assert torch.equal(no_coeffs, bias.expand(2, 4))


def test_a_mask_that_lies_gives_numbers_and_no_fault():
    problem = make_packed(3, 65, 20, 30, "int4", group=8)
    for wrong in (torch.full_like(problem[1], 255), torch.zeros_like(problem[1])):
        for rows in (3, 50):
            z = torch.ones(rows, 65)
            assert native.packed_gemm(z, wrong, *problem[2:]).shape == (rows, 20)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(())}, r"z: expected shape \[..., n_atoms\], got a scalar"),
        ({"z": torch.zeros(2, 65).double()}, "z: expected float32 or bfloat16 or float16"),
        ({"z": torch.zeros(2, 65, device="meta")}, "z: expected a strided CPU tensor"),
        ({"mask": torch.zeros(20, 8).byte()}, r"mask: expected shape \[20, 9\], got \[20, 8\]"),
        ({"mask": torch.zeros(20, 9)}, "mask: expected uint8, got float32"),
        ({"mask": None}, "sparsity: expected all 65 atoms of z without a mask, got 30"),
        (
            {"codes": torch.zeros(20, 16).byte()},
            r"codes: expected shape \[\*, 15\], got \[20, 16\]",
        ),
        ({"codes": torch.zeros(20, 15)}, "codes: expected uint8"),
        ({"codes": torch.zeros(15).byte()}, r"codes: expected shape \[\*, 15\]"),
        ({"sparsity": -1}, "sparsity: expected at least 0, got -1"),
        ({"sparsity": 31}, r"codes: expected shape \[\*, 16\]"),
        (
            {"z": torch.zeros(2, 20), "mask": torch.zeros(20, 3).byte()},
            "s = 30 is more than the 20",
        ),
        ({"code_format": "int7"}, "code_format: expected one of bfloat14, int8, .* got 'int7'"),
        ({"scale": None}, r"scale: int4 needs scales \[d_out, n_groups\], got None"),
        ({"scale": torch.ones(20, 1)}, r"scale: expected shape \[20, 4\], got \[20, 1\]"),
        ({"scale": torch.ones(20, 4).double()}, "scale: expected float32 or bfloat16 or float16"),
        ({"group": -8}, "group: expected 0 .* got -8"),
        ({"group": 16}, r"scale: expected shape \[20, 2\], got \[20, 4\]"),
        ({"bias": torch.zeros(21)}, r"bias: expected shape \[20\], got \[21\]"),
        ({"num_threads": 0}, "num_threads: expected at least 1"),
    ],
)
def test_wrong_arguments(change, message):
    names = ("z", "mask", "codes", "sparsity", "code_format", "scale", "group", "bias")
    problem = make_packed(2, 65, 20, 30, "int4", group=8)
    with pytest.raises(InputError, match=message):
        native.packed_gemm(**(dict(zip(names, problem, strict=True)) | change))


def test_bfloat14_takes_no_scale():
    z, mask, codes, sparsity, name, _, _, bias = make_packed(2, 65, 20, 30, "bfloat14")
    for scale, group in ((torch.ones(20, 1), 0), (None, 8)):
        with pytest.raises(InputError, match="bfloat14 has no scales"):
            native.packed_gemm(z, mask, codes, sparsity, name, scale, group, bias)
        with pytest.raises(InputError, match="bfloat14 has no scales"):
            native.decode_coeffs(codes, sparsity, name, scale, group)
