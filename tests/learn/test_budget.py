"""Sizes from ratios, against the paper's tables and by properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.errors import InputError
from cospadi.learn.budget import low_rank_size, sparse_size, stored_bits

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
