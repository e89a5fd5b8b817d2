"""Weights of another size than the rest: where activations overflow, they are what to look at first."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

_TIMES_MEDIAN = 1e4
"""Largest values of a model's matrices lie within a factor of some hundred of one another."""


def outlier_warning(first: str, n_more: int, largest: Mapping[str, float]) -> str:
    """What to say of inputs that are not finite.

    Parameters
    ----------
    first : str
        The first module whose input is not finite.
    n_more : int
        Other modules of which that holds.
    largest : mapping
        Largest absolute weights of matrices by name.
    """
    text = f"what enters {first} is not finite on the calibration text"
    if n_more:
        text += f", nor what enters {n_more} more"
    text += ": they stay dense"
    typical = median(largest.values()) if largest else 0.0
    name = max(largest, key=lambda key: largest[key], default="")
    if typical > 0 and largest[name] > _TIMES_MEDIAN * typical:
        return (
            f"{text}. The cause is likely {name}, whose largest weight is {largest[name]:.3g}, "
            f"{largest[name] / typical:.1g} times the others'"
        )
    return f"{text}. No matrix has weights of unusual size; norms and embeddings were not looked at"
