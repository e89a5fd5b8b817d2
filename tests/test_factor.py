from __future__ import annotations

import pytest
import torch

from cospadi import native
from cospadi.errors import CheckpointError, InputError
from cospadi.factor.checks import check_mask, mask_to_bool
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import (
    COEFFS_DTYPES,
    DICTIONARY_DTYPES,
    PACKED_COEFFS,
    FactorSpec,
    removed_shares,
)


def spec(**changes) -> FactorSpec:
    values = {"d_in": 6, "d_out": 5, "n_atoms": 10, "sparsity": 3, "support": "mask", "bias": False}
    return FactorSpec(**{**values, **changes})


def example(n_atoms: int, sparsity: int, d_in: int = 6, d_out: int = 5) -> SparseFactor:
    torch.manual_seed(n_atoms)
    rows = [torch.randperm(n_atoms)[:sparsity].sort().values for _ in range(d_out)]
    return SparseFactor.from_indices(
        torch.randn(d_in, n_atoms),
        torch.stack(rows).to(torch.int32),
        torch.randn(d_out, sparsity),
        torch.randn(d_out),
    )


def test_spec_counts_bits_of_the_worked_example():
    # 4096 x 12288 at k/s = 2: K = 3657, s = 1828 stores 20 % less, and K = 3932, s = 1966 drops 20 % of the values.
    stored = FactorSpec(4096, 12288, 3657, 1828, "mask", False)
    assert stored.dictionary_bits == 16 * 4096 * 3657
    assert stored.mask_bits == 8 * 458 * 12288  # 3657 bits take 458 bytes
    assert stored.coeffs_bits == 16 * 1828 * 12288
    assert stored.stored_bytes * 8 == stored.stored_bits
    assert stored.stored_ratio == pytest.approx(0.2, abs=2e-4)
    nominal = FactorSpec(4096, 12288, 3932, 1966, "mask", False)
    assert nominal.values_ratio == pytest.approx(0.2, abs=2e-4)
    assert nominal.stored_ratio < nominal.values_ratio


def test_full_support_has_no_mask_bits():
    full = spec(support="full", sparsity=10)
    assert full.mask_bits == 0
    assert full.stored_bits == 16 * (6 * 10 + 10 * 5)
    assert full.values_ratio == full.stored_ratio


def test_storage_types_count():
    assert spec(dictionary_dtype="float32").dictionary_bits == 2 * spec().dictionary_bits
    # 10 atoms of 6 bytes with a scale each
    assert spec(dictionary_dtype="int8").dictionary_bits == 8 * 10 * 6 + 16 * 10
    # 3 coefficients of 5 outputs: fields, padded to bytes, and scales
    bits = {name: spec(coeffs_dtype=name).coeffs_bits for name in COEFFS_DTYPES}
    assert bits == {
        "bfloat16": 5 * 48,
        "float16": 5 * 48,
        "float32": 5 * 96,
        "bfloat14": 5 * 48,  # 42 bits
        "int8": 5 * (24 + 16),
        "int6": 5 * (24 + 16),  # 18 bits
        "int5": 5 * (16 + 16),  # 15 bits
        "int4": 5 * (16 + 16),
        "int3": 5 * (16 + 16),  # 9 bits
    }
    grouped = spec(coeffs_dtype="int8", coeffs_group=2)
    assert (grouped.n_scale_groups, grouped.coeffs_bits) == (2, 5 * (24 + 32))


def test_packed_types_are_known_to_the_kernels():
    assert set(PACKED_COEFFS) <= set(native.CODE_FORMATS)
    assert set(COEFFS_DTYPES) & set(DICTIONARY_DTYPES) >= {"bfloat16", "float16", "float32"}


def test_identity_atoms_cost_mask_bits_only():
    augmented = spec(n_identity=6, sparsity=7)
    assert augmented.total_atoms == 16
    assert augmented.dictionary_bits == spec().dictionary_bits
    assert augmented.mask_bits == 5 * 16
    assert augmented.coeffs_bits == 16 * 7 * 5
    pruned = spec(n_identity=6, n_atoms=0)
    assert pruned.tensors().keys() == {"mask", "coeffs"}
    assert pruned.stored_bits == 5 * (8 + 3 * 16)
    assert pruned.n_values == 15
    dense = spec(n_identity=6, n_atoms=0, sparsity=6, support="full")
    assert dense.stored_bits == dense.dense_bits
    assert dense.stored_ratio == dense.values_ratio == 0.0


def test_ratios_of_the_paper():
    # method of arXiv 2509.22075 for 4096 x 12288 at 0.2: Eq. 10 gives K = 3657, Eq. 11 K = 3932
    eq10 = FactorSpec(4096, 12288, 3657, 1828, "mask", False)
    assert eq10.mask16_ratio == pytest.approx(0.2, abs=4e-4)  # K and s are rounded down
    eq11 = FactorSpec(4096, 12288, 3932, 1966, "mask", False)
    assert eq11.mask14_ratio == pytest.approx(0.2, abs=2e-4)
    assert eq11.mask14_ratio == pytest.approx(eq11.values_ratio, abs=1e-12)  # k/s = 2
    # nominal numbers do not depend on what is stored
    packed = FactorSpec(4096, 12288, 3932, 1966, "mask", False, "int8", "int4", 0, 128)
    assert (packed.mask16_bits, packed.mask14_bits) == (eq11.mask16_bits, eq11.mask14_bits)
    small = spec()
    assert small.mask16_bits == 16 * (6 * 10 + 3 * 5) + 10 * 5
    assert small.mask14_bits == 16 * 6 * 10 + 14 * 3 * 5 + 10 * 5
    full = spec(support="full", sparsity=10)
    assert full.mask14_bits == full.mask16_bits == 16 * full.n_values


def test_a_shared_dictionary_counts_once():
    leader, member = spec(), spec(owns_dictionary=False, d_out=9)
    assert member.dictionary_bits == 0
    assert member.tensors().keys() == {"mask", "coeffs"}
    assert member.dictionary_tensors() == leader.dictionary_tensors()
    shares = removed_shares([leader, member])
    values = 6 * 10 + 3 * (5 + 9)
    assert shares["values"] == pytest.approx(1 - values / (6 * 14))
    assert shares["mask16"] == pytest.approx(1 - (16 * values + 10 * 14) / (16 * 6 * 14))
    assert shares["stored"] == pytest.approx(1 - (16 * values + 16 * 14) / (16 * 6 * 14))
    whole = removed_shares([leader, member], other_values=100)
    assert whole["values"] == pytest.approx(1 - (values + 100) / (6 * 14 + 100))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_in": 0}, "d_in"),
        ({"d_out": 2**31}, "d_out"),
        ({"n_atoms": True}, "n_atoms: expected an integer"),
        ({"n_atoms": 10.0}, "n_atoms: expected an integer"),
        ({"d_in": 10**400}, "an integer of 1329 bits"),
        ({"sparsity": 11}, "exceeds the 10 atoms"),
        ({"n_atoms": 0}, "n_atoms: expected at least 1 without identity atoms"),
        ({"n_identity": 5}, "n_identity: expected 0 or d_in = 6, got 5"),
        ({"n_identity": -1}, "n_identity: expected 0 to"),
        ({"n_identity": 6, "sparsity": 17}, "exceeds the 16 atoms"),
        ({"n_identity": 6, "n_atoms": 0, "owns_dictionary": False}, "nothing to share"),
        ({"n_identity": 6, "n_atoms": 0, "dictionary_dtype": "int8"}, "must be bfloat16"),
        ({"coeffs_group": 4}, "coeffs_group: bfloat16 coefficients have no scale"),
        ({"coeffs_group": 4, "coeffs_dtype": "bfloat14"}, "bfloat14 coefficients have no scale"),
        ({"coeffs_group": -1, "coeffs_dtype": "int8"}, "coeffs_group: expected 0 to"),
        ({"coeffs_group": 1.0, "coeffs_dtype": "int8"}, "coeffs_group: expected an integer"),
        ({"owns_dictionary": 0}, "owns_dictionary"),
        ({"support": "half"}, "support"),
        ({"support": "full"}, "full support uses all 10 atoms"),
        ({"bias": 1}, "bias"),
        ({"coeffs_dtype": "int7"}, "coeffs_dtype"),
        ({"dictionary_dtype": "int4"}, "dictionary_dtype"),
        ({"dictionary_dtype": None}, "dictionary_dtype"),
        ({"d_in": 2**30, "d_out": 2**30}, "exceed the limit"),
        ({"d_in": 2**30, "n_atoms": 2**20}, "exceed the limit"),
        ({"d_in": 2**30, "n_identity": 2**30, "n_atoms": 2**30 + 5}, "atoms in all exceed"),
    ],
)
def test_spec_rejects(changes, words):
    with pytest.raises(InputError, match=words):
        spec(**changes)


def test_bit_order():
    indices = torch.tensor([[0, 9], [7, 8]], dtype=torch.int32)
    factor = SparseFactor.from_indices(torch.ones(3, 10), indices, torch.ones(2, 2))
    assert factor.mask.tolist() == [[0b00000001, 0b00000010], [0b10000000, 0b00000001]]


@pytest.mark.parametrize("n_atoms", [1, 7, 8, 9, 16, 31, 33])
def test_dense_weight_against_loops(n_atoms):
    sparsity = max(1, n_atoms // 2)
    factor = example(n_atoms, sparsity)
    expected = torch.zeros(5, 6)
    indices = factor.indices()
    assert indices.dtype == torch.int32
    for row in range(5):
        for position in range(sparsity):
            atom = int(indices[row, position])
            expected[row] += factor.coeffs[row, position] * factor.dictionary[:, atom]
    torch.testing.assert_close(factor.dense_weight(), expected)
    assert factor.dense_weight(torch.float64).dtype == torch.float64
    factor.validate("layer")
    again = SparseFactor.from_indices(factor.dictionary, indices, factor.coeffs)
    assert torch.equal(again.mask, factor.mask)


def test_every_atom_used_equals_full_support():
    masked = example(9, 9)
    full = SparseFactor(masked.dictionary, None, masked.coeffs)
    torch.testing.assert_close(full.dense_weight(), masked.dense_weight())
    assert torch.equal(full.indices(), masked.indices())
    assert full.spec.support == "full"


def test_to_changes_types_and_keeps_the_mask():
    factor = example(9, 4)
    half = factor.to(torch.bfloat16)
    assert half.mask is factor.mask
    assert half.spec == FactorSpec(6, 5, 9, 4, "mask", True)
    assert factor.spec.coeffs_dtype == "float32"


def test_from_indices_rejects():
    dictionary, coeffs = torch.ones(3, 5), torch.ones(1, 2)
    for bad, words in (
        ([[1, 1]], "ascending"),
        ([[2, 1]], "ascending"),
        ([[0, 5]], "outside"),
        ([[-1, 2]], "outside"),
        ([[0, 1, 2]], "expected indices of the shape of coeffs"),
    ):
        with pytest.raises(InputError, match=words):
            SparseFactor.from_indices(dictionary, torch.tensor(bad), coeffs)


def test_mask_to_bool_and_check_mask():
    bits = torch.rand(50, 21) < 0.5
    bits[:, :3] = True
    counts = bits.sum(1)
    factor = SparseFactor.from_indices(
        torch.ones(2, 21), bits[0].nonzero().T.to(torch.int32), torch.ones(1, int(counts[0]))
    )
    assert torch.equal(mask_to_bool(factor.mask, 21), bits[:1])
    for value in range(256):  # population count against Python's, for every byte
        row = torch.tensor([[value]], dtype=torch.uint8)
        check_mask(row, 8, value.bit_count(), "mask")
        with pytest.raises(CheckpointError, match=f"row 0 selects {value.bit_count()} atoms"):
            check_mask(row, 8, 9, "mask")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.mask[2].zero_(), "layer.mask: row 2 selects 0 atoms, expected 4"),
        (lambda f: f.mask[3, 1].bitwise_or_(0x80), "layer.mask: row 3 has a padding bit"),
        (lambda f: f.coeffs[0].fill_(float("nan")), "layer.coeffs: holds a value"),
        (lambda f: f.dictionary[0].fill_(float("inf")), "layer.dictionary: holds a value"),
        (lambda f: f.bias[0].fill_(float("-inf")), "layer.bias: holds a value"),
        (lambda f: setattr(f, "mask", f.mask.int()), "layer.mask: expected uint8"),
        (lambda f: setattr(f, "mask", f.mask[:, :1]), r"layer.mask: expected uint8 \[5, 2\]"),
        (
            lambda f: setattr(f, "bias", f.bias[:2]),
            r"layer.bias: expected .*\[5\], got float32 \[2\]",
        ),
        (lambda f: setattr(f, "coeffs", f.coeffs.double()), "layer: coeffs_dtype"),
        (lambda f: setattr(f, "coeffs", f.coeffs[0]), "layer: expected two-dimensional"),
    ],
)
def test_validate_names_the_tensor(damage, words):
    factor = example(9, 4)
    damage(factor)
    with pytest.raises(CheckpointError, match=words):
        factor.validate("layer")


def packed_example() -> SparseFactor:
    """Return 5 outputs of 7 int5 coefficients over 6 identity and 10 int8 atoms, in groups of 3."""
    torch.manual_seed(0)
    rows = [torch.randperm(16)[:7].sort().values for _ in range(5)]
    return SparseFactor.from_indices(
        torch.randint(-127, 128, (10, 6), dtype=torch.int8),
        torch.stack(rows).to(torch.int32),
        torch.randint(-15, 16, (5, 7), dtype=torch.int32),
        torch.randn(5).bfloat16(),
        n_identity=6,
        packed_dtype="int5",
        coeffs_scale=(torch.rand(5, 3) + 0.1).bfloat16(),
        coeffs_group=3,
        dictionary_scale=(torch.rand(10) + 0.1).bfloat16(),
    )


def test_packed_factor_against_loops():
    factor = packed_example()
    factor.validate("layer")
    assert factor.spec == FactorSpec(6, 5, 10, 7, "mask", True, "int8", "int5", 6, 3)
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for n in range(5):
        used = [a for a in range(16) if factor.mask[n, a // 8] >> a % 8 & 1]
        row = int.from_bytes(bytes(factor.coeffs[n].tolist()), "little")
        for j, a in enumerate(used):
            field = row >> 5 * j & 31
            value = (field - 32 if field >= 16 else field) * float(factor.coeffs_scale[n, j // 3])
            if a < 6:
                expected[n, a] += value
            else:
                atom = factor.dictionary[a - 6].double() * factor.dictionary_scale[a - 6].double()
                expected[n] += value * atom
    torch.testing.assert_close(factor.dense_weight(torch.float64), expected)
    assert factor.dense_code().shape == (5, 16)


def test_bfloat14_is_the_upper_part_of_a_bfloat16():
    values = torch.randn(4, 5).bfloat16()
    fields = (values.view(torch.int16).to(torch.int32) & 0xFFFF) >> 2
    factor = SparseFactor.from_indices(None, None, fields, n_identity=5, packed_dtype="bfloat14")
    factor.validate("layer")
    truncated = (values.view(torch.int16) & ~3).view(torch.bfloat16)
    assert torch.equal(factor.dense_weight(), truncated.float())


def test_pruned_weight_is_kept_unchanged():
    weight = torch.randn(5, 9)
    keep = weight.abs().argsort(dim=1)[:, -4:].sort(dim=1).values
    factor = SparseFactor.from_indices(
        None, keep.to(torch.int32), weight.gather(1, keep), n_identity=9
    )
    factor.validate("layer")
    assert torch.equal(
        factor.dense_weight(), torch.zeros(5, 9).scatter(1, keep, weight.gather(1, keep))
    )
    assert factor.spec == FactorSpec(
        9, 5, 0, 4, "mask", False, coeffs_dtype="float32", n_identity=9
    )


def test_augmented_is_the_sum_of_its_parts():
    torch.manual_seed(1)
    dictionary, coeffs = torch.randn(6, 4), torch.randn(5, 3)
    indices = torch.tensor(
        [[0, 5, 9], [1, 2, 3], [6, 7, 8], [5, 6, 7], [0, 1, 6]], dtype=torch.int32
    )
    factor = SparseFactor.from_indices(dictionary, indices, coeffs, n_identity=6)
    x = torch.randn(7, 6)
    code = torch.zeros(5, 10).scatter(1, indices.long(), coeffs)
    expected = torch.cat((x, x @ dictionary), dim=1) @ code.t()
    torch.testing.assert_close(x @ factor.dense_weight().t(), expected)


def test_to_leaves_what_is_packed():
    factor = packed_example()
    other = factor.to(torch.float16)
    assert other.bias.dtype == torch.float16
    for part in ("dictionary", "dictionary_scale", "mask", "coeffs", "coeffs_scale"):
        assert getattr(other, part) is getattr(factor, part)
    assert other.spec == factor.spec


def test_tensors_and_spec_make_the_factor_again():
    for factor in (packed_example(), example(9, 4)):
        again = SparseFactor.from_tensors(factor.spec, factor.tensors())
        assert again.spec == factor.spec
        assert again.tensors().keys() == factor.tensors().keys()
        assert torch.equal(again.dense_weight(), factor.dense_weight())


def test_stored_bits_are_those_of_the_tensors():
    for factor in (packed_example(), example(9, 4)):
        nbytes = {part: t.nbytes for part, t in factor.tensors().items() if part != "bias"}
        assert factor.spec.stored_bytes == sum(nbytes.values())


def test_from_indices_rejects_packed():
    fields = torch.ones(2, 3, dtype=torch.int32)
    with pytest.raises(InputError, match=r"packed_dtype: expected one of bfloat14.*got 'int2'"):
        SparseFactor.from_indices(None, None, fields, n_identity=3, packed_dtype="int2")
    with pytest.raises(InputError, match="pack_fields"):
        SparseFactor.from_indices(None, None, 99 * fields, n_identity=3, packed_dtype="int4")


def set_fields(value: int):
    def change(factor):
        fields = native.unpack_fields(factor.coeffs, 7, 5, signed=True)
        fields[2, 6] = value
        factor.coeffs = native.pack_fields(fields, 5)

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (set_fields(-16), "layer.coeffs: row 2 holds -16, expected at least -15"),
        (lambda f: f.coeffs[3, -1].bitwise_or_(0x80), "layer.coeffs: row 3 has a padding bit"),
        (lambda f: f.dictionary[4, 2].fill_(-128), "leader.dictionary: row 4 holds -128"),
        (lambda f: f.coeffs_scale[1].fill_(0), "layer.coeffs_scale: holds a scale that is not pos"),
        (
            lambda f: f.coeffs_scale[1].fill_(-1),
            "layer.coeffs_scale: holds a scale that is not pos",
        ),
        (lambda f: f.coeffs_scale[1].fill_(torch.nan), "layer.coeffs_scale: holds a value that"),
        (lambda f: f.coeffs_scale.fill_(3e38), "layer.coeffs: holds a value that is not finite"),
        (lambda f: f.dictionary_scale.fill_(0), "leader.dictionary_scale: holds a scale"),
        (lambda f: f.dictionary_scale.fill_(3e38), "leader.dictionary: holds a value"),
        (
            lambda f: setattr(f, "coeffs_scale", None),
            r"coeffs_scale: expected bfloat16 \[5, 3\], got none",
        ),
        (
            lambda f: setattr(f, "coeffs_scale", f.coeffs_scale.half()),
            "coeffs_scale: expected bfloat16",
        ),
        (lambda f: setattr(f, "coeffs", f.coeffs[:, 1:]), r"coeffs: expected uint8 \[5, 5\]"),
        (lambda f: setattr(f, "coeffs", f.coeffs.char()), "coeffs: expected uint8"),
        (
            lambda f: setattr(f, "dictionary_scale", None),
            "leader.dictionary_scale: expected bfloat16",
        ),
        (lambda f: setattr(f, "packing", None), "layer: coeffs_dtype"),
        (lambda f: setattr(f, "n_identity", 4), "layer: n_identity: expected 0 or d_in"),
        (lambda f: setattr(f, "dictionary", None), "layer: sparsity: 7 exceeds the 6 atoms"),
        (
            lambda f: setattr(f, "dictionary", f.dictionary.t().half()),
            "leader.dictionary_scale: expected none, got bfloat16",
        ),
    ],
)
def test_validate_packed(damage, words):
    factor = packed_example()
    damage(factor)
    with pytest.raises(CheckpointError, match=words):
        factor.validate("layer", "leader")


def test_bfloat14_must_be_finite():
    infinity = torch.full((1, 4), 0x7F80 >> 2, dtype=torch.int32)
    factor = SparseFactor.from_indices(None, None, infinity, n_identity=4, packed_dtype="bfloat14")
    with pytest.raises(CheckpointError, match=r"layer.coeffs: holds a value that is not finite"):
        factor.validate("layer")
