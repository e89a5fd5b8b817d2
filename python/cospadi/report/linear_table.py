"""The table of what each linear got, in an order that the reader chooses without a script.

Every row carries its rank in every order as a style variable; the style sheet lays the table out as a grid and puts the
rows in the order whose radio button is pressed. Where a browser cannot do that, the rows are in the model's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from cospadi.report.compression import Linear
from cospadi.report.markup import element
from cospadi.report.numbers import MISSING, byte_unit, in_unit, percent, seconds


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes
    ----------
    name : str
        Heading.
    cell : callable
        Text of a linear's cell.
    order : str, optional
        Key of the order that the column gives, as the style sheet knows it.
    rank : callable, optional
        Largest first in that order; None comes last.
    """

    name: str
    cell: Callable[[Linear], str]
    order: str | None = None
    rank: Callable[[Linear], float | None] | None = None


def linear_table(linears: Sequence[Linear]) -> ET.Element:
    """The table below the choice of its order."""
    columns = [c for c in _columns(linears) if any(c.cell(item) != MISSING for item in linears)]
    ranks = {
        c.order: _ranks([c.rank(item) for item in linears]) for c in columns if c.order and c.rank
    }
    heads = (element("th", c.name, scope="col") for c in columns)
    head = element("tr", element("th", "Linear", scope="col", class_="name"), *heads)
    body = element("tbody")
    for i, item in enumerate(linears):
        style = ";".join(f"--by-{order}:{places[i]}" for order, places in ranks.items())
        remark = None
        if item.leader is not None:
            remark = element("small", f"dictionary of {item.leader}")
        row = element(
            "tr", element("th", *_breakable(item.name), remark, scope="row", class_="name")
        )
        row.extend(element("td", c.cell(item)) for c in columns)
        if style:
            row.set("style", style)
        body.append(row)
    table = element("table", element("thead", head), body, style=f"--columns:{len(columns)}")
    chosen = [(None, "as in the model")] + [(c.order, c.name) for c in columns if c.order in ranks]
    scroll = element("div", table, class_="scroll hinted", tabindex="0")
    return element("div", _choice(chosen), scroll, class_="ordered")


def _choice(orders: Sequence[tuple[str | None, str]]) -> ET.Element:
    field = element("fieldset", element("legend", "Order, largest first:"), class_="orders")
    for order, name in orders:
        button = element(
            "input", type="radio", name="order", id=f"order-{order or 'model'}", value=name
        )
        if order is None:
            button.set("checked", "checked")
        field.append(element("label", button, f" {name}"))
    return field


def _breakable(name: str) -> list[str | ET.Element]:
    """A module's name that lines may end in after its dots."""
    first, *rest = name.split(".")
    parts: list[str | ET.Element] = [first]
    for part in rest:
        parts += [".", element("wbr"), part]
    return parts


def _ranks(values: Sequence[float | None]) -> list[int]:
    """Place of each value in descending order; equal ones keep theirs, missing ones are last."""
    order = sorted(range(len(values)), key=lambda i: -_or_last(values[i]))
    places = [0] * len(values)
    for place, i in enumerate(order):
        places[i] = place
    return places


def _or_last(value: float | None) -> float:
    return -1.0 if value is None else value  # all that is shown is at least 0


def _columns(linears: Sequence[Linear]) -> list[Column]:
    unit = byte_unit(max((item.stored_bytes or 0 for item in linears), default=0))
    return [
        Column("in × out", _shape),
        Column("identity atoms", lambda item: _integer(item.n_identity)),
        Column("learned atoms K", lambda item: _integer(item.n_atoms), "atoms", _of("n_atoms")),
        Column("s", lambda item: _integer(item.sparsity)),
        Column("coefficients", lambda item: item.coeffs_dtype or MISSING),
        Column("dictionary", _dictionary_type),
        Column(
            "bits per weight",
            lambda i: _decimal(i.bits_per_weight, 2),
            "bits",
            _of("bits_per_weight"),
        ),
        Column(
            unit[0],
            lambda i: MISSING if i.stored_bytes is None else in_unit(i.stored_bytes, unit),
            "bytes",
            _of("stored_bytes"),
        ),
        Column(
            "% kept", lambda i: MISSING if i.kept is None else percent(i.kept), "kept", _of("kept")
        ),
        Column(
            "relative error",
            lambda i: _decimal(i.relative_error, 4),
            "error",
            _of("relative_error"),
        ),
        Column("error of the weight", lambda i: _decimal(i.weight_error, 4)),
        Column("tokens per input", lambda i: _decimal(i.tokens_per_input, 1)),
        Column("predicted loss", lambda i: _scientific(i.loss), "loss", _of("loss")),
        Column("with an even share", lambda i: _scientific(i.even_loss)),
        Column(
            "seconds",
            lambda i: MISSING if i.seconds is None else seconds(i.seconds),
            "seconds",
            _of("seconds"),
        ),
    ]


def _of(name: str) -> Callable[[Linear], float | None]:
    def value(item: Linear) -> float | None:
        found: float | None = getattr(item, name)
        return found

    return value


def _shape(item: Linear) -> str:
    known = item.d_in is not None and item.d_out is not None
    return f"{item.d_in} × {item.d_out}" if known else MISSING


def _dictionary_type(item: Linear) -> str:
    """Storage type of the dictionary, where there is one."""
    return (item.dictionary_dtype or MISSING) if item.n_atoms else MISSING


def _integer(value: int | None) -> str:
    return MISSING if value is None else str(value)


def _decimal(value: float | None, places: int) -> str:
    return MISSING if value is None else f"{value:.{places}f}"


def _scientific(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2e}".replace("-", "−")
