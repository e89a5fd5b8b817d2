"""HTML and SVG elements. All text goes through the serialiser, so that nothing in a result can become markup."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

Child = str | ET.Element | None

# HTML has no way to write these, escaped or not.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def clean(text: str) -> str:
    """Replace characters that HTML forbids, such as terminal escapes in a program's message."""
    return _UNPRINTABLE.sub("\ufffd", text)


def element(tag: str, *children: Child, **attributes: str | float | None) -> ET.Element:
    """Make an element.

    Parameters
    ----------
    *children : str, Element or None
        Text and elements in order; None is left out.
    **attributes : str, float or None
        ``class_`` stands for ``class``, another underscore for a dash. Numbers are written with two decimals at most;
        None is left out.
    """
    node = ET.Element(tag)
    for name, value in attributes.items():
        if value is not None:
            text = value if isinstance(value, str) else short(value)
            node.set(name.rstrip("_").replace("_", "-"), clean(text))
    return extend(node, *children)


def extend(node: ET.Element, *children: Child) -> ET.Element:
    """Append text and elements to ``node`` and return it."""
    for child in children:
        if child is None:
            continue
        if isinstance(child, str):
            if len(node):
                node[-1].tail = (node[-1].tail or "") + clean(child)
            else:
                node.text = (node.text or "") + clean(child)
        else:
            node.append(child)
    return node


def short(value: float) -> str:
    """A coordinate: two decimals at most, no trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def document(root: ET.Element) -> str:
    """Serialise a whole page."""
    return "<!DOCTYPE html>\n" + ET.tostring(root, encoding="unicode", method="html") + "\n"
