"""From a ratio to sizes: atoms and coefficients of a sparse factor, rank of a low-rank one.

Two conventions, never mixed (see FORMAT.md):

* ``stored``: removed share of the bf16 bytes of the weight, mask counted (CoSpaDi Eq. 10);
* ``nominal``: removed share of the *values*, mask not counted (CoSpaDi Eq. 11, what papers report).
"""

from __future__ import annotations

import math
from typing import Literal

from cospadi.errors import InputError

RatioConvention = Literal["stored", "nominal"]

VALUE_BITS = 16


def check_ratio(ratio: float) -> None:
    """Raise `InputError` unless ``0 < ratio < 1``."""
    if not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and 0.0 < ratio < 1.0):
        raise InputError(
            f"ratio: expected a removed share between 0 and 1 (exclusive), got {ratio!r}"
        )


def low_rank_size(d_in: int, d_out: int, ratio: float) -> int:
    """Largest rank r with ``r (d_in + d_out) <= (1 - ratio) d_in d_out``; 0 if none fits.

    Both conventions agree: a low-rank factor has no mask.
    """
    check_ratio(ratio)
    return math.floor((1.0 - ratio) * d_in * d_out / (d_in + d_out) + 1e-9)


def sparse_size(
    d_in: int,
    d_out: int,
    ratio: float,
    *,
    k_over_s: float = 2.0,
    convention: RatioConvention = "stored",
) -> tuple[int, int]:
    """Number of atoms K and coefficients per column s for a ratio.

    ``nominal`` is the paper's formula with floors, ``K = (1-g) d_in d_out / (d_in + d_out / rho)`` and
    ``s = K / rho``. ``stored`` solves ``16 d_in K + 16 s d_out + K d_out <= (1-g) 16 d_in d_out`` over aligned
    sizes near ``K / s = rho``: K a multiple of 16 (8 below 256, 1 below 16) and s of 8 (4 below 64, 1
    below 16), because aligned sizes are what kernels want, and the pair that leaves the
    fewest bytes unused, because bytes are what the user asked for.

    Returns
    -------
    (n_atoms, sparsity)
        ``(0, 0)`` if not even one atom fits.

    Raises
    ------
    InputError
        Ratio outside (0, 1), or ``k_over_s < 1``.
    """
    check_ratio(ratio)
    if not (math.isfinite(k_over_s) and k_over_s >= 1.0):
        raise InputError(f"k_over_s: expected a number of at least 1, got {k_over_s!r}")
    if convention == "nominal":
        n_atoms = math.floor((1.0 - ratio) * d_in * d_out / (d_in + d_out / k_over_s) + 1e-9)
        sparsity = math.floor(n_atoms / k_over_s)
        return (n_atoms, sparsity) if sparsity >= 1 else (0, 0)
    return _stored_size(d_in, d_out, (1.0 - ratio) * VALUE_BITS * d_in * d_out, k_over_s)


def stored_bits(d_in: int, d_out: int, n_atoms: int, sparsity: int) -> int:
    """Bits of dictionary, coefficients and mask as written, 16-bit values."""
    mask_bits = d_out * 8 * math.ceil(n_atoms / 8)
    return VALUE_BITS * (d_in * n_atoms + d_out * sparsity) + mask_bits


def _stored_size(d_in: int, d_out: int, budget: float, k_over_s: float) -> tuple[int, int]:
    ideal = budget / (VALUE_BITS * d_in + VALUE_BITS * d_out / k_over_s + d_out)
    atom_step = 16 if ideal >= 256 else 8
    if ideal < 16:
        atom_step = 1
    ideal_s = ideal / k_over_s
    s_step = 8 if ideal_s >= 64 else 4 if ideal_s >= 16 else 1
    best: tuple[float, int, int] | None = None
    low, high = math.floor(0.9 * ideal), math.ceil(1.1 * ideal)
    first = max(atom_step, low // atom_step * atom_step)
    for n_atoms in range(first, high + 1, atom_step):
        left = budget - stored_bits(d_in, d_out, n_atoms, 0)
        sparsity = min(int(left // (VALUE_BITS * d_out)) // s_step * s_step, n_atoms)
        if sparsity < 1:
            continue
        unused = 1.0 - stored_bits(d_in, d_out, n_atoms, sparsity) / budget
        off_ratio = abs(math.log(n_atoms / sparsity / k_over_s))
        # 1 % of unused bytes weighs as much as 10 % away from the wanted K / s.
        cost = unused + 0.1 * off_ratio
        if best is None or cost < best[0]:
            best = (cost, n_atoms, sparsity)
    return (best[1], best[2]) if best else (0, 0)
