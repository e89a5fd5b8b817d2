"""What pages are put together from: the frame, sections, lists of terms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from cospadi.report.markup import Child, document, element
from cospadi.report.numbers import THIN_SPACE, size

STYLE_FILE = "page.css"

CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The browser refuses anything that is not in the file, scripts included."""


def page_text(
    title: str, sections: Iterable[ET.Element | None], styles: Sequence[str] = (STYLE_FILE,)
) -> str:
    """A whole page with its style sheets inside; it depends on nothing but the arguments."""
    folder = Path(__file__).parent
    sheet = "".join((folder / name).read_text(encoding="utf-8") for name in styles)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=CONTENT_POLICY),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", sheet),
    )
    body = element("body", element("main", *(s for s in sections if s is not None)))
    return document(element("html", head, body, lang="en"))


def section(heading: str, *children: Child, style: str | None = None) -> ET.Element:
    """A part of the page below a heading."""
    return element("section", element("h2", heading), *children, class_=style)


def figure_section(
    heading: str, number: str, panels: Sequence[ET.Element], caption: Iterable[str]
) -> ET.Element:
    """A numbered figure below a heading."""
    text = element("p", element("b", f"{number} "), " ".join(caption), class_="note")
    drawn = element("div", *panels, class_="panels")
    return section(heading, text, drawn if panels else element("p", "Nothing to draw yet."))


def facts(*pairs: tuple[str, Child]) -> ET.Element:
    """A list of terms; a term without a value is left out."""
    terms = element("dl")
    for term, value in pairs:
        if value is not None:
            terms.append(element("dt", term))
            terms.append(element("dd", value))
    return terms


def as_text(value: object) -> str | None:
    """A value as it came; None stays None."""
    return None if value is None else str(value)


def code(value: object, style: str | None = None) -> ET.Element | None:
    """A hash, a name or a command; None stays None."""
    return None if value is None else element("code", str(value), class_=style)


def whole(value: object) -> str | None:
    """An integer in groups of three digits."""
    return f"{value:,}".replace(",", THIN_SPACE) if isinstance(value, int) else as_text(value)


def exact_size(value: object) -> str | None:
    """Bytes with a unit, and exactly."""
    if not isinstance(value, int):
        return as_text(value)
    return f"{size(value)} ({whole(value)} bytes)"
