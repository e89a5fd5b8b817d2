"""Which metric of its outputs a linear gets."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from cospadi.calibration.fisher import FisherStore
from cospadi.learn.output_metric import OutputMetric, RowScales, row_scales
from cospadi.model.discover import discover
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.sensitivity import fisher_grams
from tiny_models import VOCABULARY, make_model


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    model = make_model("llama").eval().requires_grad_(False)
    targets, _ = discover(model)
    ids = torch.randint(2, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("fisher")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        # in a tiny model at random no gradient is concentrated but by another standard
        patch.setattr("cospadi.calibration.fisher.CONCENTRATED", 0.6)
        for kind in ("diagonal", "fisher"):
            found[kind] = FisherStore(
                folder, model, ids, weights="w", seed=3, is_diagonal=kind == "diagonal"
            )
            found[kind].prepare(targets)
    return SimpleNamespace(targets=targets, **found)


def metric_of(stores, recipe, target, gram=None):
    store = getattr(stores, recipe.output_metric)
    gram = torch.eye(target.d_in, dtype=torch.float64) if gram is None else gram
    return fisher_grams(store, target, gram, recipe)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"output_metric": "fisher"}, {True: RowScales, False: OutputMetric}),
        (
            {"output_metric": "fisher", "coeffs_dtype": "int4"},
            {True: OutputMetric, False: OutputMetric},
        ),
        (
            {"output_metric": "fisher", "coeffs_dtype": "auto"},
            {True: OutputMetric, False: OutputMetric},
        ),
    ],
)
def test_scales_where_outputs_are_more_than_inputs(stores, settings, expected):
    recipe = Recipe(**settings)
    assert any(t.d_out > t.d_in for t in stores.targets)
    for target in stores.targets:
        _, output = metric_of(stores, recipe, target)
        assert isinstance(output, expected[target.d_out > target.d_in]), target.name


def test_queries_keep_the_metric_where_they_are_more_than_inputs(stores):
    recipe = Recipe(output_metric="fisher")
    for target in stores.targets:
        if target.d_out > target.d_in:
            _, output = metric_of(stores, recipe, dataclasses.replace(target, n_readers=3))
            assert isinstance(output, OutputMetric)


def test_diagonal_scales_what_reads_the_residual_stream(stores):
    n_weighted = 0
    for target in stores.targets:
        weighted, output = metric_of(stores, Recipe(output_metric="diagonal"), target)
        if target.name.endswith(("o_proj", "down_proj")):
            assert (weighted, output) == (None, None)
            continue
        assert isinstance(output, RowScales)
        power = 0.5 if target.name.endswith(("gate_proj", "up_proj")) else 1.0
        diagonal = stores.fisher.load(target).diagonal()
        expected = row_scales(diagonal, target.name, power=power)
        assert torch.equal(output.scales, expected.scales)
        n_weighted += weighted is not None
        assert (weighted is not None) == (stores.diagonal.load_weighted_gram(target) is not None)
    assert n_weighted > 0


@pytest.mark.parametrize("coeffs_dtype", ["int4", "auto"])
def test_integers_have_no_scales_but_the_weights_of_tokens(stores, coeffs_dtype):
    recipe = Recipe(output_metric="diagonal", coeffs_dtype=coeffs_dtype)
    found = [metric_of(stores, recipe, target) for target in stores.targets]
    assert all(output is None for _, output in found)
    assert any(weighted is not None for weighted, _ in found)
