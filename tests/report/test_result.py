"""The data of a comparison: checks, grouping over seeds, what ranks."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
from made_up import comparison, failed, large, run

from cospadi.errors import InputError
from cospadi.report.ranking import (
    RATIO_TOLERANCE,
    difference_error,
    is_over_budget,
    is_ranked,
    mark_perplexity,
    mark_task,
)
from cospadi.report.result import read_result


def small(label="cospadi", ratio=0.2, seed=1, method="cospadi", **changes):
    item = run(method, label, ratio, seed, quality=3.0, seconds=10, layers=1)
    return {**item, **changes}


def small_result(*runs):
    return read_result(comparison(list(runs), layers=1))


def text_run(label, ppl, *, seed=1, kept=0.8, stderr=0.01, task=0.5, **changes):
    """A run whose perplexity, task value and size are given."""
    item = small(label, seed=seed)
    item["perplexity"] = {"wiki.test.raw": ppl}
    item["tasks"] = {"piqa": {"value": task, "stderr": stderr}}
    item["stored_bytes"] = math.floor(kept * item["dense_bytes"])
    return {**item, **changes}


# ---- Reading ----------------------------------------------------------------


def test_runs_that_differ_in_the_seed_are_one_series():
    result = read_result(large())
    assert len(result.runs) == 3 * (3 * 11 + 1)
    assert len(result.series) == 3 * 11 + 1
    assert sum(len(s.runs) for s in result.series) == len(result.runs)
    assert [ratio for ratio, _ in result.blocks()] == [0.2, 0.3, 0.4, None]


def test_spread_over_seeds_is_numpys():
    values = [30.0, 33.0, 31.5]
    result = small_result(*(text_run("a", v, seed=i) for i, v in enumerate(values)))
    found = result.series[0].perplexity("wiki.test.raw")
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert (found.low, found.high, found.n) == (30.0, 33.0, 3)


def test_failed_seeds_do_not_enter_the_mean_and_partial_ones_only_alone():
    done, partial = text_run("a", 30.0, seed=1), text_run("a", 90.0, seed=2, status="partial")
    lost = failed("cospadi", "a", 0.2, 3, "killed")
    series = small_result(done, partial, lost).series[0]
    assert series.perplexity("wiki.test.raw").mean == 30.0 and series.is_complete
    series = small_result(partial, lost).series[0]
    assert series.perplexity("wiki.test.raw").mean == 90.0 and not series.is_complete
    series = small_result(lost).series[0]
    assert series.perplexity("wiki.test.raw") is None and series.measured == ()


def test_equal_labels_of_different_methods_are_told_apart():
    result = small_result(small("x", method="svd"), small("x", method="svd-llm"), small("y"))
    assert result.names == ("x (svd)", "x (svd-llm)", "y")


def test_unfinished_comparisons_are_readable():
    result = read_result(comparison([]))
    assert (result.runs, result.linear_bytes, result.names) == ((), None, ())
    bare = failed("svd", "svd", None, 7, "no memory")
    assert not read_result(comparison([bare])).runs[0].is_measured


def set_at(data, path, value):
    *way, last = path
    for key in way:
        data = data[key]
    data[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("runs", 0, "perplexity", "wiki.test.raw"), math.nan, r"runs\[0\].perplexity.*got nan"),
        (("runs", 0, "perplexity", "wiki.test.raw"), math.inf, "finite number, got inf"),
        (("runs", 0, "seconds", "fit"), "12", "seconds.*finite number, got '12'"),
        (("runs", 0, "ratio_asked"), True, "ratio_asked.*got True"),
        (("runs", 0, "seed"), 1.5, r"runs\[0\].seed: expected an integer"),
        (("runs", 0, "seed"), None, r"runs\[0\].seed: expected an integer"),
        (("runs", 0, "stored_bytes"), 0.5, "stored_bytes: expected an integer"),
        (("runs", 0, "modules"), [], "modules: expected an object"),
        (("runs", 0, "tasks", "piqa"), 0.5, "piqa.*expected an object, got 0.5"),
        (("runs", 0, "status"), None, "status: expected text"),
        (("runs",), {}, "runs: expected a list"),
        (("texts",), [3], r"texts\[0\]: expected text, got 3"),
        (("model",), "SmolLM2", "model: expected an object"),
        (("dense", "tasks", "piqa", "stderr"), math.nan, "stderr.*finite"),
        (("spectra", 0, "singular_values"), [1.0, -1.0], "singular_values: expected numbers"),
        (("spectra", 0, "support_use"), [1.0, None], "support_use: expected numbers"),
    ],
)
def test_bad_values_are_named(path, value, message):
    data = comparison([small()], layers=1)
    set_at(data, path, value)
    with pytest.raises(InputError, match=message):
        read_result(data)


@pytest.mark.parametrize("key", ["title", "model", "dense", "texts", "tasks", "runs"])
def test_missing_keys_are_named(key):
    data = comparison([small()], layers=1)
    del data[key]
    with pytest.raises(InputError, match=f"key '{key}' is missing"):
        read_result(data)


def test_the_same_run_twice_is_refused():
    with pytest.raises(InputError, match=r"'cospadi' at ratio 0\.2 has a seed more than once"):
        small_result(small(), small())


def test_reading_leaves_the_data_alone():
    data = comparison([small()], layers=1)
    before = copy.deepcopy(data)
    read_result(data)
    assert data == before


# ---- Ranking ----------------------------------------------------------------


def test_lowest_perplexity_within_the_bytes_is_best():
    result = small_result(
        text_run("good", 30.0),
        text_run("better but too large", 25.0, kept=0.8 + RATIO_TOLERANCE + 0.001),
        text_run("better but partial", 20.0, status="partial"),
        text_run("just small enough", 40.0, kept=0.8 + RATIO_TOLERANCE - 0.001),
    )
    assert mark_perplexity(result, result.series, "wiki.test.raw") == {"good": "best"}
    by_name = {s.name: s for s in result.series}
    assert is_over_budget(result, by_name["better but too large"])
    assert [name for name, s in by_name.items() if is_ranked(result, s)] == [
        "good",
        "just small enough",
    ]


def test_one_method_alone_is_not_the_best():
    result = small_result(text_run("a", 30.0), text_run("b", 20.0, status="partial"))
    assert mark_perplexity(result, result.series, "wiki.test.raw") == {}
    assert mark_task(result, result.series, "piqa") == {}


def test_overlapping_seeds_are_a_tie():
    runs = [
        text_run(label, ppl, seed=seed)
        for label, values in {"a": (30, 33), "b": (32, 36), "c": (34, 35)}.items()
        for seed, ppl in enumerate(values)
    ]
    result = small_result(*runs)
    marks = mark_perplexity(result, result.series, "wiki.test.raw")
    assert marks == {"a": "best", "b": "tie"}


def test_task_ties_are_within_two_standard_errors_of_the_difference():
    limit = 2 * math.hypot(0.02, 0.01)
    result = small_result(
        text_run("top", 30.0, task=0.6, stderr=0.02),
        text_run("near", 30.0, task=0.6 - limit + 1e-6, stderr=0.01),
        text_run("far", 30.0, task=0.6 - limit - 1e-6, stderr=0.01),
    )
    assert mark_task(result, result.series, "piqa") == {"top": "best", "near": "tie"}


def test_task_ties_are_paired_where_the_questions_are_known():
    """Three methods that differ from the best in 4 and in 1 of 400 questions, all in one direction, and a mixed one."""
    rng = np.random.default_rng(0)
    top = (rng.random(400) < 0.6).astype(float)
    right = np.flatnonzero(top)

    def worse(losses, gains=0):
        scores = top.copy()
        scores[right[:losses]] = 0.0
        scores[np.flatnonzero(top == 0)[:gains]] = 1.0
        return scores

    def item(label, scores, items_sha256="a"):
        made = text_run(label, 30.0, task=float(scores.mean()), stderr=0.025)
        known = {"item_scores": scores.tolist(), "items_sha256": items_sha256}
        made["tasks"]["piqa"] |= known
        return made

    kinds = {"top": top, "few": worse(1), "many": worse(9), "mixed": worse(30, 25)}
    result = small_result(*(item(label, scores) for label, scores in kinds.items()))
    first, *others = result.series
    for series, scores in zip(others, list(kinds.values())[1:], strict=True):
        expected = np.std(top - scores, ddof=1) / np.sqrt(400)
        assert difference_error(first, series, "piqa") == pytest.approx(expected)
    marks = mark_task(result, result.series, "piqa")
    assert marks == {"top": "best", "few": "tie", "mixed": "tie"}  # unpaired, all would be ties
    other_questions = small_result(item("top", top), item("many", kinds["many"], "b"))
    assert mark_task(other_questions, other_questions.series, "piqa")["many"] == "tie"


def test_item_scores_are_averaged_over_seeds_that_answered_the_same():
    def item(seed, scores, items_sha256="a"):
        made = text_run("x", 30.0, seed=seed)
        made["tasks"]["piqa"] |= {"item_scores": scores, "items_sha256": items_sha256}
        return made

    same = small_result(item(1, [0, 1, 1]), item(2, [1, 1, 0]))
    assert same.series[0].task_items("piqa") == ("a", [0.5, 1.0, 0.5])
    other = small_result(item(1, [0, 1, 1]), item(2, [1, 1, 0], "b"))
    assert other.series[0].task_items("piqa") is None
    with pytest.raises(InputError, match="item_scores: expected finite numbers"):
        small_result(item(1, [0.0, math.inf]))


def test_methods_without_a_ratio_are_not_ranked():
    fixed = [text_run(label, 30.0, ratio_asked=None) for label in "ab"]
    result = small_result(*fixed)
    assert mark_perplexity(result, result.series, "wiki.test.raw") == {}
