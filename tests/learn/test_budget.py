"""Sizes from ratios, against the paper's tables and by properties."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.errors import InputError
from cospadi.factor.spec import FactorSpec, removed_shares
from cospadi.learn.budget import (
    StorageWidths,
    augmented_sparsity,
    low_rank_size,
    sparse_size,
    stored_bits,
)

# CoSpaDi v6 Eq. 11 in the text's orientation (d_in x d_out): k, s at K / s = 2, and the SVD rank.
PAPER_SIZES = [
    (2048, 2048, 0.2, 1092, 546, 819),
    (2048, 512, 0.2, 364, 182, 327),
    (2048, 8192, 0.2, 2184, 1092, 1310),
    (8192, 2048, 0.2, 1456, 728, 1310),
    (4096, 14336, 0.3, 3649, 1824, 2230),
    (14336, 4096, 0.4, 2150, 1075, 1911),
    (576, 576, 0.2, 307, 153, 230),
    (576, 1536, 0.3, 460, 230, 293),
    (1536, 576, 0.4, 291, 145, 251),
]

# Linears of one decoder block (d_in, d_out) times their number, with the layer count.
LLAMA_1B = (16, [(2048, 2048)] * 2 + [(2048, 512)] * 2 + [(2048, 8192)] * 2 + [(8192, 2048)])
QWEN3_8B = (36, [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 12288)] * 2 + [(12288, 4096)])


@pytest.mark.parametrize(("d_in", "d_out", "ratio", "k", "s", "rank"), PAPER_SIZES)
def test_nominal_sizes_are_the_papers(d_in, d_out, ratio, k, s, rank):
    assert sparse_size(d_in, d_out, ratio, convention="nominal") == (k, s)
    assert low_rank_size(d_in, d_out, ratio) == rank


@pytest.mark.parametrize(
    ("model", "ratio", "total_mib"),
    [
        (LLAMA_1B, 0.2, 1484),
        (LLAMA_1B, 0.3, 1298),
        (LLAMA_1B, 0.4, 1113),
        (QWEN3_8B, 0.2, 10597),
        (QWEN3_8B, 0.3, 9271),
        (QWEN3_8B, 0.4, 7947),
    ],
)
def test_nominal_memory_is_table_10(model, ratio, total_mib):
    """With 14-bit coefficients the mask is paid for, and the totals are those of the paper's Table 10."""
    layers, shapes = model
    bits = 0
    for d_in, d_out in shapes:
        k, s = sparse_size(d_in, d_out, ratio, convention="nominal")
        bits += 16 * d_in * k + 14 * s * d_out + k * d_out
    assert round(layers * bits / 8 / 2**20) == pytest.approx(total_mib, abs=2)


def test_stored_ratio_is_met_from_below_and_nearly_used_up():
    for d_in, d_out in [
        (576, 576),
        (576, 192),
        (576, 1536),
        (1536, 576),
        (2048, 8192),
        (14336, 4096),
    ]:
        for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7):
            n_atoms, sparsity = sparse_size(d_in, d_out, ratio)
            budget = (1 - ratio) * 16 * d_in * d_out
            used = stored_bits(d_in, d_out, n_atoms, sparsity)
            assert used <= budget
            assert used >= 0.975 * budget, (d_in, d_out, ratio, n_atoms, sparsity)
            assert 1.7 <= n_atoms / sparsity <= 2.35


@given(
    d_in=st.integers(1, 300),
    d_out=st.integers(1, 300),
    ratio=st.floats(0.01, 0.99),
    rho=st.floats(1.0, 5.0),
)
def test_stored_size_never_exceeds_the_budget(d_in, d_out, ratio, rho):
    n_atoms, sparsity = sparse_size(d_in, d_out, ratio, k_over_s=rho)
    if sparsity == 0:
        assert n_atoms == 0
        return
    assert 1 <= sparsity <= n_atoms
    assert stored_bits(d_in, d_out, n_atoms, sparsity) <= (1 - ratio) * 16 * d_in * d_out


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan"), "0.2", None])
def test_ratio_outside_the_unit_interval_is_refused(ratio):
    with pytest.raises(InputError, match="ratio"):
        sparse_size(64, 64, ratio)


def test_k_over_s_below_one_is_refused():
    with pytest.raises(InputError, match="k_over_s"):
        sparse_size(64, 64, 0.2, k_over_s=0.5)


@pytest.mark.parametrize(
    ("d_in", "d_out", "ratio", "members", "rho", "n_atoms"),
    [
        # k = (1-g) m d1 d2 / (d1 + m d2 / rho), floored, computed by hand with exact fractions
        (4096, 11008, 0.2, 2, 2.0, 4776),
        (4096, 4096, 0.2, 2, 2.0, 3276),
        (4096, 4096, 0.2, 3, 2.0, 3932),
        (4096, 4096, 0.2, 1, 2.0, 2184),
        (2048, 512, 0.4, 2, 2.5, 512),
    ],
)
def test_group_size_is_that_of_the_joined_weight(d_in, d_out, ratio, members, rho, n_atoms):
    found, sparsity = sparse_size(d_in, members * d_out, ratio, k_over_s=rho, convention="nominal")
    exact = Fraction(str(1 - ratio)).limit_denominator(10) * members * d_in * d_out
    exact /= d_in + members * d_out / Fraction(str(rho))
    assert found == math.floor(exact) == n_atoms
    assert sparsity == math.floor(n_atoms / rho)
    # the shared dictionary is counted once, mask and coefficients once per member
    values = d_in * found + members * sparsity * d_out
    assert values <= (1 - ratio) * members * d_in * d_out


def test_last_group_of_an_odd_number_of_layers_has_its_own_size():
    full, _ = sparse_size(576, 2 * 1536, 0.2)
    last, _ = sparse_size(576, 1536, 0.2)
    assert last < full
    for d_out in (2 * 1536, 1536):
        n_atoms, sparsity = sparse_size(576, d_out, 0.2)
        bits = stored_bits(576, d_out, n_atoms, sparsity)
        assert 0.975 <= bits / (0.8 * 16 * 576 * d_out) <= 1.0


def test_eq_10_example_of_the_paper():
    """4096 x 12288 at 0.2: Eq. 10 gives k = 3657 and s = 1828, Eq. 11 gives 3932 and 1966."""
    shares = shares_of(4096, 12288, 3657, 1828)
    assert shares["mask16"] == pytest.approx(0.2, abs=4e-4)
    assert shares["stored"] == pytest.approx(shares["mask16"], abs=2e-4)  # padding of the mask
    shares = shares_of(4096, 12288, 3932, 1966)
    assert shares["values"] == pytest.approx(0.2, abs=2e-4)
    # at K / s = 2 two mantissa bits pay for the mask: nothing else changes
    assert shares["mask14"] == pytest.approx(shares["values"], abs=1e-9)
    assert shares_of(4096, 4096, 2184, 1092)["mask16"] == pytest.approx(0.167, abs=1e-3)
    assert shares_of(14336, 4096, 2150, 1075)["mask16"] == pytest.approx(0.391, abs=1e-3)


def test_eq_11_is_honest_only_at_two_atoms_per_coefficient():
    shares = shares_of(4096, 4096, 2400, 800)
    assert shares["mask14"] < shares["values"] - 0.01


def shares_of(d_in, d_out, n_atoms, sparsity):
    """Removed shares of one bf16 factor in every convention."""
    return removed_shares([FactorSpec(d_in, d_out, n_atoms, sparsity, "mask", bias=False)])


@pytest.mark.parametrize(
    ("widths", "row_bits"),
    [
        (StorageWidths(), 16 * 13),
        (StorageWidths(coeffs=14), 8 * 23),
        (StorageWidths(coeffs=8, coeffs_scaled=True), 8 * 13 + 16),
        (StorageWidths(coeffs=4, coeffs_scaled=True), 8 * 7 + 16),
        (StorageWidths(coeffs=4, coeffs_scaled=True, coeffs_group=4), 8 * 7 + 4 * 16),
        (StorageWidths(coeffs=3, coeffs_scaled=True, coeffs_group=13), 8 * 5 + 16),
    ],
)
def test_stored_bits_are_bytes_of_fields_and_scales(widths, row_bits):
    assert stored_bits(10, 6, 21, 13, widths=widths) == 16 * 10 * 21 + 6 * (row_bits + 24)
    full = stored_bits(10, 6, 13, 13, full_support=True, widths=widths)
    assert full == 16 * 10 * 13 + 6 * row_bits


def test_dictionary_width_and_scales_count():
    widths = StorageWidths(dictionary=8, dictionary_scaled=True)
    assert stored_bits(10, 6, 21, 13, widths=widths) == 21 * (80 + 16) + 6 * (208 + 24)


def test_identity_atoms_cost_mask_bits_only():
    assert stored_bits(10, 6, 0, 4, n_identity=10) == 6 * (4 * 16 + 16)
    assert stored_bits(10, 6, 3, 4, n_identity=10) == 480 + 6 * (4 * 16 + 16)
    int4 = StorageWidths(coeffs=4, coeffs_scaled=True, coeffs_group=64)
    dense = stored_bits(128, 6, 0, 128, n_identity=128, full_support=True, widths=int4)
    assert dense == 6 * (128 * 4 + 2 * 16)


WIDTHS = st.builds(
    StorageWidths,
    coeffs=st.sampled_from([3, 4, 8, 14, 16]),
    coeffs_scaled=st.booleans(),
    coeffs_group=st.sampled_from([0, 1, 7, 64]),
    dictionary=st.sampled_from([8, 16]),
    dictionary_scaled=st.booleans(),
)


@given(
    d_in=st.integers(1, 300),
    d_out=st.integers(1, 300),
    ratio=st.floats(0.01, 0.99),
    widths=WIDTHS,
    bound=st.one_of(st.none(), st.integers(1, 300)),
)
def test_sizes_of_any_width_fit(d_in, d_out, ratio, widths, bound):
    budget = (1 - ratio) * 16 * d_in * d_out
    n_atoms, sparsity = sparse_size(d_in, d_out, ratio, widths=widths, max_atoms=bound)
    assert 0 <= sparsity <= n_atoms <= (bound or n_atoms)
    if sparsity:
        assert stored_bits(d_in, d_out, n_atoms, sparsity, widths=widths) <= budget
    kept = augmented_sparsity(d_in, d_out, ratio, widths=widths)
    assert 0 <= kept <= d_in

    def pruned_bits(s):
        full = s == d_in  # no mask then
        return stored_bits(d_in, d_out, 0, s, n_identity=d_in, full_support=full, widths=widths)

    if kept:
        assert pruned_bits(kept) <= budget * (1 + 1e-12)
    if kept < d_in:  # one more does not fit, with a mask or, all of them, without
        assert pruned_bits(kept + 1) > budget * (1 - 1e-12)


def test_low_rank_size_counts_the_widths():
    assert low_rank_size(576, 1536, 0.2) == 335
    int8 = StorageWidths(coeffs=8, coeffs_scaled=True, dictionary=8, dictionary_scaled=True)
    assert low_rank_size(576, 1536, 0.2, convention="nominal", widths=int8) == 335
    rank = low_rank_size(576, 1536, 0.6, widths=int8)
    budget = 0.4 * 16 * 576 * 1536
    used, more = (
        stored_bits(576, 1536, r, r, full_support=True, widths=int8) for r in (rank, rank + 1)
    )
    assert used <= budget < more


def test_pruned_sizes():
    assert augmented_sparsity(576, 1536, 0.2, convention="nominal") == 460
    # (1-g) d_in - d_in / 16: the mask costs a sixteenth of the dense weight
    assert augmented_sparsity(576, 1536, 0.2) == 424
    assert (
        augmented_sparsity(576, 1536, 0.2, widths=StorageWidths(coeffs=8, coeffs_scaled=True))
        == 576
    )
    assert augmented_sparsity(16, 4, 0.95) == 0


def test_a_bound_on_the_atoms_goes_to_the_coefficients():
    d_in, d_out = 576, 1536 * 8
    free = sparse_size(d_in, d_out, 0.2)
    assert free[0] > d_in
    n_atoms, sparsity = sparse_size(d_in, d_out, 0.2, max_atoms=d_in)
    assert n_atoms == d_in
    assert sparsity > free[1]
    assert stored_bits(d_in, d_out, n_atoms, sparsity) >= 0.975 * 0.8 * 16 * d_in * d_out
    n_atoms, sparsity = sparse_size(d_in, d_out, 0.2, convention="nominal", max_atoms=d_in)
    assert (n_atoms, sparsity) == (576, 433)  # (0.8 d_in d_out - d_in^2) / d_out = 433.8
    assert sparse_size(d_in, d_in, 0.2, max_atoms=d_in) == sparse_size(d_in, d_in, 0.2)


@pytest.mark.parametrize(
    ("key", "value"), [("coeffs", 0), ("coeffs_group", -1), ("dictionary", 2.5), ("coeffs", True)]
)
def test_widths_out_of_range_are_refused(key, value):
    with pytest.raises(InputError, match=key):
        StorageWidths(**{key: value})


def test_a_bound_below_one_is_refused():
    with pytest.raises(InputError, match="max_atoms"):
        sparse_size(64, 64, 0.2, max_atoms=0)
