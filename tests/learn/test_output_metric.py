"""Errors that count by what they do to the prediction: the metric, its refit, the splitting in it."""

from __future__ import annotations

import pytest
import torch

from cospadi.errors import InputError
from cospadi.learn import output_metric as metrics
from cospadi.learn import splitting
from cospadi.learn.augmented import fit_augmented
from cospadi.learn.fit import FitInput, FitSettings, fit
from cospadi.learn.group import unit_columns
from cospadi.learn.member import Member
from cospadi.learn.methods import FactorSize
from cospadi.learn.options import LearnOptions
from cospadi.learn.output_metric import RowScales, output_metric, row_scales
from cospadi.learn.quantize import StorageTypes
from cospadi.learn.refit import solve_on_support_jointly
from cospadi.learn.result import FloatFactor
from cospadi.learn.shared_dictionary import solve_dictionary
from cospadi.learn.splitting import Split
from cospadi.learn.whitening import whiten_gram


def random_fisher(d_out, seed=3, power=1.0):
    """Positive definite with a decaying spectrum and unequal diagonal."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_out, d_out, generator=generator, dtype=torch.float64)
    mixing *= torch.arange(1, d_out + 1) ** -power
    return 1e-5 * (mixing @ mixing.T)


def member(d_out=24, d_in=18, seed=0, fisher=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    mixing = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    mixing *= torch.arange(1, d_in + 1) ** -0.7
    gram = mixing @ mixing.T + 1e-4 * torch.eye(d_in, dtype=torch.float64)
    metric = output_metric(random_fisher(d_out), "layer") if fisher else None
    return Member(weight, whiten_gram(gram, "layer"), metric), gram


def test_metric_keeps_the_scale_and_shrinks_towards_the_identity():
    fisher = random_fisher(12)
    metric = output_metric(fisher, "layer", shrinkage=0.25)
    mean = float(fisher.diagonal().mean())
    assert metric.scale == pytest.approx(mean)
    expected = 0.75 * fisher / mean + 0.25 * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(metric.matrix, expected)
    torch.testing.assert_close(metric.factor.T @ metric.factor, metric.matrix)
    assert torch.equal(metric.factor, metric.factor.triu())


def test_no_gradient_means_no_metric():
    assert output_metric(torch.zeros(4, 4), "layer") is None


@pytest.mark.parametrize(
    ("fisher", "shrinkage", "match"),
    [
        (torch.ones(3, 4), 0.1, r"layer: .*\(3, 4\), expected square"),
        (torch.full((3, 3), float("nan")), 0.1, "layer: .*non-finite"),
        (torch.eye(3), 0.0, "shrinkage: .* got 0.0"),
    ],
)
def test_bad_metric(fisher, shrinkage, match):
    with pytest.raises(InputError, match=match):
        output_metric(fisher, "layer", shrinkage=shrinkage)


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_row_scales_are_the_roots_of_the_diagonal_to_the_next_power_of_two(power):
    diagonal = torch.tensor([1e-3, 1.0, 4.0, 250.0, 0.0], dtype=torch.float64)
    scales = row_scales(diagonal, "layer", power=power).scales
    assert float(scales.min()) == 1.0
    assert torch.equal(scales.log2(), scales.log2().round())
    share = metrics.DIAGONAL_SHRINKAGE
    wanted = ((1 - share) * diagonal / diagonal.mean() + share).sqrt() ** power
    off = (scales / wanted).log2()
    assert float(off.max() - off.min()) <= 1.0 + 1e-9
    assert row_scales(torch.zeros(4), "layer") is None
    with pytest.raises(InputError, match=r"layer: .*non-finite"):
        row_scales(torch.full((3,), float("inf")), "layer")
    with pytest.raises(InputError, match=r"layer: .*shape \(3, 3\), expected one dimension"):
        row_scales(torch.eye(3), "layer")


@pytest.mark.parametrize("n_atoms", [0, 5])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scaled_rows_are_a_fit_of_the_scaled_weight(n_atoms, dtype):
    item, gram = member(fisher=False)
    scales = 2.0 ** (torch.arange(24) % 5).double()
    settings = FitSettings(
        "cospadi", FactorSize(18, n_atoms, 9), StorageTypes(dtype, dtype, 0), LearnOptions()
    )
    given = FitInput("layer", item.weight, None, gram, item.whitening, output=RowScales(scales))
    scaled = FitInput("layer", item.weight * scales[:, None].float(), None, gram, item.whitening)
    ((factor, _),) = fit([given], settings)
    ((other, _),) = fit([scaled], settings)
    assert torch.equal(factor.mask, other.mask)
    assert torch.equal(factor.coeffs.double() * scales[:, None], other.coeffs.double())


def test_rows_that_count_more_lose_less():
    item, gram = member(d_out=96, fisher=False)
    scales = torch.where(torch.arange(96) < 8, 16.0, 1.0).double()
    settings = FitSettings(
        "cospadi", FactorSize(18, 4, 6), StorageTypes("float32", "float32", 0), LearnOptions()
    )

    def losses(output):
        given = FitInput("layer", item.weight, None, gram, item.whitening, output=output)
        ((factor, _),) = fit([given], settings)
        change = item.weight.double() - factor.dense_weight(torch.float64)
        return ((change @ gram) * change).sum(1)

    plain, weighed = losses(None), losses(RowScales(scales))
    assert float(weighed[:8].sum()) < float(plain[:8].sum())
    assert float((weighed * scales**2).sum()) < float((plain * scales**2).sum())


def test_scaled_rows_are_not_for_integers():
    item, gram = member(fisher=False)
    settings = FitSettings(
        "cospadi", FactorSize(18, 0, 9), StorageTypes("bfloat16", "int8", 0), LearnOptions()
    )
    scales = RowScales(torch.ones(24, dtype=torch.float64))
    given = FitInput("layer", item.weight, None, gram, item.whitening, output=scales)
    with pytest.raises(InputError, match="layer: scaled rows: expected floating-point"):
        fit([given], settings)


def test_member_error_is_the_trace_formula():
    item, gram = member()
    change = torch.randn(24, 18, generator=torch.Generator().manual_seed(1)).double()
    shrunk = item.output.scale * item.output.matrix
    expected = float(torch.trace(shrunk @ change @ gram @ change.T))
    assert item.error(item.weight.double() - change) == pytest.approx(expected, rel=1e-6)


def test_joint_refit_solves_the_coupled_normal_equations():
    generator = torch.Generator().manual_seed(2)
    n, atoms = 5, 7
    rows = random_fisher(n, power=0.5)
    rows /= rows.diagonal().mean()
    basis = torch.randn(atoms, 6, generator=generator, dtype=torch.float64)
    signals = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    mask = torch.zeros(n, atoms, dtype=torch.float64)
    for row in range(n):
        mask[row, torch.randperm(atoms, generator=generator)[:3]] = 1.0
    gram = basis @ basis.T
    found = solve_on_support_jointly(
        gram, rows, signals @ basis.T, mask, torch.zeros_like(mask), steps=200
    )
    # all coefficients in one vector: (rows kron gram) restricted to the support
    free = mask.flatten().bool()
    matrix = torch.kron(rows, gram)[free][:, free]
    right = (rows @ signals @ basis.T).flatten()[free]
    exact = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(found.flatten()[free], exact, rtol=2e-3, atol=1e-4)
    assert bool((found.flatten()[~free] == 0).all())


def test_joint_refit_never_gets_worse_than_its_start():
    item, _ = member()
    factor = fit_augmented([item], item.whitening, 2, 6, LearnOptions(sweeps=1)).factors[0]
    noisy = FloatFactor(factor.dictionary, factor.indices, factor.coeffs * 1.2, factor.n_identity)
    refitted = item.refit(noisy, noisy.dictionary)
    assert item.error(refitted.dense_weight()) < item.error(noisy.dense_weight())


def test_dictionary_update_is_least_squares_in_the_metric():
    item, _ = member()
    generator = torch.Generator().manual_seed(5)
    dictionary = torch.randn(18, 3, generator=generator, dtype=torch.float64)
    indices = torch.stack(
        [torch.randperm(21, generator=generator)[:8].sort()[0] for _ in range(24)]
    )
    coeffs = torch.randn(24, 8, generator=generator, dtype=torch.float64)
    factor = FloatFactor(dictionary, indices.int(), coeffs, 18)
    found = solve_dictionary([item], [factor], ridge=1e-12)
    code = factor.code()
    weigh = item.output.factor
    rest = item.weight.double() - code[:, :18]
    expected = torch.linalg.lstsq(weigh @ code[:, 18:], weigh @ rest).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("n_atoms", [0, 3])
def test_split_step_solves_its_penalised_problem(monkeypatch, fisher, n_atoms):
    monkeypatch.setattr(metrics, "LEVEL_RATIO", 1.0)  # every eigenvalue by itself
    item, _ = member(fisher=fisher)
    dictionary = torch.randn(
        18, n_atoms, generator=torch.Generator().manual_seed(7), dtype=torch.float64
    )
    split = Split(item, dictionary)
    anchor, penalty = split.sparse.double().clone(), 0.3
    split.step(penalty, 5)
    solution = (split.sparse + split.dual).double()  # the dual was zero
    gram, correlations = split.problem.gram.double(), split.problem.correlations.double()
    if fisher:
        correlations = split.outputs.vectors.double() @ correlations
    metric = torch.eye(24).double() if not fisher else split.outputs.matrix.double()
    gradient = metric @ (solution @ gram - correlations) + penalty * (solution - anchor)
    assert float(gradient.abs().max()) < 1e-4 * float(correlations.abs().max())


def test_rotated_codes_follow_the_codes():
    item, _ = member()
    split = Split(item, torch.randn(18, 3, generator=torch.Generator().manual_seed(7)).double())
    penalty = 0.05
    for _ in range(6):
        split.step(penalty, 6)
        split.relax(1.3)
        penalty *= 1.3
        split.update_dictionary()
    vectors = split.outputs.vectors
    torch.testing.assert_close(split.rotated_sparse, vectors.T @ split.sparse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(split.rotated_dual, vectors.T @ split.dual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fisher", [False, True])
def test_update_inside_the_rise_is_the_general_one(monkeypatch, fisher):
    monkeypatch.setattr(splitting, "ATOM_RELAXATION", 1.0)
    monkeypatch.setattr(metrics, "LEVEL_RATIO", 1.0)
    item, _ = member(fisher=fisher)
    split = Split(item, torch.randn(18, 3, generator=torch.Generator().manual_seed(7)).double())
    split.step(0.1, 8)
    before = split.factor()
    expected = unit_columns(
        [
            FloatFactor(
                solve_dictionary([item], [before]), before.indices, before.coeffs, before.n_identity
            )
        ]
    )[0]
    split.update_dictionary()
    found = split.factor()
    torch.testing.assert_close(found.dictionary, expected.dictionary, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.dense_weight(), expected.dense_weight(), rtol=1e-3, atol=1e-4)


def test_fit_in_the_metric_loses_less_of_the_prediction():
    item, _ = member(48, 32)
    plain = Member(item.weight, item.whitening)
    options = LearnOptions()
    with_metric = fit_augmented([item], item.whitening, 2, 12, options).factors[0]
    without = fit_augmented([plain], item.whitening, 2, 12, options).factors[0]
    assert item.error(with_metric.dense_weight()) < 0.8 * item.error(without.dense_weight())
    assert plain.error(without.dense_weight()) < plain.error(with_metric.dense_weight())


def test_members_with_metrics_of_their_own_share_the_learned_atoms():
    first, _ = member(48, 32, seed=0)
    second, _ = member(24, 32, seed=1)
    errors = {}
    for n_atoms in (0, 6):
        fit = fit_augmented([first, second], first.whitening, n_atoms, 10, LearnOptions())
        assert fit.factors[0].dictionary is fit.factors[1].dictionary
        errors[n_atoms] = fit.exact_errors[0]
    assert errors[6] < errors[0]


def test_levels_cover_the_spectrum():
    values = torch.tensor([0.1, 0.15, 0.19, 0.5, 3.0, 3.1], dtype=torch.float64)
    levels = metrics._levels(values)
    assert [(rows.start, rows.stop) for _, rows in levels] == [(0, 3), (3, 4), (4, 6)]
    assert sum(value * (rows.stop - rows.start) for value, rows in levels) == pytest.approx(
        float(values.sum())
    )
