from __future__ import annotations

import pytest
import torch

from cospadi.errors import CheckpointError, InputError
from cospadi.factor import FactorSpec, SparseFactor, check_mask, mask_to_bool


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_in": 0}, "d_in"),
        ({"d_out": 2**31}, "d_out"),
        ({"n_atoms": True}, "n_atoms: expected an integer"),
        ({"n_atoms": 10.0}, "n_atoms: expected an integer"),
        ({"d_in": 10**400}, "an integer of 1329 bits"),
        ({"sparsity": 11}, "exceeds n_atoms"),
        ({"support": "half"}, "support"),
        ({"support": "full"}, "full support needs"),
        ({"bias": 1}, "bias"),
        ({"coeffs_dtype": "int4"}, "coeffs_dtype"),
        ({"dictionary_dtype": None}, "dictionary_dtype"),
        ({"d_in": 2**30, "d_out": 2**30}, "exceed the limit"),
        ({"d_in": 2**30, "n_atoms": 2**20}, "exceed the limit"),
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
        ([[0, 1, 2]], "expected dictionary"),
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
        (lambda f: setattr(f, "bias", f.bias[:2]), r"layer.bias: expected \[5\], got \[2\]"),
        (lambda f: setattr(f, "coeffs", f.coeffs.double()), "layer: coeffs_dtype"),
        (lambda f: setattr(f, "coeffs", f.coeffs[0]), "layer: expected two-dimensional"),
    ],
)
def test_validate_names_the_tensor(damage, words):
    factor = example(9, 4)
    damage(factor)
    with pytest.raises(CheckpointError, match=words):
        factor.validate("layer")
