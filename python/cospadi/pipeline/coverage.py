"""What a calibration text says about the inputs of the linears: tokens per input dimension, inputs that never move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cospadi.report.compression import LEAST_TOKENS


@dataclass(frozen=True)
class Coverage:
    """How well one distinct input was seen.

    Attributes
    ----------
    members : tuple of str
        Linears that receive it.
    d_in : int
        Its dimension.
    n_tokens : int
        Tokens that reached them; fewer than the text has for experts that a router chooses.
    n_dead : int
        Inputs that the text leaves at zero.
    """

    members: tuple[str, ...]
    d_in: int
    n_tokens: int
    n_dead: int

    @property
    def tokens_per_input(self) -> float:
        """Tokens per input dimension."""
        return self.n_tokens / self.d_in


def describe_coverage(items: Sequence[Coverage]) -> str:
    """One line about all inputs."""
    rates = [item.tokens_per_input for item in items]
    n_dead, n_inputs = sum(item.n_dead for item in items), sum(item.d_in for item in items)
    dead = f"{n_dead} of {n_inputs}" if n_dead else "no"
    return f"{min(rates):.1f} to {max(rates):.1f} tokens per input dimension; {dead} input channels stay at zero"


def coverage_warnings(items: Sequence[Coverage]) -> Iterator[str]:
    """What the text does not say enough about, and what to do; at most one line of each kind."""
    few = sorted(
        (item for item in items if item.tokens_per_input < LEAST_TOKENS),
        key=lambda item: item.tokens_per_input,
    )
    if few:
        least = few[0]
        yield (
            f"calibration: {least.n_tokens} tokens for the {least.d_in} inputs of {least.members[0]}, "
            f"{least.tokens_per_input:.1f} per input dimension{_others(few)}; at least {LEAST_TOKENS:g} are "
            "advised, more are better (samples, sequence_length)"
        )
    dead = sorted((item for item in items if item.n_dead), key=lambda item: -item.n_dead)
    if dead:
        most = dead[0]
        yield (
            f"calibration: {most.n_dead} of {most.d_in} inputs of {most.members[0]} stay at zero on this "
            f"text{_others(dead)}; their weights count for nothing in the fit: if other text uses them, "
            "calibrate on text like it"
        )


def coverage_event(items: Sequence[Coverage]) -> Mapping[str, object]:
    """The same as plain data for the log."""
    return {
        "text": describe_coverage(items),
        "tokens_per_input": {
            item.members[0]: round(item.tokens_per_input, 3)
            for item in items
            if item.tokens_per_input < LEAST_TOKENS
        },
        "dead_inputs": {item.members[0]: item.n_dead for item in items if item.n_dead},
    }


def _others(items: Sequence[Coverage]) -> str:
    n_linears = sum(len(item.members) for item in items) - 1
    return f" (and {n_linears} more linears)" if n_linears else ""
