"""The page of one compression: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from cospadi.report.compression import (
    BUILTIN_TEXT,
    LEAST_TOKENS,
    PLAIN_WHITENING,
    Compression,
    Linear,
    read_compression,
)
from cospadi.report.conventions import CONVENTIONS, RELATIVE_ERROR
from cospadi.report.linear_table import linear_table
from cospadi.report.maps import cells_of, colour_bar, colour_scale, map_panel, places_of
from cospadi.report.markup import element, extend
from cospadi.report.numbers import MISSING, THIN_SPACE, percent, plural, seconds, size
from cospadi.report.parts import (
    STYLE_FILE,
    as_text,
    code,
    facts,
    figure_section,
    page_text,
    section,
)
from cospadi.report.scores import Score, before_and_after, difference, score_table

STYLES = (STYLE_FILE, "compression.css")

HOW_TO_MEASURE = """cospadi eval MODEL --text TEXT --json original.json
cospadi eval OUT --text TEXT --json compressed.json
cospadi report OUT --original original.json --eval compressed.json"""


def compression_page(data: Mapping[str, Any], scores: Sequence[Score] = ()) -> str:
    """The page as text. It depends on nothing but the arguments: the same data gives the same bytes.

    Parameters
    ----------
    data : mapping
        Of ``cospadi_report.json``.
    scores : sequence of Score
        What was measured since; see `cospadi.report.scores.read_scores`.

    Raises
    ------
    InputError
        The data is not that of a compression.
    """
    found = read_compression(data)
    sections = (
        _header(found, scores),
        _scores(scores),
        _sizes(found),
        _errors(found),
        _shares(found),
        _linears(found),
        _coverage(found),
        _numerics(found),
        _dense(found),
        _blocks(found),
        _time(found),
        _recipe(found),
        _provenance(found),
    )
    return page_text(f"{found.name}, compressed by cospadi", sections, STYLES)


def _header(data: Compression, scores: Sequence[Score]) -> ET.Element:
    lead = element("p", class_="lead")
    n_linears = plural(len(data.linears), "linear")
    extend(lead, f"{n_linears} of {data.name} compressed by method {data.method}")
    dense, stored = data.linear_bytes.get("dense"), data.linear_bytes.get("stored")
    if dense is not None and stored is not None:
        extend(lead, f": {size(dense)} in bfloat16 became {size(stored)}")
    if "stored" in data.ratio:
        extend(lead, f", {percent(data.ratio['stored'])}{THIN_SPACE}% of the bytes removed")
    extend(lead, ".")
    results = facts(
        *(
            (f"{name}, bfloat16 → stored", f"{size(n['dense'])} → {size(n['stored'])}")
            for name, n in (
                ("Whole model", data.model_bytes),
                ("Compressed linears", data.linear_bytes),
            )
            if {"dense", "stored"} <= n.keys()
        ),
        *(
            (
                f"Perplexity on {original.heading}, original → compressed",
                f"{original.shown_value} → {found.shown_value}, {difference(found, original)}",
            )
            for original, found in before_and_after(scores)
        ),
        ("Calibration", _calibration(data)),
    )
    results.set("class", "results")
    warning = None
    if data.failed:
        text = f"Partial: {plural(len(data.failed), 'linear')} had to stay dense, see below."
        warning = element("p", element("strong", text))
    title = f"{data.name}, compressed"
    return element("header", element("h1", title), lead, warning, results)


def _calibration(data: Compression) -> str:
    text = as_text(data.calibration.get("description")) or "none: every input counts alike"
    return f"{text} ({BUILTIN_TEXT})" if data.is_builtin_text else text


def _provenance(data: Compression) -> ET.Element:
    terms = facts(
        ("Source", as_text(data.source.get("name"))),
        ("Fingerprint of its weights", code(data.source.get("fingerprint"))),
        ("Calibration token ids, SHA-256", code(data.calibration.get("ids_sha256"))),
        ("Versions", ", ".join(f"{name} {v}" for name, v in data.versions.items()) or None),
    )
    return section("Where it came from", terms)


def _sizes(data: Compression) -> ET.Element:
    keys = [key for key in CONVENTIONS if key in data.ratio or key in data.model_ratio]
    names = ("dense, bfloat16", "stored", *(f"removed, {CONVENTIONS[key][0]}" for key in keys))
    head = element("tr", element("th"), *(element("th", name, scope="col") for name in names))
    body = element("tbody")
    for label, n_bytes, ratio in (
        ("compressed linears", data.linear_bytes, data.ratio),
        ("whole model", data.model_bytes, data.model_ratio),
    ):
        values = [size(n_bytes[k]) if k in n_bytes else MISSING for k in ("dense", "stored")]
        values += [f"{percent(ratio[k])}{THIN_SPACE}%" if k in ratio else MISSING for k in keys]
        cells = (element("td", value) for value in values)
        body.append(element("tr", element("th", label, scope="row"), *cells))
    table = element("table", element("thead", head), body, class_="plain")
    note = (
        "The four ways in which publications count what was removed, always against the dense bfloat16 weights. The "
        "budget of a recipe is in stored bytes unless it says nominal."
    )
    return section(
        "Bytes and ratios",
        element("div", table, class_="scroll hinted", tabindex="0"),
        element("p", note, class_="note"),
        facts(*(CONVENTIONS[key] for key in keys)),
    )


def _scores(scores: Sequence[Score]) -> ET.Element:
    if not scores:
        text = "Not measured yet. MODEL is the original, OUT this folder, TEXT a text file (builtin: one to try with):"
        return section("Measured", element("p", text), code(HOW_TO_MEASURE, "command"))
    note = (
        "Measured with cospadi eval. Rows below one heading saw the same text or task and may be compared; differences "
        "are from the original. Lower perplexity is better, higher accuracy is better."
    )
    return section("Measured", score_table(scores), element("p", note, class_="note"))


def _errors(data: Compression) -> ET.Element | None:
    known = {i.name: i.relative_error for i in data.linears if i.relative_error is not None}
    caption = [
        f"{RELATIVE_ERROR}: projections down, layers across; 0 is exact. Numbers at the right are means of a row; the "
        "table below has every value."
    ]
    return _map(
        data, "Error by layer and projection", "Figure 1.", "relative error", known, caption
    )


def _shares(data: Compression) -> ET.Element | None:
    if not data.has_allocation:
        return None
    known = {item.name: item.kept for item in data.linears if item.kept is not None}
    caption = [
        "Bytes of each linear as a share of its dense bytes. The budget was divided so that the loss which coarse fits "
        "predicted is least: bright linears were found to need their bytes, dark ones to spare them."
    ]
    if data.predicted_loss is not None and data.predicted_uniform is not None:
        caption.append(
            f"Predicted loss with these shares {data.predicted_loss:.4f} nats per token, with the same share for all "
            f"{data.predicted_uniform:.4f}."
        )
    return _map(data, "Where the bytes went", "Figure 2.", "share of bytes kept", known, caption)


def _map(
    data: Compression,
    heading: str,
    number: str,
    quantity: str,
    values: Mapping[str, float],
    caption: list[str],
) -> ET.Element | None:
    if not values:
        return None
    places, cells = places_of(item.name for item in data.linears), cells_of(values)
    if len(places.used) < len(data.linears):
        caption.append("Linears that differ in a second number only (experts) are averaged.")
    scale = colour_scale(list(cells.values()))
    mean = sum(values.values()) / len(values)
    title = f"{quantity}: mean {mean:.3f}, {min(values.values()):.3f} to {max(values.values()):.3f}"
    description = f"{quantity} by layer and projection"
    panel = map_panel(title, description, cells, places, scale)
    panel.set("class", "panel whole")
    return figure_section(heading, number, [colour_bar(scale, quantity), panel], caption)


def _linears(data: Compression) -> ET.Element | None:
    if not data.linears:
        return None
    note = (
        "A linear y = x W is stored as y = [x | x D] S: s coefficients per output over identity atoms (the inputs "
        "themselves, free to store) and K learned atoms (the columns of the dictionary D). Bytes count values, "
        "positions and scales; a shared dictionary is counted with its owner. “% kept” is stored bytes as a share of "
        "the dense ones in bfloat16; the relative error is that of figure 1 (X are the inputs, W is the original "
        "weight, Ŵ the compressed one); the error of the weight, ‖W − Ŵ‖ / ‖W‖, looks at no text."
    )
    if data.has_allocation:
        note += " Predicted losses are in nats per token, from coarse fits before the real one."
    return section(
        "What each linear got",
        element("p", note, class_="note"),
        element(
            "details",
            element("summary", f"the table of {plural(len(data.linears), 'linear')}"),
            linear_table(data.linears),
        ),
        style="across",
    )


def _coverage(data: Compression) -> ET.Element | None:
    rates = {item.name: item.tokens_per_input for item in data.linears}
    known = {name: rate for name, rate in rates.items() if rate is not None}
    if not known:
        return None
    least = min(known, key=lambda name: known[name])
    events = element("ul", class_="events")
    text = f"{known[least]:.1f} to {max(known.values()):.1f} calibration tokens per input dimension; fewest"
    events.append(element("li", f"{text}: {least}"))
    few = [name for name, rate in known.items() if rate < LEAST_TOKENS]
    if few:
        strong = element("strong", f"Fewer than {LEAST_TOKENS:g} tokens per input dimension")
        events.append(element("li", strong, f": {plural(len(few), 'linear')}", _names(few)))
    dead = {item.name: item.n_dead_inputs for item in data.linears if item.n_dead_inputs}
    if dead:
        strong = element("strong", "Input channels that stay at zero")
        names = _names([f"{name} ({n})" for name, n in dead.items()])
        events.append(element("li", strong, f": in {plural(len(dead), 'linear')}", names))
    else:
        events.append(element("li", "No input channel stays at zero."))
    note = (
        "How well the calibration text shows the inputs of each linear. With few tokens per input dimension the fit "
        "follows the text rather than the model; weights of a channel that stays at zero count for nothing in it."
    )
    return section("Coverage of the calibration", element("p", note, class_="note"), events)


def _numerics(data: Compression) -> ET.Element:
    ladders: dict[tuple[str, ...], list[Linear]] = {}
    for item in data.linears:
        if item.whitening:
            ladders.setdefault(item.whitening, []).append(item)
    events = element("ul", class_="events")
    for steps, members in ladders.items():
        text = f"{plural(len(members), 'linear')}: {', then '.join(steps)}"
        if steps in PLAIN_WHITENING:
            events.append(element("li", f"{text} (nothing to repair)"))
        else:
            events.append(element("li", text, _names([item.name for item in members])))
    unused = {item.name: item.n_unused for item in data.linears if item.n_unused}
    if unused:
        n_atoms, n_linears = sum(unused.values()), plural(len(unused), "linear")
        text = f"{n_atoms} learned atoms of {n_linears} were used by no output at the end"
        events.append(element("li", text, _names([f"{name} ({n})" for name, n in unused.items()])))
    events.extend(element("li", note) for note in data.notes)
    note = (
        "How the square root of each activation Gram was found (a plain Cholesky factor, or what had to be done to get "
        "one), atoms without use, and what was noticed about the source."
    )
    known = events if len(events) else element("p", "Nothing is recorded.")
    return section("Numerics", element("p", note, class_="note"), known)


def _dense(data: Compression) -> ET.Element | None:
    if not data.dense:
        return None
    reasons: dict[tuple[bool, str], list[str]] = {}
    failed = set(data.failed)
    for item in data.dense:
        reasons.setdefault((item.name not in failed, item.reason), []).append(item.name)
    items = []
    for (is_meant, reason), names in sorted(reasons.items(), key=lambda pair: pair[0][0]):
        state = "" if is_meant else "failed, "
        count = element("strong", f"{state}{plural(len(names), 'tensor')}")
        items.append(element("li", count, f": {reason}", _names(names)))
    return section("Left dense", element("ul", *items, class_="events"))


def _names(names: Sequence[str]) -> ET.Element:
    """Module names, folded away where they are many."""
    listed = element("div", ", ".join(names), class_="names")
    if len(names) <= 3:
        return listed
    return element("details", element("summary", "which"), listed)


def _blocks(data: Compression) -> ET.Element | None:
    if not data.blocks:
        return None
    heads = ("Block", "error before", "after", "", "seconds")
    head = element("tr", *(element("th", name, scope="col") for name in heads))
    body = element("tbody")
    for block in data.blocks:
        values = [MISSING if v is None else f"{v:.4f}" for v in (block.before, block.after)]
        values.append("taken" if block.is_kept else "not better: left as fitted")
        values.append(MISSING if block.seconds is None else seconds(block.seconds))
        name = MISSING if block.block is None else str(block.block)
        cells = (element("td", value) for value in values)
        body.append(element("tr", element("th", name, scope="row"), *cells))
    table = element("table", element("thead", head), body, class_="plain")
    n_kept = sum(block.is_kept for block in data.blocks)
    note = (
        f"Coefficients and atoms of each decoder block were tuned together towards the original block's output; errors "
        f"are those of the block's output on windows held back. Taken where it helped: {n_kept} of "
        f"{plural(len(data.blocks), 'block')}."
    )
    return section(
        "Block-wise reconstruction",
        element("p", note, class_="note"),
        element("div", table, class_="scroll", tabindex="0"),
    )


def _time(data: Compression) -> ET.Element | None:
    if not data.stages and data.seconds is None:
        return None
    rows = list(data.stages.items())
    if data.seconds is not None:
        rows.append(("all", data.seconds))
    body = element("tbody")
    for name, value in rows:
        share = f"{percent(value / data.seconds)}{THIN_SPACE}%" if data.seconds else MISSING
        cells = (element("td", seconds(value)), element("td", share))
        body.append(element("tr", element("th", name, scope="row"), *cells))
    heads = (element("th", name, scope="col") for name in ("Stage", "seconds", "share"))
    table = element("table", element("thead", element("tr", *heads)), body, class_="plain")
    notes = []
    if data.threads is not None:
        notes.append(f"On {plural(data.threads, 'thread')}. ")
    if data.n_resumed:
        text = plural(data.n_resumed, "linear")
        notes.append(
            f"Interrupted and resumed: {text} came from an earlier process, whose time is not in the stages."
        )
    note = element("p", *notes, class_="note") if notes else None
    return section("Time", element("div", table, class_="scroll", tabindex="0"), note)


def _recipe(data: Compression) -> ET.Element:
    settings = facts(*((key, code(_setting(value))) for key, value in data.recipe.items()))
    all_of_them = element("details", element("summary", "every setting"), settings)
    text = "With the same model, calibration text and versions, the recipe beside this page gives the same result:"
    again = code(data.command, "command")
    return section("Recipe", element("p", text), again, all_of_them)


def _setting(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
