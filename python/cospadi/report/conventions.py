"""What a "ratio" may mean. Published comparisons disagree on it, so every table shows all of them side by side."""

from __future__ import annotations

from cospadi.report.result import Result

CONVENTIONS = {
    "stored": (
        "stored",
        "tensors as they are written: values, masks, scales, padding to whole bytes",
    ),
    "file": ("file", "whole files, headers included"),
    "values": (
        "values",
        "number of stored values alone, whatever their width; positions not counted (what most papers print)",
    ),
    "mask16": (
        "mask 16",
        "values at 16 bits each, whatever they are stored as, and the mask (CoSpaDi, Eq. 10)",
    ),
    "mask14": (
        "mask 14",
        "the same, with coefficients at 14 bits where there is a mask (CoSpaDi, Eq. 11)",
    ),
}
"""Heading and meaning by key of a run's ``ratio``: removed share of the dense bfloat16 model."""

RELATIVE_ERROR = (
    "Relative error of each linear's outputs on the calibration text, ‖X(W − Ŵ)‖ / ‖XW‖, where X are its inputs, W is "
    "the original weight and Ŵ the compressed one"
)
"""What both pages say about the error that fits make least."""


def conventions_of(result: Result) -> list[str]:
    """Keys of the conventions that occur, the known ones first and in the order of `CONVENTIONS`."""
    found = {key for run in result.runs for key in (*run.ratio, *run.model_ratio)}
    return [key for key in CONVENTIONS if key in found] + sorted(found - set(CONVENTIONS))


def heading(key: str) -> str:
    """Column heading of a convention; an unknown one keeps its key."""
    return CONVENTIONS[key][0] if key in CONVENTIONS else key
