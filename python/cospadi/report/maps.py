"""Maps of one number per linear: projections down, layers across, shades of one colour scale."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from cospadi.report import svg
from cospadi.report.markup import element
from cospadi.report.numbers import MISSING

# Bounded: names may come from strangers, and int() refuses thousands of digits.
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")

Cells = Mapping[tuple[str, int | None], float]
"""Values by projection and layer."""


def place_of(module: str) -> tuple[int | None, str]:
    """Layer and projection of a module's name: its first number, and what follows; later numbers become ``*``.

    ``model.layers.12.self_attn.q_proj`` is layer 12, ``self_attn.q_proj``; a name without a number has no layer.
    """
    found = _NUMBER.search(module)
    if found is None:
        return None, module
    rest = module[found.end() + 1 :]
    return int(found.group()), ".".join("*" if p.isdigit() else p for p in rest.split("."))


def short_names(projections: Sequence[str]) -> dict[str, str]:
    """Last part of each projection's name where that tells it from the others, the whole name otherwise."""
    last = Counter(name.rsplit(".", 1)[-1] for name in projections)
    return {
        name: tail if last[tail := name.rsplit(".", 1)[-1]] == 1 else name for name in projections
    }


@dataclass(frozen=True)
class Places:
    """Rows and columns of a map.

    Attributes
    ----------
    rows : tuple of str
        Projections in the model's order.
    columns : tuple of int or None
        Layers, ascending; None, for modules without a layer, comes last.
    used : frozenset
        Pairs (layer, projection) that have a module.
    """

    rows: tuple[str, ...]
    columns: tuple[int | None, ...]
    used: frozenset[tuple[int | None, str]]


def places_of(modules: Iterable[str]) -> Places:
    """Rows and columns for the modules of these names, given in the model's order."""
    found = dict.fromkeys(place_of(name) for name in modules)
    columns: list[int | None] = [*sorted({layer for layer, _ in found if layer is not None})]
    if any(layer is None for layer, _ in found):
        columns.append(None)
    rows = tuple(dict.fromkeys(projection for _, projection in found))
    return Places(rows, tuple(columns), frozenset(found))


def cells_of(values: Mapping[str, float]) -> Cells:
    """Values by place from values by module name; the mean where several modules have one place."""
    found: dict[tuple[str, int | None], list[float]] = {}
    for name, value in values.items():
        layer, projection = place_of(name)
        found.setdefault((projection, layer), []).append(value)
    return {place: statistics.fmean(all_here) for place, all_here in found.items()}


def colour_scale(values: Sequence[float]) -> svg.Scale:
    """Scale from values to shares of the colour scale, its ends on round numbers.

    It spans a hundredth of the values at least: what is equal shall look alike.
    """
    highest = max(max(values), 1.01 * min(values)) + 1e-9
    ticks = svg.linear_ticks(min(values), highest, 5)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else max(max(values) / 4, 1e-3)
    low = math.floor(min(values) / step) * step
    return svg.Scale((low, max(math.ceil(max(values) / step) * step, low + step)), (0.0, 1.0))


def colour_bar(scale: svg.Scale, quantity: str) -> ET.Element:
    """The colour scale with its numbers, and what they are of."""
    width, left, n_steps = 250.0, 12.0, 50
    step = width / n_steps
    group = element("g")
    for i in range(n_steps):
        colour = svg.viridis((i + 0.5) / n_steps)
        bar = element("rect", x=left + i * step, y=2, width=step + 0.5, height=12, fill=colour)
        group.append(bar)
    place = svg.Scale(scale.domain, (left, left + width))
    for tick in svg.linear_ticks(*scale.domain, 6):
        label = svg.text(place(tick), 28, f"{tick:.3g}", anchor="middle", style="tick")
        group.append(label)
    drawing = svg.figure_svg(width + 2 * left, 34, f"Colour scale of the {quantity}", group)
    return element("div", quantity, drawing, class_="colour-bar")


def map_panel(
    heading: str, description: str, cells: Cells, places: Places, scale: svg.Scale
) -> ET.Element:
    """One map with the means of its rows; places without a value are crossed."""
    names = short_names(places.rows)
    left = min(150.0, 10 + svg.CHARACTER_WIDTH * max(map(len, names.values())))
    cell_w, cell_h, right = min(24.0, 384 / len(places.columns)), 14.0, 46.0
    group = element("g")
    for row, projection in enumerate(places.rows):
        at = row * cell_h
        label = svg.shorten(names[projection], left - 6)
        group.append(svg.text(left - 6, at + 11, label, anchor="end", style="tick"))
        found = []
        for column, layer in enumerate(places.columns):
            if (layer, projection) not in places.used:
                continue
            x, value = left + column * cell_w, cells.get((projection, layer))
            where = f"layer {layer}, {projection}" if layer is not None else projection
            frame = {"x": x, "y": at, "width": cell_w - 0.5, "height": cell_h - 0.5}
            if value is None:
                group.append(
                    element("rect", svg.title(f"{where}: not known"), class_="void", **frame)
                )
                group.append(svg.line(x, at + cell_h - 0.5, x + cell_w - 0.5, at, "void"))
            else:
                found.append(value)
                tooltip = svg.title(f"{where}: {value:.3f}")
                group.append(
                    element("rect", tooltip, fill=svg.viridis(scale(value)), class_="cell", **frame)
                )
        mean = f"{statistics.fmean(found):.3f}" if found else MISSING
        end = left + len(places.columns) * cell_w
        group.append(svg.text(end + 6, at + 11, mean, style="tick"))
    bottom = len(places.rows) * cell_h
    every = max(1, math.ceil(28 / cell_w))
    for column in range(0, len(places.columns), every):
        layer = places.columns[column]
        label = "other" if layer is None else str(layer)
        x = left + (column + 0.5) * cell_w
        group.append(svg.text(x, bottom + 13, label, anchor="middle", style="tick faint"))
    width = left + len(places.columns) * cell_w
    group.append(svg.text(width + 6, bottom + 13, "mean", style="tick faint"))
    drawing = svg.figure_svg(width + right, bottom + 18, description, group)
    drawing.set("style", f"max-width:{round(width + right)}px")
    caption = element("figcaption", heading)
    return element("figure", caption, element("div", drawing, class_="scroll"), class_="panel")
