"""From floating-point coefficients and dictionaries to stored numbers (FORMAT.md).

Floating types round to the nearest value. ``bfloat14`` keeps the upper 14 bits of a bfloat16: by truncation as CoSpaDi
(arXiv 2509.22075, section 4.2.1) does, or rounded to nearest, which halves the largest error. Integers ``int3`` to
``int8`` are symmetric, ``value = field * scale`` with ``|field| <= 2^(bits-1) - 1``, and share a bfloat16 scale per
output, per group of coefficients or per atom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cospadi.errors import FitError, InputError

Rounding = Literal["nearest", "truncate"]

FLOAT_TYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
INTEGER_BITS: dict[str, int] = {f"int{bits}": bits for bits in (3, 4, 5, 6, 8)}
COEFFS_TYPES = (*FLOAT_TYPES, "bfloat14", *INTEGER_BITS)
DICTIONARY_TYPES = (*FLOAT_TYPES, "int8")

CLIP_FACTORS = tuple(1.0 - step / 50 for step in range(36))
"""Shares of the largest magnitude that a scale is tried with, 1 down to 0.3: the best clip of a Gaussian row is about
0.65 of its maximum at 4 bits and 0.4 at 2 bits."""

BFLOAT14_DROPPED = 18
"""Low bits of a float32 that a bfloat14 does not have."""
_BFLOAT14_MAX = 0x7F800000 - (1 << BFLOAT14_DROPPED) >> BFLOAT14_DROPPED


@dataclass(frozen=True)
class StorageTypes:
    """How the parts of a factor are stored.

    Attributes
    ----------
    dictionary : str
        One of `DICTIONARY_TYPES`; ``int8`` has one scale per atom.
    coeffs : str
        One of `COEFFS_TYPES`.
    coeffs_group : int
        Coefficients that share a scale, for integer coefficients; 0: one scale per output.
    rounding : {"nearest", "truncate"}
        Of ``bfloat14``; the paper truncates.
    """

    dictionary: str = "bfloat16"
    coeffs: str = "bfloat16"
    coeffs_group: int = 0
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dictionary", DICTIONARY_TYPES),
            ("coeffs", COEFFS_TYPES),
            ("rounding", ("nearest", "truncate")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        _check_group(self.coeffs_group)
        if self.coeffs_group and self.coeffs not in INTEGER_BITS:
            raise InputError(
                f"coeffs_group: {self.coeffs} has no scales, expected 0, got {self.coeffs_group}"
            )


@dataclass(frozen=True)
class QuantisedCoeffs:
    """Coefficients as they are stored.

    Attributes
    ----------
    dtype : str
        One of `COEFFS_TYPES`.
    values : torch.Tensor
        ``[d_out, s]`` float32, what a reader decodes; exact in the floating type.
    fields : torch.Tensor or None
        ``[d_out, s]`` int32 to be packed: signed integers, or the 14 bits of ``bfloat14`` as 0 to 2^14 - 1; None for
        plain floating types.
    scale : torch.Tensor or None
        ``[d_out, n_groups]`` bfloat16, positive and finite; integers only.
    group : int
        Coefficients that share a scale; 0: one scale per output.
    """

    dtype: str
    values: torch.Tensor
    fields: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    group: int = 0


@dataclass(frozen=True)
class QuantisedDictionary:
    """A dictionary as it is stored.

    Attributes
    ----------
    dtype : str
        One of `DICTIONARY_TYPES`.
    values : torch.Tensor
        ``[d_in, K]`` float32, what a reader decodes; exact in the floating type.
    fields : torch.Tensor or None
        ``[K, d_in]`` int32, one row per atom; integers only.
    scale : torch.Tensor or None
        ``[K]`` bfloat16; integers only.
    """

    dtype: str
    values: torch.Tensor
    fields: torch.Tensor | None = None
    scale: torch.Tensor | None = None


def quantise_coeffs(
    coeffs: torch.Tensor, types: StorageTypes, weights: torch.Tensor | None = None
) -> QuantisedCoeffs:
    """Coefficients ``[d_out, s]`` in the type that ``types.coeffs`` names.

    ``weights [d_out, s]`` is what an error of each coefficient costs (the squared whitened norm of its atom) when
    integer scales are chosen. Raises `InputError` for non-finite coefficients, `FitError` for ones out of range.
    """
    _check_finite("coeffs", coeffs)
    if types.coeffs in INTEGER_BITS:
        bits = INTEGER_BITS[types.coeffs]
        return quantise_integers(coeffs, bits, group=types.coeffs_group, weights=weights)
    if types.coeffs == "bfloat14":
        return quantise_bfloat14(coeffs, rounding=types.rounding)
    return QuantisedCoeffs(types.coeffs, _to_float("coeffs", coeffs, types.coeffs))


def quantise_dictionary(
    dictionary: torch.Tensor, types: StorageTypes, weights: torch.Tensor | None = None
) -> QuantisedDictionary:
    """Dictionary ``[d_in, K]`` in the type that ``types.dictionary`` names.

    ``weights [d_in]`` is what an error at each input costs (the diagonal of the activation Gram) when the scales of the
    atoms are chosen. Raises `InputError` for non-finite values, `FitError` for ones beyond the type's range.
    """
    _check_finite("dictionary", dictionary)
    if types.dictionary in FLOAT_TYPES:
        values = _to_float("dictionary", dictionary, types.dictionary)
        return QuantisedDictionary(types.dictionary, values)
    rows = quantise_integers(
        dictionary.T,
        INTEGER_BITS[types.dictionary],
        weights=None if weights is None else weights.expand(dictionary.T.shape),
    )
    assert rows.scale is not None
    return QuantisedDictionary(types.dictionary, rows.values.T, rows.fields, rows.scale[:, 0])


def quantise_integers(
    values: torch.Tensor,
    bits: int,
    *,
    group: int = 0,
    weights: torch.Tensor | None = None,
    clip_factors: Sequence[float] = CLIP_FACTORS,
) -> QuantisedCoeffs:
    """Symmetric integers with a scale per row or per group of a row.

    Every scale is tried at each clip factor times the largest magnitude of its group, rounded to bfloat16 first, and
    the one with the smallest (weighted) squared error is kept; of equal ones the first.

    Parameters
    ----------
    values : torch.Tensor
        ``[n, s]`` finite.
    bits : int
        3, 4, 5, 6 or 8.
    group : int
        Values that share a scale; 0: the whole row.
    weights : torch.Tensor, optional
        ``[n, s]`` non-negative weights of the squared errors.
    clip_factors : sequence of float
        In (0, 1].

    Returns
    -------
    QuantisedCoeffs
        Scales are positive and finite, also those of groups of zeros.

    Raises
    ------
    InputError
        A width or a group out of range, values that are not finite.
    """
    if f"int{bits}" not in INTEGER_BITS:
        raise InputError(f"bits: expected 3, 4, 5, 6 or 8, got {bits!r}")
    _check_group(group)
    _check_finite("values", values)
    n, s = values.shape
    size = group or max(s, 1)
    n_groups = math.ceil(s / size)

    def in_groups(tensor: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(tensor.float(), (0, n_groups * size - s))
        return padded.reshape(n, n_groups, size)

    limit = 2 ** (bits - 1) - 1
    grouped = in_groups(values)
    cost = None if weights is None else in_groups(weights)
    largest = grouped.abs().amax(2, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    unit = grouped / largest  # squares of the largest numbers would overflow

    best_error = torch.full_like(largest, float("inf"))
    scale = torch.ones_like(largest)
    for factor in clip_factors:
        candidate = _positive_bfloat16(largest * (factor / limit))
        step = candidate / largest
        error = (_to_fields(unit, step, limit) * step - unit).square()
        total = (error if cost is None else error * cost).sum(2, keepdim=True)
        better = total < best_error
        best_error = torch.where(better, total, best_error)
        scale = torch.where(better, candidate, scale)
    fields = _to_fields(grouped, scale, limit)
    return QuantisedCoeffs(
        dtype=f"int{bits}",
        values=(fields * scale).flatten(1)[:, :s].contiguous(),
        fields=fields.flatten(1)[:, :s].int().contiguous(),
        scale=scale[:, :, 0].bfloat16(),
        group=group,
    )


def quantise_bfloat14(coeffs: torch.Tensor, *, rounding: Rounding = "nearest") -> QuantisedCoeffs:
    """The upper 14 bits of bfloat16: sign, 8 bits of exponent, 5 of mantissa (CoSpaDi Eq. 11).

    ``truncate`` rounds to bfloat16 and drops two bits, as the paper; ``nearest`` rounds once, ties to even. Values
    beyond the largest finite bfloat14 become that one.

    Raises
    ------
    InputError
        Non-finite coefficients.
    """
    _check_finite("coeffs", coeffs)
    source = coeffs.float() if rounding == "nearest" else coeffs.bfloat16().float()
    magnitude = source.contiguous().view(torch.int32) & 0x7FFFFFFF
    if rounding == "nearest":
        odd = (magnitude >> BFLOAT14_DROPPED) & 1
        magnitude = magnitude + ((1 << (BFLOAT14_DROPPED - 1)) - 1) + odd
    kept = (magnitude >> BFLOAT14_DROPPED).clamp_max(_BFLOAT14_MAX)
    negative = torch.signbit(source)
    decoded = (kept << BFLOAT14_DROPPED).view(torch.float32)
    return QuantisedCoeffs(
        dtype="bfloat14",
        values=torch.where(negative, -decoded, decoded),
        fields=kept | (negative.int() << 13),
    )


def _to_float(name: str, values: torch.Tensor, dtype: str) -> torch.Tensor:
    rounded = values.to(FLOAT_TYPES[dtype]).float()
    if not bool(torch.isfinite(rounded).all()):
        raise FitError(f"{name}: values overflow {dtype}; store them in bfloat16")
    return rounded


def _to_fields(values: torch.Tensor, scale: torch.Tensor, limit: int) -> torch.Tensor:
    return (values / scale).round().clamp(-limit, limit)


def _positive_bfloat16(scale: torch.Tensor) -> torch.Tensor:
    """Float32 scale rounded to bfloat16, kept normal and finite."""
    info = torch.finfo(torch.bfloat16)
    return scale.clamp(info.tiny, info.max).bfloat16().float()


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name}: holds non-finite values; a factor must be finite to be stored")


def _check_group(group: int) -> None:
    if not isinstance(group, int) or isinstance(group, bool) or group < 0:
        raise InputError(f"coeffs_group: expected 0 or a positive integer, got {group!r}")
