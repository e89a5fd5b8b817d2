"""Rounding in both directions: within a row over the Gram, between rows over the output metric."""

from __future__ import annotations

import itertools

import pytest
import torch

from cospadi import native
from cospadi.learn import feedback
from cospadi.learn.feedback import round_with_feedback
from cospadi.learn.output_metric import OutputMetric
from cospadi.learn.quantize import quantise_integers
from cospadi.learn.result import dense_code, top_support


def positive(n, seed, power=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    mixing *= torch.arange(1, n + 1) ** -power
    return mixing @ mixing.T + 1e-3 * torch.eye(n, dtype=torch.float64)


def problem(n, n_atoms, seed, bits=3, sparsity=None):
    generator = torch.Generator().manual_seed(100 + seed)
    gram, rows = positive(n_atoms, seed).float(), positive(n, seed + 1)
    coeffs = torch.randn(n, n_atoms, generator=generator)
    indices = None
    if sparsity is not None:
        indices = top_support(torch.rand(n, n_atoms, generator=generator), sparsity)
        coeffs = coeffs.gather(1, indices.long())
    steps = quantise_integers(coeffs, bits).scale.float()
    return gram, rows, indices, coeffs, steps


def loss(gram, rows, indices, coeffs, steps, fields):
    error = coeffs - fields * steps
    if indices is not None:
        error = dense_code(indices, error, gram.shape[0])
    error = error.double()
    return float(((rows @ error @ gram.double()) * error).sum())


@pytest.mark.parametrize("sparsity", [None, 5])
def test_without_a_metric_rows_are_alone(sparsity):
    gram, _, indices, coeffs, steps = problem(11, 9, 0, sparsity=sparsity)
    fields = round_with_feedback(gram, None, indices, coeffs, steps, 3)
    assert torch.equal(fields, native.round_code(gram, indices, coeffs, steps, 3).fields)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 33])
def test_a_diagonal_metric_couples_nothing(n):
    gram, rows, _, coeffs, steps = problem(n, 12, 1)
    alone = round_with_feedback(gram, None, None, coeffs, steps, 3)
    diagonal = torch.diag(rows.diagonal())
    assert torch.equal(
        round_with_feedback(gram, OutputMetric(diagonal, 1.0), None, coeffs, steps, 3), alone
    )


@pytest.mark.parametrize("sparsity", [None, 14])
@pytest.mark.parametrize("n", [24, 40])
def test_coupled_rows_lose_less(n, sparsity):
    together = alone = 0.0
    for seed in range(8):
        given = problem(n, 24, seed, sparsity=sparsity)
        gram, rows, indices, coeffs, steps = given
        fields = round_with_feedback(gram, OutputMetric(rows, 1.0), indices, coeffs, steps, 3)
        assert int(fields.abs().max()) <= 3
        together += loss(*given, fields)
        alone += loss(*given, round_with_feedback(gram, None, indices, coeffs, steps, 3))
    assert together < (0.8 if sparsity is None else 0.95) * alone


def test_row_by_row_comes_near_the_best_integers(monkeypatch):
    monkeypatch.setattr(feedback, "BLOCK", 1)
    found = best = 0.0
    for seed in range(20):
        given = problem(2, 3, seed, bits=3)
        gram, rows, indices, coeffs, steps = given
        found += loss(
            *given, round_with_feedback(gram, OutputMetric(rows, 1.0), indices, coeffs, steps, 1)
        )
        grid = itertools.product((-1, 0, 1), repeat=6)
        best += min(loss(*given, torch.tensor(choice).reshape(2, 3)) for choice in grid)
    assert best <= found < 1.25 * best


def test_small_blocks_are_better_than_one_large(monkeypatch):
    losses = {}
    for block in (1, 8, 64):
        monkeypatch.setattr(feedback, "BLOCK", block)
        losses[block] = 0.0
        for seed in range(6):
            given = problem(64, 20, seed)
            gram, rows, indices, coeffs, steps = given
            fields = round_with_feedback(gram, OutputMetric(rows, 1.0), indices, coeffs, steps, 3)
            losses[block] += loss(*given, fields)
    assert losses[1] <= losses[8] * 1.02 < losses[64]


def test_groups_of_steps_reach_every_row():
    gram, rows, _, coeffs, _ = problem(20, 16, 5)
    chosen = quantise_integers(coeffs, 4, group=5)
    steps = chosen.scale.float()
    fields = round_with_feedback(gram, OutputMetric(rows, 1.0), None, coeffs, steps, 7, group=5)
    per_value = steps.repeat_interleave(5, dim=1)[:, :16]
    error = (coeffs - fields * per_value).double()
    plain = (coeffs - chosen.values).double()

    def of(e):
        return float(((rows @ e @ gram.double()) * e).sum())

    assert of(error) < of(plain)
