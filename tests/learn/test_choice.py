"""`dictionary: auto` is never worse than what it chooses among."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cospadi.learn.baselines.low_rank import low_rank, truncated
from cospadi.learn.budget import BF16, stored_bits
from cospadi.learn.choice import learn_dictionary, shortlist
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.member import Member
from cospadi.learn.methods import candidate_sizes
from cospadi.learn.options import LearnOptions
from cospadi.learn.output_metric import output_metric
from cospadi.learn.quantize import StorageTypes
from cospadi.learn.whitening import whiten_gram

D_IN, D_OUT = 48, 64
OPTIONS = LearnOptions(penalty_growth=1.3)


def weight_of_kind(kind):
    """Weights that one corner suits: full of spikes, of low rank, columns of few atoms, or none of these."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "pruned":
        return normal(D_OUT, D_IN) * (torch.rand(D_OUT, D_IN, generator=generator) < 0.25)
    if kind == "low rank":
        return normal(D_OUT, 12) @ normal(12, D_IN) + 0.01 * normal(D_OUT, D_IN)
    if kind == "sparse code":
        code = normal(D_OUT, 32) * (torch.rand(D_OUT, 32, generator=generator) < 0.3)
        return code @ normal(32, D_IN)
    return normal(D_OUT, D_IN) + normal(D_OUT, 4) @ normal(4, D_IN)


def whitening():
    x = torch.randn(600, D_IN, generator=torch.Generator().manual_seed(1)).double()
    gram = x.T @ x / 600
    return gram, whiten_gram(gram, "w")


def metric():
    g = torch.randn(400, D_OUT, generator=torch.Generator().manual_seed(2)).double()
    g = g * torch.linspace(0.1, 3, D_OUT)
    return output_metric(g.T @ g / 400, "w")


def error_of(weight, settings, output=None):
    gram, white = whitening()
    item = FitInput("w", weight, None, gram, white, output=output)
    [(factor, _)] = fit([item], settings)
    return Member(weight, white, output).error(factor.dense_weight(torch.float64)), factor


@pytest.mark.parametrize("kind", ["pruned", "low rank", "sparse code", "mixed"])
@pytest.mark.parametrize("with_output", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.55])
def test_never_above_its_corners(kind, with_output, ratio):
    weight, output = weight_of_kind(kind), metric() if with_output else None
    sizes = candidate_sizes(D_IN, D_OUT, ratio, widths=BF16, learned_share=0.2)
    settings = FitSettings("cospadi", sizes[0], StorageTypes(), OPTIONS)
    chosen, factor = error_of(weight, dataclasses.replace(settings, candidates=sizes), output)
    for size in sizes:
        corner, _ = error_of(weight, dataclasses.replace(settings, size=size), output)
        assert chosen <= corner * (1 + 1e-9), size
    budget = (1 - ratio) * 16 * D_IN * D_OUT
    assert factor.spec.stored_bits <= budget
    if kind == "low rank" and ratio == 0.55:
        assert factor.spec.support == "full"
        assert factor.n_identity == 0
    if kind == "pruned":
        assert factor.n_identity == D_IN


def test_candidates_are_within_the_budget_and_distinct():
    for ratio in (0.1, 0.3, 0.6, 0.9):
        sizes = candidate_sizes(D_IN, D_OUT, ratio, widths=BF16)
        assert len(set(sizes)) == len(sizes)
        for size in sizes:
            bits = stored_bits(
                D_IN, D_OUT, size.n_atoms, size.sparsity,
                n_identity=size.n_identity, full_support=size.full_support,
            )  # fmt: skip
            assert bits <= (1 - ratio) * 16 * D_IN * D_OUT


def test_hopeless_sizes_are_not_fitted_in_full():
    weight = weight_of_kind("pruned")
    _, white = whitening()
    member = Member(weight, white)
    sizes = candidate_sizes(D_IN, D_OUT, 0.55, widths=BF16, learned_share=0.2)
    kept = shortlist([member], white, sizes, OPTIONS)
    assert 1 <= len(kept) < len(sizes)
    assert sizes[0] in kept
    assert sum(bool(size.n_identity and size.n_atoms) for size in kept) <= 2


def test_truncated_svd_in_the_metric_of_outputs_is_the_best_of_its_rank():
    weight, output = weight_of_kind("mixed"), metric()
    _, white = whitening()
    member = Member(weight, white, output)
    best = member.error(truncated(member, 10).dense_weight())
    assert best < member.error(low_rank(weight, white, 10).dense_weight())
    # Eckart-Young: the sum of the dropped squared singular values of R W L^T
    signals = member.weigh_outputs(white.whiten(weight))
    values = torch.linalg.svdvals(signals)
    assert best == pytest.approx(white.scale * float(values[10:].square().sum()), rel=1e-6)
    fitted = learn_dictionary(
        [member], white, candidate_sizes(D_IN, D_OUT, 0.55, widths=BF16)[-2], OPTIONS
    )
    assert fitted.factors[0].full_support
