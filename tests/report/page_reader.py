"""Reads a page back."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


class Reader(HTMLParser):
    """Checks nesting; collects elements, attributes, text outside the style sheet, and table rows."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.attributes, self.pieces = [], [], [], []
        self.rows = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        """Open an element."""
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        """Close the element opened last."""
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, text):
        """Keep text, that of table cells also by row."""
        if "style" in self.stack:
            return
        self.pieces.append(text)
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += text

    @property
    def text(self):
        """All text, white space collapsed."""
        return " ".join(" ".join(self.pieces).split())


def assert_self_contained(reader):
    """No scripts, no handlers, nothing from elsewhere."""
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(reader.tags)
    for tag, key, value in reader.attributes:
        assert not key.startswith("on"), (tag, key)
        assert key not in ("src", "href", "xlink:href", "action"), (tag, key, value)
