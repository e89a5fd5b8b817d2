"""Fitting weights to stored factors: reported errors, shared dictionaries, storage types."""

from __future__ import annotations

import pytest
import torch

from cospadi.errors import FitError, InputError
from cospadi.learn.budget import low_rank_size, sparse_size
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.methods import FactorSize
from cospadi.learn.options import LearnOptions
from cospadi.learn.quantize import StorageTypes
from cospadi.learn.whitening import identity_whitening, relative_error, whiten_gram


def problem(d_in: int = 48, d_out: int = 72, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(600, d_in, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    weight = torch.randn(d_out, d_in, generator=generator)
    return weight, x.T @ x / 600


def item(weight, gram, *, name="layer", data_free=False):
    whitening = identity_whitening(gram.shape[0]) if data_free else whiten_gram(gram, name)
    return FitInput(name, weight, None, gram, whitening)


def settings(method, size, *, dtype="bfloat16", coeffs=None, iterations=3, **rest):
    return FitSettings(
        method=method,
        size=FactorSize(0, *size),
        types=StorageTypes(dtype, coeffs or dtype),
        options=LearnOptions(iterations=iterations),
        **rest,
    )


@pytest.mark.parametrize("method", ["cospadi", "svd-llm", "svd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reported_error_is_that_of_the_stored_factor(method, dtype):
    weight, gram = problem()
    rank = low_rank_size(48, 72, 0.2)
    size = sparse_size(48, 72, 0.2) if method == "cospadi" else (rank, rank)
    one = item(weight, gram, data_free=method == "svd")
    ((factor, report),) = fit([one], settings(method, size, dtype=dtype))
    factor.validate("layer")
    found = relative_error(gram, weight, factor.dense_weight(torch.float64))
    assert report.relative_error == pytest.approx(found, rel=1e-9)
    if report.history:
        # the refits around rounding gain more than bf16 costs
        assert report.relative_error < report.history[-1].error_after_update


@pytest.mark.parametrize("coeffs", ["bfloat14", "int8", "int4"])
def test_packed_coefficients_decode_to_the_reported_error(coeffs):
    weight, gram = problem()
    ((factor, report),) = fit(
        [item(weight, gram)], settings("cospadi", sparse_size(48, 72, 0.2), coeffs=coeffs)
    )
    factor.validate("layer")
    found = relative_error(gram, weight, factor.dense_weight(torch.float64))
    assert report.relative_error == pytest.approx(found, rel=1e-9)


def test_cospadi_beats_svd_llm_at_equal_stored_bytes():
    weight, gram = problem(96, 160)
    rank = low_rank_size(96, 160, 0.3)
    one = item(weight, gram)
    ((_, sparse),) = fit([one], settings("cospadi", sparse_size(96, 160, 0.3), iterations=8))
    ((_, low_rank),) = fit([one], settings("svd-llm", (rank, rank)))
    assert sparse.relative_error < low_rank.relative_error


def test_group_of_one_is_the_single_fit_to_the_bit():
    weight, gram = problem()
    chosen = settings("cospadi", sparse_size(48, 72, 0.2))
    one = item(weight, gram)
    mean = torch.stack([gram]).mean(0)
    ((single, _),) = fit([one], chosen)
    ((grouped, _),) = fit([one], chosen, joint=whiten_gram(mean, "group"))
    assert torch.equal(single.dictionary, grouped.dictionary)
    assert torch.equal(single.coeffs, grouped.coeffs)
    assert torch.equal(single.mask, grouped.mask)


def test_members_of_a_group_hold_one_dictionary():
    (first, gram_a), (second, gram_b) = problem(seed=0), problem(d_out=50, seed=1)
    joint = whiten_gram((gram_a + gram_b) / 2, "group")
    results = fit(
        [item(first, gram_a, name="a"), item(second, gram_b, name="b")],
        settings("cospadi", sparse_size(48, 122, 0.2)),
        joint=joint,
    )
    (leader, report), (member, _) = results
    assert torch.equal(leader.dictionary, member.dictionary)
    assert report.relative_error == pytest.approx(
        relative_error(gram_a, first, leader.dense_weight(torch.float64)), rel=1e-9
    )
    assert report.group_errors[-1] <= report.group_errors[0]


def test_methods_that_share_nothing_refuse_a_group():
    weight, gram = problem()
    one = item(weight, gram)
    with pytest.raises(InputError, match="wanda"):
        fit([one, one], settings("wanda", (16, 8)), joint=one.whitening)


def test_overflowing_storage_type_is_a_fit_error():
    weight, gram = problem()
    with pytest.raises(FitError, match="float16"):
        fit([item(weight * 1e7, gram)], settings("cospadi", (16, 8), dtype="float16"))
