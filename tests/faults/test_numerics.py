"""Numbers that no model should have: a recorded step of the ladder or a dense layer, never a NaN in a factor."""

from __future__ import annotations

import pytest
import torch

from cospadi.errors import CospadiError
from cospadi.pipeline.executor import Outcome
from cospadi.pipeline.fit_task import (
    FIT_ERRORS,
    FitTask,
    InputMetric,
    Statistics,
    TaskMember,
    failure_reason,
    run_task,
)
from cospadi.pipeline.plan import make_plan
from cospadi.pipeline.recipe import Recipe

D_IN, D_OUT = 48, 40
KINDS = [
    {"method": "cospadi"},
    {"dictionary": "identity"},
    {"dictionary": "learned", "iterations": 2},
    {"dictionary": "auto", "iterations": 2},
    {"coeffs_dtype": "auto"},
    {"method": "svd-llm"},
    {"method": "sparsegpt"},
    {"method": "wanda"},
    {"method": "gptq", "coeffs_dtype": "int4"},
    {"method": "compot"},
    {"method": "rocket"},
]


def well_behaved():
    x = torch.randn(96, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.T @ x / 96


def gram_of(kind):
    gram = well_behaved()
    if kind == "rank 1":
        row = gram[0]
        gram = torch.outer(row, row)
    elif kind == "zero":
        gram.zero_()
    elif kind == "1e30":
        gram *= 1e30
    elif kind == "1e-30":
        gram *= 1e-30
    elif kind == "1e200 beside 1e-200":
        scale = torch.cat([torch.full((24,), 1e100), torch.full((24,), 1e-100)]).double()
        gram = gram * scale[:, None] * scale
    elif kind == "duplicated columns":
        gram[:, 24:], gram[24:, :] = gram[:, :24].clone(), torch.nan
        gram[24:, :24], gram[24:, 24:] = gram[:24, :24], gram[:24, :24]
    elif kind == "dead channels":
        gram[:, ::2] = 0.0
        gram[::2] = 0.0
    elif kind == "inf":
        gram[3, 3] = torch.inf
    elif kind == "nan":
        gram[2, 5] = gram[5, 2] = torch.nan
    elif kind == "indefinite":
        gram -= 0.5 * torch.eye(D_IN, dtype=torch.float64)
    elif kind == "negative":
        gram *= -1.0
    return gram


def task(settings, gram, weight) -> FitTask:
    from cospadi.learn.fit import FitSettings
    from cospadi.learn.methods import FactorSize
    from cospadi.model.discover import TargetLinear

    recipe = Recipe(ratio=0.4, **settings)
    target = TargetLinear("x", "linear", D_IN, D_OUT, False, "x", None, "x")
    (plan,) = make_plan([target], [], recipe).modules
    fit_settings = FitSettings(
        recipe.method,
        FactorSize(plan.n_identity, plan.n_atoms, plan.sparsity),
        plan.types,
        recipe.learn_options(),
        candidates=plan.candidates,
    )
    member = TaskMember("x", weight, None, Statistics(gram, InputMetric("x", gram)))
    return FitTask((member,), fit_settings, 1.0)


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        "rank 1", "zero", "1e30", "1e-30", "1e200 beside 1e-200", "duplicated columns",
        "dead channels", "inf", "nan", "indefinite", "negative",
    ],
)  # fmt: skip
def test_no_gram_gives_a_factor_with_nan(settings, kind):
    weight = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1))
    try:
        ((factor, report),) = run_task(task(settings, gram_of(kind), weight))
    except FIT_ERRORS as error:
        assert failure_reason(error, "x")
        return
    factor.validate("x")
    assert torch.isfinite(factor.dense_weight()).all()
    assert 0.0 <= report.relative_error <= 1.0 and report.whitening
    if kind in ("inf", "nan", "zero"):
        pytest.fail("a Gram without information was used")


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("kind", ["zero", "1e30", "1e-38", "one column", "equal rows"])
def test_no_weight_gives_a_factor_with_nan(settings, kind):
    weight = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(1))
    if kind == "zero":
        weight.zero_()
    elif kind == "1e30":
        weight *= 1e30
    elif kind == "1e-38":
        weight *= 1e-38
    elif kind == "one column":
        weight[:, 1:] = 0.0
    else:
        weight[:] = weight[0]
    try:
        ((factor, _),) = run_task(task(settings, well_behaved(), weight))
    except FIT_ERRORS as error:
        assert failure_reason(error, "x")
        return
    factor.validate("x")
    assert torch.isfinite(factor.dense_weight()).all()


def test_what_is_no_error_of_numbers_is_not_hidden():
    with pytest.raises(AttributeError):
        run_task(task({}, gram_of(""), None))  # a mistake of a caller
    assert issubclass(CospadiError, FIT_ERRORS) and Outcome(("x",)).failure is None
