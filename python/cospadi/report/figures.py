"""The three figures: perplexity against stored bytes, error by layer and projection, spectrum against use of atoms."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from cospadi.report import svg
from cospadi.report.maps import (
    Cells,
    Places,
    cells_of,
    colour_bar,
    colour_scale,
    map_panel,
    places_of,
)
from cospadi.report.markup import element
from cospadi.report.numbers import (
    THIN_SPACE,
    byte_unit,
    in_unit,
    percent,
    plural,
    quantity,
)
from cospadi.report.ranking import stored_ratio
from cospadi.report.result import Result, Run, Series, Spectrum

CUT_FACTOR = 30.0
"""Perplexities beyond this multiple of the dense one are drawn at the upper edge, or they would flatten the rest."""

MAX_SPECTRA = 12
SPECTRUM_FLOOR = 1e-4
"""Smallest share of the largest value that the spectrum figure shows."""

CURVE_POINTS = 160

LABEL_GAP = 6.0
"""Between an axis and the labels of its ticks, in px."""


@dataclass(frozen=True)
class Figure:
    """Panels of equal kind, and sentences for the caption that depend on the data."""

    panels: list[ET.Element]
    notes: list[str]


# ---- Perplexity against stored bytes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    series: Series
    share: float
    low: float
    mean: float
    high: float
    n: int


def perplexity_figure(result: Result) -> Figure:
    """One panel per text: removed share of the stored bytes against perplexity, one line per method.

    All panels share their axes. Complete runs only: a partial run's bytes do not cover all linears.
    """
    points = {text: _points(result, text) for text in result.texts}
    drawn = [point for panel in points.values() for point in panel]
    notes = []
    n_left_out = sum(not s.is_complete for s in result.series)
    if n_left_out:
        failed = plural(n_left_out, "configuration")
        notes.append(f"Not drawn, because no run of theirs is complete: {failed} (see the tables).")
    if not drawn:
        return Figure([], notes)
    dense = [v for text, v in result.dense_perplexity.items() if text in points and v > 0]
    upper = _upper_bound(drawn, dense)
    if any(point.mean > upper for point in drawn):
        notes.append(
            f"Marks at the upper edge with an arrow lie above it, at the value beside the name (axis cut at "
            f"{quantity(CUT_FACTOR, 0)} times the dense perplexity)."
        )
    if any(point.n > 1 for point in drawn):
        notes.append(
            "Marks are means over seeds, vertical bars reach from the lowest to the highest."
        )
    lower = min([point.low for point in drawn] + dense)
    domain = (lower / 1.08, max(upper, lower * 1.2) * 1.04)
    shares = (min(0.0, *(p.share for p in drawn)), max(0.1, *(p.share for p in drawn)))
    panels = [_perplexity_panel(result, text, points[text], shares, domain) for text in points]
    return Figure(panels, notes)


def _points(result: Result, text: str) -> list[_Point]:
    found = []
    for series in result.series:
        share, value = stored_ratio(result, series), series.perplexity(text)
        if series.is_complete and share is not None and value is not None and value.low > 0:
            found.append(_Point(series, share, value.low, value.mean, value.high, value.n))
    return found


def _upper_bound(points: Sequence[_Point], dense: Sequence[float]) -> float:
    """Largest perplexity shown: all of them, unless some exceed the cut and some do not."""
    highest = max(point.high for point in points)
    cut = CUT_FACTOR * max(dense, default=math.inf)
    return cut if highest > cut and any(point.mean <= cut for point in points) else highest


def _perplexity_panel(
    result: Result,
    text: str,
    points: Sequence[_Point],
    shares: tuple[float, float],
    domain: tuple[float, float],
) -> ET.Element:
    lines: dict[str, list[_Point]] = {name: [] for name in result.names}
    for point in points:
        lines[point.series.name].append(point)
    lines = {name: sorted(p, key=lambda q: q.share) for name, p in lines.items() if p}
    width, right, top, gap = 500.0, 180.0, 14.0, 15.0
    labels = [_tick_label(tick) for tick in svg.log_ticks(*domain)]
    left = max(40.0, svg.CHARACTER_WIDTH * max(map(len, labels)) + LABEL_GAP)
    height = max(280.0, gap * len(lines))
    x = svg.Scale((shares[0], shares[1] * 1.02), (left, width - right))
    y = svg.Scale(domain, (top + height, top), is_log=True)
    group = element("g")
    group.extend(_axes(result, x, y))
    dense = result.dense_perplexity.get(text)
    if dense is not None and dense > 0:
        group.append(svg.line(left, y(dense), width - right, y(dense), "dense"))
    ends = {}
    for name, members in lines.items():
        index = result.names.index(name)
        group.append(_line(members, index, x, y))
        group.extend(_mark(result, p, index, x, y) for p in members)
        last = members[-1]
        ends[name] = (x(last.share), y(min(last.mean, domain[1])))
    if dense is not None and dense > 0:  # above the curves, which begin near it
        label = f"dense {quantity(dense)}"
        group.append(svg.text(left + 5, y(dense) - 5, label, style="halo"))
    targets = svg.separate([end[1] for end in ends.values()], gap, top, top + height)
    for (name, (end_x, end_y)), target in zip(ends.items(), targets, strict=True):
        index, value = result.names.index(name), lines[name][-1].mean
        suffix = f" ↑{THIN_SPACE}{quantity(value)}" if value > domain[1] else ""
        label_x = width - right + 24
        room = width - label_x - 12 - svg.CHARACTER_WIDTH * len(suffix)
        group.append(svg.line(end_x + 7, end_y, label_x - 9, target, "leader"))
        group.append(svg.marker(index, label_x, target))
        shown = svg.text(label_x + 9, target + 4, svg.shorten(name, room) + suffix)
        shown.append(element("title", name))
        group.append(shown)
    description = (
        f"Perplexity on {text} against the removed share of stored bytes; numbers in table 1"
    )
    caption = element("figcaption", f"Perplexity on {text}")
    drawing = svg.figure_svg(width, top + height + 44, description, group)
    return element("figure", caption, element("div", drawing, class_="scroll"), class_="panel")


def _tick_label(tick: float) -> str:
    return f"{tick:g}" if tick < 1e4 else quantity(tick, 0)


def _axes(result: Result, x: svg.Scale, y: svg.Scale) -> list[ET.Element]:
    bottom, left, right = y.extent[0], x.extent[0], x.extent[1]
    dense_bytes = result.linear_bytes or 0
    unit = byte_unit(dense_bytes)
    parts = []
    for tick in svg.log_ticks(*y.domain):
        parts.append(svg.line(left, y(tick), right, y(tick), "grid"))
        label = _tick_label(tick)
        parts.append(svg.text(left - LABEL_GAP, y(tick) + 4, label, anchor="end", style="tick"))
    parts.append(svg.line(left, bottom, right, bottom, "axis"))
    for tick in svg.linear_ticks(*x.domain, 7):
        parts.append(svg.line(x(tick), bottom, x(tick), bottom + 4, "axis"))
        share = f"{percent(tick).removesuffix('.0')}{THIN_SPACE}%"
        parts.append(svg.text(x(tick), bottom + 17, share, anchor="middle", style="tick"))
        left_over = in_unit((1 - tick) * dense_bytes, unit)
        parts.append(svg.text(x(tick), bottom + 32, left_over, anchor="middle", style="tick faint"))
    parts.append(svg.text(right + 24, bottom + 17, "removed", style="tick"))
    parts.append(svg.text(right + 24, bottom + 32, f"{unit[0]} stored", style="tick faint"))
    return parts


def _line(members: Sequence[_Point], index: int, x: svg.Scale, y: svg.Scale) -> ET.Element:
    """The line of a method, ending at the upper edge where it leaves the axis."""
    corners: list[tuple[float, float]] = []
    edge = y.domain[1]
    for i, point in enumerate(members):
        if i and (point.mean > edge) != (members[i - 1].mean > edge):
            before = members[i - 1]
            part = math.log(edge / before.mean) / math.log(point.mean / before.mean)
            corners.append((x(before.share + part * (point.share - before.share)), y(edge)))
        corners.append((x(point.share), y(min(point.mean, edge))))
    return svg.polyline(corners, svg.colour_class(index), svg.dash(index))


def _mark(result: Result, point: _Point, index: int, x: svg.Scale, y: svg.Scale) -> ET.Element:
    edge, at = y.domain[1], x(point.share)
    removed = f"{percent(point.share)}{THIN_SPACE}% removed"
    tooltip = f"{point.series.name}: {quantity(point.mean)} at {removed}"
    if point.n > 1:
        tooltip += f" ({quantity(point.low)} to {quantity(point.high)}, {point.n} seeds)"
    group = element("g")
    if point.n > 1 and point.low < edge:
        style = f"bar {svg.colour_class(index)}"
        group.append(svg.line(at, y(point.low), at, y(min(point.high, edge)), style))
    shown = y(min(point.mean, edge))
    group.append(svg.marker(index, at, shown, tooltip))
    if point.mean > edge:
        group.append(svg.text(at, shown - 6, "↑", anchor="middle", style="tick"))
    return group


# ---- Error by layer and projection -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Map:
    series: Series
    run: Run
    cells: Cells


def chosen_runs(result: Result) -> tuple[float | None, list[tuple[Series, Run]]]:
    """One run per method for the error maps.

    The ratio is the one at which most methods have errors (among equals the middle one). A method without it is shown
    at its nearest ratio. Of several seeds the lowest is taken, complete runs before partial ones.

    Returns
    -------
    (ratio, runs)
        ``ratio`` is None if no run with errors was asked for one.
    """
    usable = [s for s in result.series if any(_errors(run) for run in s.measured)]
    count = Counter(s.ratio_asked for s in usable if s.ratio_asked is not None)
    most = sorted(ratio for ratio, n in count.items() if n == max(count.values()))
    chosen = most[len(most) // 2] if most else None

    def distance(series: Series) -> float:
        if chosen is None or series.ratio_asked is None:
            return math.inf
        return abs(series.ratio_asked - chosen)

    runs = []
    for name in result.names:
        candidates = [s for s in usable if s.name == name]
        if candidates:
            series = min(candidates, key=distance)
            runs.append((series, next(run for run in series.measured if _errors(run))))
    return chosen, runs


def _errors(run: Run) -> dict[str, float]:
    return {
        name: module.relative_error
        for name, module in run.modules.items()
        if module.relative_error is not None
    }


def error_figure(result: Result) -> Figure:
    """One map per method, all on one colour scale: relative error by projection (rows) and layer (columns)."""
    ratio, runs = chosen_runs(result)
    maps = [_Map(series, run, cells_of(_errors(run))) for series, run in runs]
    without = [name for name in result.names if name not in {m.series.name for m in maps}]
    notes = []
    if without:
        notes.append(f"No errors known: {', '.join(without)}.")
    if not maps:
        return Figure([], notes)
    modules = dict.fromkeys(name for m in maps for name in m.run.modules)  # in the model's order
    places = places_of(modules)
    if len(places.used) < len(modules):
        notes.append("Modules that differ in a second number only (experts) are averaged.")
    scale = colour_scale([value for m in maps for value in m.cells.values()])
    if any(len(m.cells) < len(places.used) for m in maps):
        notes.append("Crossed cells: no error known (module left dense, or not part of the run).")
    panels = [colour_bar(scale, "relative error")]
    panels += [_error_panel(m, ratio, places, scale) for m in maps]
    return Figure(panels, notes)


def _error_panel(
    error_map: _Map, ratio: float | None, places: Places, scale: svg.Scale
) -> ET.Element:
    series = error_map.series
    heading = f"{series.name}: mean {statistics.fmean(error_map.cells.values()):.3f}"
    if series.ratio_asked != ratio:
        asked = series.ratio_asked
        heading += ", size of its own" if asked is None else f", ratio {asked:g}"
    if len(series.runs) > 1:
        heading += f", seed {error_map.run.seed}"
    description = f"Relative error of {series.name} by layer and projection"
    return map_panel(heading, description, error_map.cells, places, scale)


# ---- Spectrum against use of the atoms -------------------------------------------------------------------------------


def spectrum_figure(result: Result) -> Figure:
    """One panel per module: singular values of the whitened weight and use of the atoms, largest first."""
    usable = [s for s in result.spectra if _largest(s.singular_values) or _largest(s.support_use)]
    notes = []
    empty = [s.module for s in result.spectra if s not in usable]
    if empty:
        notes.append(f"Nothing but zeros, not drawn: {', '.join(empty)}.")
    shown = usable
    if len(usable) > MAX_SPECTRA:
        shown = [usable[i * len(usable) // MAX_SPECTRA] for i in range(MAX_SPECTRA)]
        notes.append(
            f"{MAX_SPECTRA} of {len(usable)} modules, evenly picked; the JSON file has all."
        )
    if not shown:
        return Figure([], notes)
    floor = min(_lowest_decade(spectrum) for spectrum in shown)
    return Figure([_curve_key(), *(_spectrum_panel(s, floor) for s in shown)], notes)


def _largest(values: Sequence[float]) -> float:
    return max(values, default=0.0)


def _lowest_decade(spectrum: Spectrum) -> float:
    """Power of ten below all shares of the largest that are not zero, within [`SPECTRUM_FLOOR`, 0.1]."""
    shares = [
        value / values[0]
        for values in (spectrum.singular_values, spectrum.support_use)
        for value in values
        if value > 0
    ]
    decade = 10.0 ** math.floor(math.log10(max(min(shares), SPECTRUM_FLOOR)) + 1e-9)
    return min(decade, 0.1)


CURVES = ("singular values of the whitened weight", "use of the atoms")


def _curve_key() -> ET.Element:
    entries = []
    for index, name in enumerate(CURVES):
        sample = svg.polyline([(0, 4), (26, 4)], svg.colour_class(index), svg.DASHES[index])
        drawing = element("svg", sample, viewBox="0 0 26 8", class_="key", aria_hidden="true")
        entries.append(element("span", drawing, f" {name}"))
    return element("div", *entries, class_="key-row")


def _spectrum_panel(spectrum: Spectrum, floor: float) -> ET.Element:
    curves = (spectrum.singular_values, spectrum.support_use)
    width, left, top, height = 340.0, 44.0, 8.0, 150.0
    x = svg.Scale((0.0, 1.0), (left, width - 18))
    y = svg.Scale((floor, 1.0), (top + height, top), is_log=True)
    group = element("g")
    for exponent in range(round(math.log10(floor)), 1):
        tick = 10.0**exponent
        group.append(svg.line(left, y(tick), width - 18, y(tick), "grid"))
        group.append(svg.text(left - 6, y(tick) + 4, f"{tick:g}", anchor="end", style="tick"))
    group.append(svg.line(left, top + height, width - 18, top + height, "axis"))
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        label = f"{100 * tick:g}{THIN_SPACE}%"
        at = top + height + 15
        group.append(svg.text(x(tick), at, label, anchor="middle", style="tick"))
    for index, values in enumerate(curves):
        if _largest(values) > 0:
            points = [(x(place), y(max(share, floor))) for place, share in _sampled(values)]
            group.append(svg.polyline(points, svg.colour_class(index), svg.DASHES[index]))
    description = f"Spectrum and use of the atoms of {spectrum.module}"
    drawing = svg.figure_svg(width, top + height + 22, description, group)
    use = spectrum.support_use
    unused = sum(value == 0 for value in use) / max(len(use), 1)
    remark = f"{percent(unused)}{THIN_SPACE}% of the atoms never used" if unused else None
    small = None if remark is None else element("small", remark)
    caption = element("figcaption", spectrum.module, small)
    return element("figure", caption, drawing, class_="panel small")


def _sampled(values: Sequence[float]) -> list[tuple[float, float]]:
    """Place from first (0) to last (1) and share of the largest: `CURVE_POINTS` or so, half in the first tenth."""
    n = len(values)
    fine = max(1, n // 10)
    half = CURVE_POINTS // 2
    chosen = set(range(0, fine, max(1, fine // half))) | set(range(fine, n, max(1, n // half)))
    return [(i / max(n - 1, 1), values[i] / values[0]) for i in sorted(chosen | {n - 1})]
