"""What the figures are drawn with: scales, ticks, axes, markers, labels that do not overlap, the colour scale.

Inline SVG and not a plotting library's output: colours follow the reader's light or dark theme, text stays text, every
mark can say its value under the pointer, a page of twenty figures stays small, and a comparison that ran for hours
cannot miss its report for want of an optional package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from cospadi.report.markup import element, short

N_COLOURS = 7
"""Colours ``s0`` to ``s6`` of the style sheet: Okabe and Ito's palette without its yellow, which white swallows."""

SHAPES = ("circle", "square", "triangle", "diamond", "wedge", "cross")
"""Marker shapes. Six and seven are coprime: 42 series differ in colour or shape, neighbours in both."""

DASHES = (None, "7 3", "2 3")
"""Line patterns, changed after every round of colours."""

VIRIDIS = (
    0x440154,
    0x482878,
    0x3E4A89,
    0x31688E,
    0x26828E,
    0x1F9E89,
    0x35B779,
    0x6DCD59,
    0xB4DE2C,
    0xFDE725,
)
"""Ten equidistant points of matplotlib's viridis (van der Walt and Smith, CC0): even to all kinds of colour vision."""

CHARACTER_WIDTH = 7.2
"""Average width of a character of a label, in px; that of a wide font, so that labels stay inside the figure."""


@dataclass(frozen=True)
class Scale:
    """Maps a value of ``domain`` to a coordinate of ``extent``; logarithmic if ``is_log``."""

    domain: tuple[float, float]
    extent: tuple[float, float]
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Coordinate of a value; beyond the extent for one beyond the domain."""
        low, high = self.domain
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low)
        return self.extent[0] + share * (self.extent[1] - self.extent[0])


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], at most about ``count``."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [
        min(max(i * step, low), high) for i in range(first, last + 1)
    ]  # products may be rounded out


def log_ticks(low: float, high: float, count: int = 7) -> list[float]:
    """Round numbers within [low, high]: as fine a choice of digits per decade as gives at most ``count`` ticks.

    An interval too short for two round numbers gets linear ticks.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        values = [d * 10.0**e for e in range(first, last + 1) for d in digits]
        ticks = [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(ticks) <= count:
            break
    if len(ticks) < 2:
        return linear_ticks(low, high)  # a step is at most half of the interval: at least two ticks
    every = math.ceil(len(ticks) / count)
    return ticks[::every]


def separate(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions apart to at least ``gap``, within [low, high], with the least sum of squared moves.

    With the order kept, substituting ``z_i = y_i - i gap`` turns this into isotonic regression (pool adjacent
    violators); cutting its solution to the bounds is the bounded optimum.

    Parameters
    ----------
    positions : sequence of float
        In any order.
    gap, low, high : float
        ``high - low`` must hold all of them; if not, the last ones pass ``high``.

    Returns
    -------
    list of float
        New positions in the order of the input.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    pools: list[tuple[float, int]] = []  # mean and size
    for rank, i in enumerate(order):
        mean, size = positions[i] - rank * gap, 1
        while pools and pools[-1][0] > mean:
            last, n = pools.pop()
            mean, size = (mean * size + last * n) / (size + n), size + n
        pools.append((mean, size))
    top = max(low, high - (len(positions) - 1) * gap)
    pooled = [min(max(mean, low), top) for mean, size in pools for _ in range(size)]
    result = [0.0] * len(positions)
    for rank, i in enumerate(order):
        result[i] = pooled[rank] + rank * gap
    return result


def shorten(text: str, width: float) -> str:
    """Cut a label to about ``width`` px.

    The ellipsis is in the middle, because labels differ at their ends: a method, then its settings.
    """
    count = max(3, int(width / CHARACTER_WIDTH))
    if len(text) <= count:
        return text
    tail = (count - 1) // 2
    return f"{text[: count - 1 - tail].rstrip()}…{text[-tail:].lstrip()}"


def colour_class(index: int) -> str:
    """Style class of the colour of series ``index``."""
    return f"s{index % N_COLOURS}"


def dash(index: int) -> str | None:
    """Line pattern of series ``index``."""
    return DASHES[index // N_COLOURS % len(DASHES)]


def marker(index: int, x: float, y: float, tooltip: str | None = None) -> ET.Element:
    """The mark of series ``index`` at a point."""
    r = 4.2
    outline = {
        "circle": f"m{short(-r)} 0a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        "square": "m-3.7 -3.7h7.4v7.4h-7.4z",
        "triangle": "m0 -5l4.7 8.2h-9.4z",
        "diamond": "m0 -5.4l5 5.4l-5 5.4l-5 -5.4z",
        "wedge": "m0 5l-4.7 -8.2h9.4z",
        "cross": "m-1.5 -4.7h3v3.2h3.2v3h-3.2v3.2h-3v-3.2h-3.2v-3h3.2z",
    }[SHAPES[index % len(SHAPES)]]
    path = f"M{short(x)} {short(y)}{outline}"
    return element("path", title(tooltip), d=path, class_=f"mark {colour_class(index)}")


def title(text: str | None) -> ET.Element | None:
    """Text under the pointer."""
    return None if text is None else element("title", text)


def figure_svg(width: float, height: float, description: str, *children: ET.Element) -> ET.Element:
    """An SVG root that scales with the page and says to a screen reader what it shows."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {short(width)} {short(height)}",
        role="img",
        aria_label=description,
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> ET.Element:
    """A straight line of a style class."""
    return element("path", d=f"M{short(x1)} {short(y1)}L{short(x2)} {short(y2)}", class_=style)


def polyline(points: Sequence[tuple[float, float]], style: str, pattern: str | None) -> ET.Element:
    """Connected points."""
    path = "M" + "L".join(f"{short(x)} {short(y)}" for x, y in points)
    return element("path", d=path, class_=f"line {style}", stroke_dasharray=pattern)


def text(
    x: float, y: float, content: str, *, anchor: str = "start", style: str | None = None
) -> ET.Element:
    """One line of text; ``anchor`` is ``start``, ``middle`` or ``end``."""
    where = None if anchor == "start" else anchor
    return element("text", content, x=x, y=y, text_anchor=where, class_=style)


def viridis(share: float) -> str:
    """Colour of a share in [0, 1], as ``#rrggbb``; values outside are cut."""
    position = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    i = min(int(position), len(VIRIDIS) - 2)
    part = position - i
    channels = (
        round((VIRIDIS[i] >> s & 255) * (1 - part) + (VIRIDIS[i + 1] >> s & 255) * part)
        for s in (16, 8, 0)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)
