"""Packing of supports into bit masks, and its checks."""

from __future__ import annotations

import pytest
import torch
from sparse_problems import random_indices

from cospadi import native
from cospadi.errors import InputError
from cospadi.reference import pack_mask_reference, unpack_mask_reference


@pytest.mark.parametrize("n_atoms", [1, 7, 8, 9, 31, 32, 33, 64, 100, 488])
def test_round_trip(n_atoms):
    generator = torch.Generator().manual_seed(n_atoms)
    for sparsity in sorted({1, max(1, n_atoms // 2), n_atoms}):
        indices = random_indices(generator, 13, n_atoms, sparsity)
        mask = native.pack_mask(indices, n_atoms)
        assert mask.shape == (13, (n_atoms + 7) // 8)
        assert torch.equal(mask, pack_mask_reference(indices, n_atoms))
        assert torch.equal(native.unpack_mask(mask, n_atoms, sparsity), indices)
        assert torch.equal(unpack_mask_reference(mask, n_atoms, sparsity), indices)
        native.validate_mask(mask, n_atoms, sparsity)


def test_bit_order_is_little_endian():
    mask = native.pack_mask(torch.tensor([[0, 3, 9]], dtype=torch.int32), 10)
    assert mask.tolist() == [[0b1001, 0b10]]


def test_strided_operands():
    indices = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    expected = native.pack_mask(indices, 9)
    assert torch.equal(native.pack_mask(indices.T.contiguous().T, 9), expected)
    strided = expected.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(native.unpack_mask(strided, 9, 3), indices)


def test_empty():
    assert native.pack_mask(torch.empty((0, 4), dtype=torch.int32), 9).shape == (0, 2)
    assert native.pack_mask(torch.empty((3, 0), dtype=torch.int32), 9).tolist() == [[0, 0]] * 3
    assert native.unpack_mask(torch.zeros((3, 2), dtype=torch.uint8), 9, 0).shape == (3, 0)
    native.validate_mask(torch.empty((0, 2), dtype=torch.uint8), 9, 4)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[0, 2], [1, 1]], "indices row 1: expected strictly ascending atoms, got 1 after 1"),
        ([[2, 0]], "indices row 0: expected strictly ascending atoms, got 0 after 2"),
        ([[0, 9]], r"indices row 0: expected atoms in 0 \.\. 8, got 9"),
        ([[-1, 2]], r"indices row 0: expected atoms in 0 \.\. 8, got -1"),
    ],
)
def test_wrong_indices(indices, message):
    with pytest.raises(InputError, match=message):
        native.pack_mask(torch.tensor(indices, dtype=torch.int32), 9)


def test_wrong_masks():
    mask = native.pack_mask(torch.tensor([[0, 1], [2, 8]], dtype=torch.int32), 9)
    for check in (native.unpack_mask, native.validate_mask):
        with pytest.raises(InputError, match="mask row 0: expected exactly s = 3 set bits, got 2"):
            check(mask, 9, 3)
        padding = mask.clone()
        padding[1, 1] = 0b10
        with pytest.raises(InputError, match="mask row 1: bits above the last atom 8 must be zero"):
            check(padding, 9, 2)
        with pytest.raises(InputError, match=r"expected shape \[\*, 3\], got \[2, 2\]"):
            check(mask, 17, 2)
        with pytest.raises(InputError, match="sparsity: expected 0 to n_atoms = 9, got 10"):
            check(mask, 9, 10)
        with pytest.raises(InputError, match="expected uint8, got int32"):
            check(mask.int(), 9, 2)
    with pytest.raises(InputError, match="expected int32, got int64"):
        native.pack_mask(torch.zeros((1, 1), dtype=torch.int64), 9)
    with pytest.raises(InputError, match="n_atoms: expected 0"):
        native.pack_mask(torch.zeros((1, 1), dtype=torch.int32), -1)
