"""Coefficients of as many bits as a budget allows: which integers, which scales, how many weights kept.

Under ``coeffs_dtype: auto`` a linear keeps its own weights (identity atoms) as integers. From 4 bits on all of them, in
the widest type that fits, with one scale per output and, where bits are left, one per group. Below, a part of them and
a mask. What is best at a size was measured in the output metric on layer 15 of SmolLM2-135M off its grid
(docs/results.md): groups of 64 are worth about what their scales cost, so there is one scale per output; half the
weights in int4 equal all of them in int3, and masked int4 lies on the line from there to full int4; below 3 bits masked
int3 is better than masked int4. Above 4 bits nothing with a mask was tried: masked int5 loses to masked int4 at 3.5.

Full widths lie a bit and more apart, and a budget between two of them would go unused in every linear alone: 8 bits
per weight do not hold int8 with its scales. So `deal_bits` lends what is left over to some linears.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from cospadi.learn.budget import VALUE_BITS, StorageWidths
from cospadi.learn.quantize import StorageTypes

AUTO = "auto"
"""Name of the choice in recipes."""

FULL_WIDTHS = (4, 5, 6, 8)
"""Integers that keep every weight."""

SMALLEST_GROUP = 32
"""Coefficients that share a scale, at least."""

LOWEST_BITS = 1.4
"""Bits per weight below which nothing has been tried."""

STEP = 0.1
"""Bits between neighbouring sizes with a mask."""

_SLACK = 1e-9


def integer_types(bits: float, d_in: int) -> StorageTypes:
    """Storage types for ``bits`` per weight of a linear with ``d_in`` inputs, mask and scales included."""
    for width in reversed(FULL_WIDTHS):
        spare = bits - full_bits(width, d_in)
        if spare >= -_SLACK:
            n_scales = 1 + math.floor(spare * d_in / VALUE_BITS + _SLACK)
            return StorageTypes(coeffs=f"int{width}", coeffs_group=_group(d_in, n_scales))
    is_masked = bits > full_bits(3, d_in) + STEP / 2
    return StorageTypes(coeffs="int4" if is_masked else "int3")


def integer_ratios(d_in: int) -> list[float]:
    """Removed shares worth choosing from, ascending: every width with a scale per output, and sizes with a mask."""
    full = [full_bits(width, d_in) for width in (3, *FULL_WIDTHS)]
    steps = itertools.takewhile(
        lambda bits: bits < full[1] - STEP / 2,
        (STEP * step for step in itertools.count(round(LOWEST_BITS / STEP))),
    )
    # a mask with nearly everything behind it loses to no mask
    masked = [b for b in steps if b < full[0] - 3 * STEP or b > full[0] + STEP]
    return sorted(removed_share(bits + _SLACK) for bits in (*full, *masked))


def deal_bits(shapes: Sequence[tuple[int, int]], bits: float) -> list[float]:
    """Bits per weight of every linear, so that together they take ``bits`` and each has a size worth having.

    A linear starts at the largest size of `integer_ratios` within ``bits``; what that leaves raises linears by a size
    each, those of the fewest weights first (more bits for them cost least, and value projections are both the smallest
    and the ones that lose most, docs/results.md), among equal ones the first and last of the model before those in its
    middle. Between two sizes with a mask, and above the widest integers, every linear gets ``bits`` as they are.

    Parameters
    ----------
    shapes : sequence of (int, int)
        Inputs and outputs of the linears in model order.
    bits : float
        Per weight, mask and scales included.

    Returns
    -------
    list of float
        In the order of ``shapes``; their mean over the weights is at most ``bits``.
    """
    sizes = {d_in: _sizes(d_in) for d_in, _ in shapes}
    dealt: list[float] = []
    for d_in, _ in shapes:
        fitting = [size for size, _ in sizes[d_in] if size <= bits + _SLACK]
        following = sizes[d_in][len(fitting) : len(fitting) + 1]
        is_between = bool(fitting and following)
        if is_between:
            is_between = sizes[d_in][len(fitting) - 1][1] or following[0][1]
        dealt.append(fitting[-1] if is_between else bits)
    left = sum(
        (bits - own) * d_in * d_out for own, (d_in, d_out) in zip(dealt, shapes, strict=True)
    )
    middle = (len(shapes) - 1) / 2
    order = sorted(
        (i for i, own in enumerate(dealt) if own != bits),
        key=lambda i: (math.prod(shapes[i]), -abs(i - middle)),
    )
    is_raised = True
    while is_raised:
        is_raised = False
        for i in order:
            above = [size for size, _ in sizes[shapes[i][0]] if size > dealt[i] + 2 * _SLACK]
            cost = (above[0] - dealt[i]) * math.prod(shapes[i]) if above else math.inf
            if cost <= left:
                dealt[i] = above[0]
                left -= cost
                is_raised = True
    return dealt


def full_bits(width: int, d_in: int) -> float:
    """Bits per weight of all weights as integers, with one scale per output."""
    return StorageWidths(coeffs=width, coeffs_scaled=True).row_bits(d_in) / d_in


def removed_share(bits: float) -> float:
    """Removed share of the bfloat16 bytes at ``bits`` per weight."""
    return 1.0 - bits / VALUE_BITS


def kept_bits(ratio: float) -> float:
    """Bits per weight at a removed share."""
    return (1.0 - ratio) * VALUE_BITS


def _sizes(d_in: int) -> list[tuple[float, bool]]:
    """Bits per weight worth choosing from, ascending, and whether every weight is kept at them."""
    full = [full_bits(width, d_in) for width in (3, *FULL_WIDTHS)]
    found = sorted(kept_bits(ratio) for ratio in integer_ratios(d_in))
    return [(bits, any(abs(bits - known) < 10 * _SLACK for known in full)) for bits in found]


def _group(d_in: int, n_scales: int) -> int:
    """Smallest group with at most ``n_scales`` scales per output; 0: one scale."""
    group = max(SMALLEST_GROUP, 8 * math.ceil(math.ceil(d_in / n_scales) / 8))
    return 0 if group >= d_in else group
