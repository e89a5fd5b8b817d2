"""From a ratio to sizes: atoms and coefficients of a sparse factor, weights kept by pruning, rank of a low-rank factor.

Two conventions, never mixed (see FORMAT.md):

* ``stored``: removed share of the bf16 bytes of the weight, everything as written, mask counted (CoSpaDi Eq. 10 with
  bf16 values);
* ``nominal``: removed share of the *values*, mask and widths not counted (CoSpaDi Eq. 11, what papers report).

A group of weights that share a dictionary is budgeted as the one weight that they make side by side (CoSpaDi section
3.3): every formula takes the *sum* of the members' outputs as ``d_out``. With m equal members that is
``K = (1-g) m d_in d_out / (d_in + m d_out / rho)``. A smaller last group therefore gets its own, smaller K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cospadi.errors import InputError

RatioConvention = Literal["stored", "nominal"]

VALUE_BITS = 16
"""The dense weight that ratios compare with is stored in bfloat16; scales are bfloat16 too."""


@dataclass(frozen=True)
class StorageWidths:
    """Bits of the stored parts of a factor.

    Attributes
    ----------
    coeffs : int
        Bits of one coefficient: 16 (bfloat16, float16), 32, 14 (CoSpaDi Eq. 11) or an integer width. The
        coefficients of one output are padded to whole bytes.
    coeffs_scaled : bool
        Whether the coefficients carry 16-bit scales.
    coeffs_group : int
        Coefficients that share a scale; 0: one scale per output.
    dictionary : int
        Bits of one dictionary value.
    dictionary_scaled : bool
        Whether every atom carries a 16-bit scale.
    """

    coeffs: int = VALUE_BITS
    coeffs_scaled: bool = False
    coeffs_group: int = 0
    dictionary: int = VALUE_BITS
    dictionary_scaled: bool = False

    def __post_init__(self) -> None:
        for name, low in (("coeffs", 1), ("coeffs_group", 0), ("dictionary", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InputError(f"{name}: expected an integer of at least {low}, got {value!r}")

    def row_bits(self, sparsity: int) -> int:
        """Bits of the coefficients of one output: whole bytes of fields, and the scales."""
        bits = 8 * math.ceil(self.coeffs * sparsity / 8)
        if self.coeffs_scaled and sparsity:
            n_groups = math.ceil(sparsity / self.coeffs_group) if self.coeffs_group else 1
            bits += VALUE_BITS * n_groups
        return bits

    def dictionary_bits(self, d_in: int, n_atoms: int) -> int:
        """Bits of the dictionary, scales of the atoms included."""
        scale = VALUE_BITS if self.dictionary_scaled else 0
        return n_atoms * (self.dictionary * d_in + scale)

    def row_capacity(self, bits: float, bound: int) -> int:
        """Largest number of coefficients up to ``bound`` whose `row_bits` fit in ``bits``."""
        low, high = 0, bound
        while low < high:
            middle = (low + high + 1) // 2
            if self.row_bits(middle) <= bits:
                low = middle
            else:
                high = middle - 1
        return low


BF16 = StorageWidths()
"""Everything in bfloat16."""


def check_ratio(ratio: float) -> None:
    """Raise `InputError` unless ``0 < ratio < 1``."""
    if not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and 0.0 < ratio < 1.0):
        raise InputError(
            f"ratio: expected a removed share between 0 and 1 (exclusive), got {ratio!r}"
        )


def low_rank_size(
    d_in: int,
    d_out: int,
    ratio: float,
    *,
    convention: RatioConvention = "stored",
    widths: StorageWidths = BF16,
) -> int:
    """Largest rank r of a low-rank factor for a ratio; 0 if none fits.

    ``nominal``: ``r (d_in + d_out) <= (1 - ratio) d_in d_out``. ``stored`` counts the bytes, which in 16-bit types is
    the same: a low-rank factor has no mask. For a shared basis (Basis Sharing) ``d_out`` is the sum over the group.
    """
    check_ratio(ratio)
    rank = math.floor((1.0 - ratio) * d_in * d_out / (d_in + d_out) + 1e-9)
    if convention == "nominal" or widths == BF16:
        return rank
    budget = (1.0 - ratio) * VALUE_BITS * d_in * d_out
    low, high = 0, min(d_in, d_out)
    while low < high:
        middle = (low + high + 1) // 2
        if stored_bits(d_in, d_out, middle, middle, full_support=True, widths=widths) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def augmented_sparsity(
    d_in: int,
    d_out: int,
    ratio: float,
    *,
    n_atoms: int = 0,
    convention: RatioConvention = "stored",
    widths: StorageWidths = BF16,
) -> int:
    """Coefficients per output over d_in identity and ``n_atoms`` learned atoms; 0 if none fits.

    Without learned atoms these are the weights that pruning keeps. ``nominal`` counts values: ``s = (1-g) d_in`` there.
    ``stored``: the largest s that fits beside the dictionary and the mask of ``d_in + n_atoms`` bits per output, for
    example ``(1-g) d_in - d_in / 16`` for pruning in bf16; where everything fits without a mask, all atoms.
    """
    check_ratio(ratio)
    n_all = d_in + n_atoms
    if convention == "nominal":
        left = (1.0 - ratio) * d_in * d_out - n_atoms * d_in
        return min(max(math.floor(left / d_out + 1e-9), 0), n_all)
    budget = (1.0 - ratio) * VALUE_BITS * d_in * d_out
    row_budget = (budget - widths.dictionary_bits(d_in, n_atoms)) / d_out
    if widths.row_bits(n_all) <= row_budget:
        return n_all
    return widths.row_capacity(row_budget - 8 * math.ceil(n_all / 8), n_all - 1)


def sparse_size(
    d_in: int,
    d_out: int,
    ratio: float,
    *,
    k_over_s: float = 2.0,
    convention: RatioConvention = "stored",
    widths: StorageWidths = BF16,
    max_atoms: int | None = None,
) -> tuple[int, int]:
    """Number of atoms K and coefficients per column s for a ratio.

    ``nominal`` is the paper's formula with floors, ``K = (1-g) d_in d_out / (d_in + d_out / rho)`` and
    ``s = K / rho``. ``stored`` solves ``stored_bits <= (1-g) 16 d_in d_out`` (in bf16
    ``16 d_in K + 16 s d_out + K d_out``) over aligned sizes near ``K / s = rho``: K a multiple of 16 (8 below 256, 1
    below 16) and s of 8 (4 below 64, 1 below 16), because aligned sizes are what kernels want, and the pair that
    leaves the fewest bytes unused, because bytes are what the user asked for.

    Parameters
    ----------
    d_in, d_out : int
        Of the weight; ``d_out`` summed over the members of a group.
    ratio : float
        Removed share, in (0, 1).
    k_over_s : float
        Wanted ``rho = K / s``, at least 1.
    convention : {"stored", "nominal"}
        What the ratio counts.
    widths : StorageWidths
        Of the stored parts; the nominal convention does not look at them.
    max_atoms : int, optional
        Bound on K, for example ``d_in`` for an orthonormal dictionary. What it frees goes to s.

    Returns
    -------
    (n_atoms, sparsity)
        ``(0, 0)`` if not even one atom fits.

    Raises
    ------
    InputError
        Ratio outside (0, 1), ``k_over_s < 1``, or ``max_atoms < 1``.
    """
    check_ratio(ratio)
    if not (math.isfinite(k_over_s) and k_over_s >= 1.0):
        raise InputError(f"k_over_s: expected a number of at least 1, got {k_over_s!r}")
    if max_atoms is not None and max_atoms < 1:
        raise InputError(f"max_atoms: expected at least 1, got {max_atoms!r}")
    if convention == "nominal":
        n_atoms, sparsity = _nominal_size(d_in, d_out, ratio, k_over_s)
        if max_atoms is not None and n_atoms > max_atoms:
            left = (1.0 - ratio) * d_in * d_out - d_in * max_atoms
            n_atoms, sparsity = max_atoms, min(math.floor(left / d_out + 1e-9), max_atoms)
        return n_atoms, sparsity
    budget = (1.0 - ratio) * VALUE_BITS * d_in * d_out
    n_atoms, sparsity = _stored_size(d_in, d_out, budget, k_over_s, widths)
    if max_atoms is not None and n_atoms > max_atoms:
        n_atoms, sparsity = max_atoms, _row_sparsity(d_in, d_out, budget, max_atoms, widths)
        if sparsity < max_atoms:
            step = _sparsity_step(sparsity)
            sparsity = sparsity // step * step
    return n_atoms, sparsity


def stored_bits(
    d_in: int,
    d_out: int,
    n_atoms: int,
    sparsity: int,
    *,
    n_identity: int = 0,
    full_support: bool = False,
    widths: StorageWidths = BF16,
) -> int:
    """Bits of dictionary, coefficients and mask as written.

    Parameters
    ----------
    d_in, d_out : int
        Of the weight; ``d_out`` summed over a group that shares the dictionary.
    n_atoms, sparsity : int
        Learned atoms K, and coefficients per output of both kinds of atoms.
    n_identity : int
        Identity atoms (``d_in`` or 0): bits in the mask, nothing in the dictionary.
    full_support : bool
        Every output uses all atoms: no mask.
    widths : StorageWidths
        Of the parts.
    """
    mask_row = 0 if full_support else 8 * math.ceil((n_identity + n_atoms) / 8)
    return widths.dictionary_bits(d_in, n_atoms) + d_out * (widths.row_bits(sparsity) + mask_row)


def _nominal_size(d_in: int, d_out: int, ratio: float, k_over_s: float) -> tuple[int, int]:
    n_atoms = math.floor((1.0 - ratio) * d_in * d_out / (d_in + d_out / k_over_s) + 1e-9)
    sparsity = math.floor(n_atoms / k_over_s)
    return (n_atoms, sparsity) if sparsity >= 1 else (0, 0)


def _row_sparsity(d_in: int, d_out: int, budget: float, n_atoms: int, widths: StorageWidths) -> int:
    """Coefficients per output that fit beside the dictionary and the mask of ``n_atoms`` atoms."""
    left = budget - stored_bits(d_in, d_out, n_atoms, 0, widths=widths)
    return widths.row_capacity(left / d_out, n_atoms)


def _sparsity_step(sparsity: float) -> int:
    return 8 if sparsity >= 64 else 4 if sparsity >= 16 else 1


def _stored_size(
    d_in: int, d_out: int, budget: float, k_over_s: float, widths: StorageWidths
) -> tuple[int, int]:
    scale_bits, scale_share = 0, 0.0
    if widths.coeffs_scaled and widths.coeffs_group:
        scale_share = VALUE_BITS / widths.coeffs_group
    elif widths.coeffs_scaled:
        scale_bits = VALUE_BITS * d_out
    per_coefficient = widths.coeffs + scale_share
    per_atom = widths.dictionary_bits(d_in, 1) + d_out * (1 + per_coefficient / k_over_s)
    ideal = max(0.0, budget - scale_bits) / per_atom
    atom_step = 16 if ideal >= 256 else 8
    if ideal < 16:
        atom_step = 1
    s_step = _sparsity_step(ideal / k_over_s)
    best: tuple[float, int, int] | None = None
    low, high = math.floor(0.9 * ideal), math.ceil(1.1 * ideal)
    first = max(atom_step, low // atom_step * atom_step)
    for n_atoms in range(first, high + 1, atom_step):
        sparsity = _row_sparsity(d_in, d_out, budget, n_atoms, widths) // s_step * s_step
        if sparsity < 1:
            continue
        unused = 1.0 - stored_bits(d_in, d_out, n_atoms, sparsity, widths=widths) / budget
        off_ratio = abs(math.log(n_atoms / sparsity / k_over_s))
        # 1 % of unused bytes weighs as much as 10 % away from the wanted K / s.
        cost = unused + 0.1 * off_ratio
        if best is None or cost < best[0]:
            best = (cost, n_atoms, sparsity)
    return (best[1], best[2]) if best else (0, 0)
