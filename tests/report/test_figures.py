"""The figures show the numbers: positions and colours are read back from the drawing."""

from __future__ import annotations

import math
import re
import statistics

import numpy as np
import pytest
from made_up import DENSE, METHODS, PROJECTIONS, comparison, failed, large, linear_bytes, run

from cospadi.report import figures, maps, svg
from cospadi.report.result import read_result

TEXT = "wiki.test.raw"


def plain(label, ratio, ppl, seed=1, **changes):
    """A run of one layer that stores exactly what was asked."""
    item = run("m", label, ratio, seed, quality=3.0, seconds=1, layers=1)
    item["perplexity"] = {TEXT: ppl}
    item["stored_bytes"] = round((1 - ratio) * linear_bytes(1))
    return {**item, **changes}


def result_of(*runs, **options):
    return read_result(comparison(list(runs), texts=(TEXT,), layers=1, **options))


def marks(panel):
    """(x, y, tooltip) of the marks with a tooltip: the data points."""
    found = []
    for path in panel.iter("path"):
        tip = path.find("title")
        if tip is not None:
            x, y = re.match(r"M(\S+) (\S+?)m", path.get("d")).groups()
            found.append((float(x), float(y), tip.text))
    return found


def all_text(node):
    return " ".join("".join(node.itertext()).split())


def labels(panel):
    return [t for t in panel.iter("text") if t.find("title") is not None]


# ---- Perplexity ---------------------------------------------------------------


def test_points_lie_where_their_numbers_say():
    values = {(0.1, 30.0): "a", (0.2, 45.0): "a", (0.4, 300.0): "a", (0.25, 60.0): "b"}
    result = result_of(*(plain(label, ratio, ppl) for (ratio, ppl), label in values.items()))
    (panel,) = figures.perplexity_figure(result).panels
    points = marks(panel)
    assert len(points) == len(values)
    x = [p[0] for p in points]
    y = [p[1] for p in points]
    ordered = sorted(values, key=lambda key: (values[key], key[0]))
    for found, wanted in ((x, [r for r, _ in ordered]), (y, [math.log(p) for _, p in ordered])):
        slope, offset = np.polyfit(wanted, found, 1)
        np.testing.assert_allclose(np.polyval([slope, offset], wanted), found, atol=0.02)
    assert np.polyfit([math.log(p) for _, p in ordered], y, 1)[0] < 0  # larger is higher up
    assert points[2][2] == "a: 300.0 at 40.0\u2009% removed"


def test_every_method_has_a_label_and_labels_do_not_overlap():
    (first, second) = figures.perplexity_figure(read_result(large())).panels
    for panel in (first, second):
        names = [label.find("title").text for label in labels(panel)]
        assert sorted(names) == sorted(read_result(large()).names)
        heights = sorted(float(label.get("y")) for label in labels(panel))
        assert min(np.diff(heights)) >= 14.9


def test_large_perplexities_are_cut_with_their_value_beside_the_name():
    cut = figures.CUT_FACTOR * DENSE[TEXT]
    result = result_of(plain("good", 0.2, 40.0), plain("bad", 0.2, 50 * cut))
    figure = figures.perplexity_figure(result)
    (panel,) = figure.panels
    good, bad = marks(panel)
    edge = min(y for _, y, _ in marks(panel))
    assert bad[1] == edge < good[1] and "bad" in bad[2]
    shown = {label.find("title").text: label.text for label in labels(panel)}
    assert shown["good"] == "good" and shown["bad"] == "bad ↑\u200936\u2009285"
    assert any("upper edge" in note for note in figure.notes)


def test_a_line_that_leaves_the_axis_keeps_its_slope():
    result = result_of(plain("a", 0.1, 40.0), plain("a", 0.3, 1e6), plain("b", 0.2, 30.0))
    (panel,) = figures.perplexity_figure(result).panels
    lines = [p.get("d") for p in panel.iter("path") if p.get("class").startswith("line")]
    corners = [tuple(map(float, xy.split())) for xy in lines[0][1:].split("L")]
    (x0, y0), (x1, y1), (x2, y2) = corners
    assert y1 == y2 and x0 < x1 < x2
    b = next((x, y) for x, y, tip in marks(panel) if tip.startswith("b"))
    per_log = (b[1] - y0) / math.log(
        30.0 / 40.0
    )  # px per unit of log-perplexity, off the other point
    assert (y1 - y0) / (x1 - x0) == pytest.approx(
        per_log * math.log(1e6 / 40) / (x2 - x0), rel=0.01
    )


def test_nothing_is_cut_if_everything_is_large():
    result = result_of(plain("a", 0.2, 1e5), plain("b", 0.2, 2e5))
    figure = figures.perplexity_figure(result)
    assert not any("upper edge" in note for note in figure.notes)
    a, b = marks(figure.panels[0])
    assert a[1] > b[1]


@pytest.mark.parametrize("values", [(20.0, 30.0), (3e4, 2e5), (5e6, 4e8)])
def test_labels_of_the_axis_lie_inside_the_drawing(values):
    result = result_of(*(plain(name, 0.2, v) for name, v in zip("ab", values, strict=True)))
    (panel,) = figures.perplexity_figure(result).panels
    ends = [t for t in panel.iter("text") if t.get("text-anchor") == "end"]
    assert ends
    for label in ends:
        assert float(label.get("x")) >= svg.CHARACTER_WIDTH * len(label.text)


def test_seeds_give_a_mean_and_a_bar():
    result = result_of(plain("a", 0.2, 30.0, seed=1), plain("a", 0.2, 40.0, seed=2))
    (panel,) = figures.perplexity_figure(result).panels
    ((_, _, tooltip),) = marks(panel)
    assert tooltip == "a: 35.00 at 20.0\u2009% removed (30.00 to 40.00, 2 seeds)"
    assert len([p for p in panel.iter("path") if "bar" in p.get("class").split()]) == 1


def test_runs_without_a_place_are_counted_not_hidden():
    partial = plain("half", 0.2, 20.0, status="partial")
    result = result_of(plain("a", 0.2, 30.0), partial, failed("m", "gone", 0.2, 1, "killed"))
    figure = figures.perplexity_figure(result)
    assert len(marks(figure.panels[0])) == 1
    assert any("2 configurations" in note for note in figure.notes)


def test_a_comparison_without_results_draws_nothing():
    figure = figures.perplexity_figure(read_result(comparison([])))
    assert figure.panels == []


# ---- Errors -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("model.layers.12.self_attn.q_proj", (12, "self_attn.q_proj")),
        ("transformer.h.0.mlp.c_fc", (0, "mlp.c_fc")),
        ("model.layers.3.mlp.experts.17.down_proj", (3, "mlp.experts.*.down_proj")),
        ("lm_head", (None, "lm_head")),
        ("model.proj2.weight", (None, "model.proj2.weight")),
    ],
)
def test_place_of_a_module(module, place):
    assert maps.place_of(module) == place


def test_short_names_stay_unique():
    names = maps.short_names(["attn.c_proj", "mlp.c_proj", "mlp.c_fc"])
    assert names == {"attn.c_proj": "attn.c_proj", "mlp.c_proj": "mlp.c_proj", "mlp.c_fc": "c_fc"}


def test_cells_have_the_colour_of_their_error_on_one_scale():
    runs = [run("m", label, 0.3, 1, quality=q, seconds=1) for label, q in (("a", 1), ("b", 9))]
    result = read_result(comparison(runs))
    bar, *panels = figures.error_figure(result).panels
    ticks = [float(t.text) for t in bar.iter("text")]
    shown = []
    for panel, item in zip(panels, runs, strict=True):
        cells = [r for r in panel.iter("rect") if r.get("fill")]
        assert len(cells) == 30 * len(PROJECTIONS)
        tips = {cell.find("title").text: cell.get("fill") for cell in cells}
        for name, module in item["modules"].items():
            layer, projection = maps.place_of(name)
            error = module["relative_error"]
            colour = tips[f"layer {layer}, {projection}: {error:.3f}"]
            shown.append((error, colour))
    scale = svg.Scale((ticks[0], ticks[-1]), (0, 1))
    assert all(svg.viridis(scale(error)) == colour for error, colour in shown)
    assert ticks[0] <= min(shown)[0] and max(shown)[0] <= ticks[-1]


def test_row_means_and_heading():
    item = run("m", "a", 0.3, 1, quality=1, seconds=1, layers=4)
    result = read_result(comparison([item], layers=4))
    panel = figures.error_figure(result).panels[1]
    errors = [m["relative_error"] for m in item["modules"].values()]
    assert all_text(panel.find("figcaption")) == f"a: mean {statistics.fmean(errors):.3f}"
    q = [m["relative_error"] for n, m in item["modules"].items() if n.endswith("q_proj")]
    assert f"{statistics.fmean(q):.3f}" in [t.text for t in panel.iter("text")]


def test_modules_without_an_error_are_crossed_out():
    whole, holed = (run("m", name, 0.3, 1, quality=1, seconds=1, layers=2) for name in "ab")
    del holed["modules"]["model.layers.0.mlp.up_proj"]
    holed["modules"]["model.layers.1.mlp.up_proj"]["relative_error"] = None
    figure = figures.error_figure(read_result(comparison([whole, holed], layers=2)))
    void = [
        [r.find("title").text for r in panel.iter("rect") if r.get("class") == "void"]
        for panel in figure.panels[1:]
    ]
    assert void == [[], ["layer 0, mlp.up_proj: not known", "layer 1, mlp.up_proj: not known"]]
    assert any("Crossed cells" in note for note in figure.notes)


def test_experts_are_averaged():
    item = run("m", "a", 0.3, 1, quality=1, seconds=1, layers=1)
    item["modules"] = {
        f"model.layers.0.mlp.experts.{i}.up_proj": {"relative_error": e}
        for i, e in enumerate((0.1, 0.2, 0.6))
    }
    figure = figures.error_figure(read_result(comparison([item], layers=1)))
    tips = [r.find("title").text for r in figure.panels[1].iter("rect")]
    assert tips == ["layer 0, mlp.experts.*.up_proj: 0.300"]
    assert any("averaged" in note for note in figure.notes)


def test_errors_all_equal_still_have_a_scale():
    item = run("m", "a", 0.3, 1, quality=1, seconds=1, layers=1)
    for value in (0.0, 0.25):
        item["modules"] = {"layers.0.up": {"relative_error": value}}
        bar, _ = figures.error_figure(read_result(comparison([item], layers=1))).panels
        ticks = [float(t.text) for t in bar.iter("text")]
        assert len(ticks) >= 2 and ticks[0] <= value <= ticks[-1]


def test_the_ratio_of_most_methods_is_chosen_and_the_others_say_theirs():
    kinds = [("a", 0.2), ("a", 0.3), ("b", 0.3), ("b", 0.4), ("c", 0.4), ("d", None)]
    runs = [run("m", label, ratio, 1, quality=1, seconds=1, layers=1) for label, ratio in kinds]
    runs.append(failed("m", "e", 0.3, 1, "killed"))
    result = read_result(comparison(runs, layers=1))
    ratio, chosen = figures.chosen_runs(result)
    assert ratio == 0.4  # 0.3 and 0.4 have two methods each; of two the upper one is in the middle
    assert {s.name: s.ratio_asked for s, _ in chosen} == {"a": 0.3, "b": 0.4, "c": 0.4, "d": None}
    figure = figures.error_figure(result)
    headings = [all_text(panel.find("figcaption")) for panel in figure.panels[1:]]
    assert headings[0].endswith("ratio 0.3") and headings[3].endswith("size of its own")
    assert any(note == "No errors known: e." for note in figure.notes)


# ---- Spectra ------------------------------------------------------------------


def spectrum_result(*spectra):
    data = comparison([], with_spectra=False)
    data["spectra"] = [
        {"module": f"layers.{i}.up", "singular_values": a, "support_use": b}
        for i, (a, b) in enumerate(spectra)
    ]
    return read_result(data)


def test_curves_begin_at_one_and_end_at_their_last_value():
    values = [100.0 / (1 + i) for i in range(100)]
    figure = figures.spectrum_figure(spectrum_result((values, [5.0, 5.0, 4.0, 0.0])))
    key, panel = figure.panels
    singular, use = (p for p in panel.iter("path") if p.get("class").startswith("line"))
    points = [tuple(map(float, xy.split())) for xy in singular.get("d")[1:].split("L")]
    left = [t for t in panel.iter("text") if t.get("text-anchor") == "end"]
    ticks = {t.text: float(t.get("y")) - 4 for t in left}
    assert points[0][1] == pytest.approx(ticks["1"], abs=0.02)
    assert points[-1][1] == pytest.approx(ticks["0.01"], abs=0.02)
    assert use.get("stroke-dasharray") and not singular.get("stroke-dasharray")
    assert "25.0\u2009% of the atoms never used" in panel.find("figcaption/small").text
    assert float(use.get("d").split("L")[-1].split()[0]) == points[-1][0]
    assert "use of the atoms" in all_text(key)


def test_long_spectra_are_thinned_and_many_are_picked_evenly():
    values = [1.0] * 20_000
    figure = figures.spectrum_figure(spectrum_result(*[(values, values)] * 40))
    assert len(figure.panels) == 1 + figures.MAX_SPECTRA
    assert any(f"{figures.MAX_SPECTRA} of 40" in note for note in figure.notes)
    longest = max(len(p.get("d")) for panel in figure.panels for p in panel.iter("path"))
    assert longest < 5000


def test_zeros_are_said_not_drawn():
    figure = figures.spectrum_figure(spectrum_result(([0.0], [0.0, 0.0]), ([], []), ([1.0], [])))
    assert len(figure.panels) == 2
    assert any("layers.0.up, layers.1.up" in note for note in figure.notes)
    assert figures.spectrum_figure(spectrum_result(([], []))).panels == []


def test_a_method_has_one_mark_in_all_panels():
    result = read_result(large())
    assert len(METHODS) + 1 == len(result.names)

    def shape(mark):
        return mark.get("class"), re.sub(r"^M\S+ [^m]+", "", mark.get("d"))

    for panel in figures.perplexity_figure(result).panels:
        children = list(next(panel.iter("g")))
        for label in labels(panel):
            index = result.names.index(label.find("title").text)
            beside = children[children.index(label) - 1]
            assert shape(beside) == shape(svg.marker(index, 0, 0))
