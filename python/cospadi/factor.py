"""One compressed projection: a dictionary, a sparse code and the arithmetic of their sizes.

A weight `W` [d_out, d_in] (torch order) is held as ``W = (dictionary @ S).T``: `dictionary` [d_in,
n_atoms] has one atom per column, `S` [n_atoms, d_out] has exactly `sparsity` coefficients in every
column. Positions are bits of `mask`, one row per output; values are the rows of `coeffs` in
ascending order of the atom. With ``support="full"`` (a truncated SVD) every atom is used and there
is no mask. FORMAT.md states the same layout byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch

from cospadi import native
from cospadi.errors import CheckpointError, InputError

Support = Literal["mask", "full"]

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Storage types of dictionaries and coefficients that this version reads and writes."""

MAX_SIZE = 2**31
"""Every size is below this, so that 32-bit indices suffice."""

MAX_ELEMENTS = 2**48
"""No tensor has more elements, so that byte counts and offsets never overflow 64 bits."""

DENSE_BITS_PER_VALUE = 16
"""The dense layer that ratios compare with is stored in bfloat16."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` as configs spell it, for example ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class FactorSpec:
    """Shapes and storage types of one compressed projection.

    Parameters
    ----------
    d_in, d_out : int
        Features read and written by the projection; positive and below 2**31.
    n_atoms : int
        Atoms of the dictionary (K).
    sparsity : int
        Coefficients per output (s), ``1 <= s <= n_atoms``; equal to `n_atoms` with full support.
    support : {"mask", "full"}
        Whether a mask selects the atoms of each output, or every output uses all of them.
    bias : bool
        Whether the projection adds a bias [d_out].
    dictionary_dtype, coeffs_dtype : str
        Storage types, keys of `STORAGE_DTYPES`.

    Raises
    ------
    InputError
        If a value is out of range or the values contradict each other.
    """

    d_in: int
    d_out: int
    n_atoms: int
    sparsity: int
    support: Support
    bias: bool
    dictionary_dtype: str = "bfloat16"
    coeffs_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in ("d_in", "d_out", "n_atoms", "sparsity"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{field}: expected an integer, got {brief(value)}")
            if not 0 < value < MAX_SIZE:
                raise InputError(f"{field}: expected 1 to {MAX_SIZE - 1}, got {brief(value)}")
        if self.support not in ("mask", "full"):
            raise InputError(f'support: expected "mask" or "full", got {brief(self.support)}')
        if not isinstance(self.bias, bool):
            raise InputError(f"bias: expected true or false, got {brief(self.bias)}")
        for field in ("dictionary_dtype", "coeffs_dtype"):
            value = getattr(self, field)
            if not isinstance(value, str) or value not in STORAGE_DTYPES:
                known = ", ".join(STORAGE_DTYPES)
                raise InputError(f"{field}: expected one of {known}, got {brief(value)}")
        if self.sparsity > self.n_atoms:
            raise InputError(f"sparsity: {self.sparsity} exceeds n_atoms = {self.n_atoms}")
        if self.support == "full" and self.sparsity != self.n_atoms:
            raise InputError(
                f"sparsity: full support needs sparsity = n_atoms = {self.n_atoms}, "
                f"got {self.sparsity}"
            )
        # The code's bound also covers coeffs (s <= n_atoms) and mask.
        for rows, columns in (
            (self.d_in, self.n_atoms),
            (self.n_atoms, self.d_out),
            (self.d_in, self.d_out),
        ):
            if rows * columns >= MAX_ELEMENTS:
                raise InputError(f"{rows} x {columns} elements exceed the limit of 2**48")

    @property
    def mask_row_bytes(self) -> int:
        """Bytes of one row of the mask: ``ceil(n_atoms / 8)``, or 0 with full support."""
        return (self.n_atoms + 7) // 8 if self.support == "mask" else 0

    @property
    def dictionary_bits(self) -> int:
        """Bits of the dictionary on disk."""
        return _bits(self.dictionary_dtype) * self.d_in * self.n_atoms

    @property
    def mask_bits(self) -> int:
        """Bits of the mask on disk, padding included."""
        return 8 * self.mask_row_bytes * self.d_out

    @property
    def coeffs_bits(self) -> int:
        """Bits of the coefficients on disk."""
        return _bits(self.coeffs_dtype) * self.sparsity * self.d_out

    @property
    def stored_bits(self) -> int:
        """Bits of everything that replaces the weight.

        The bias is not counted: the dense layer has it too.
        """
        return self.dictionary_bits + self.mask_bits + self.coeffs_bits

    @property
    def stored_bytes(self) -> int:
        """`stored_bits` in bytes (always whole)."""
        return self.stored_bits // 8

    @property
    def n_values(self) -> int:
        """Numbers kept, mask not counted: ``d_in n_atoms + sparsity d_out``."""
        return self.d_in * self.n_atoms + self.sparsity * self.d_out

    @property
    def dense_bits(self) -> int:
        """Bits of the dense bfloat16 weight."""
        return DENSE_BITS_PER_VALUE * self.d_in * self.d_out

    @property
    def values_ratio(self) -> float:
        """Removed share of values, the mask not counted (the ratio of the literature)."""
        return 1.0 - self.n_values / (self.d_in * self.d_out)

    @property
    def stored_ratio(self) -> float:
        """Removed share of bytes, the mask counted: ``1 - stored_bits / dense_bits``."""
        return 1.0 - self.stored_bits / self.dense_bits


@dataclass
class SparseFactor:
    """The tensors of one compressed projection.

    Parameters
    ----------
    dictionary : torch.Tensor
        [d_in, n_atoms], floating point; columns are atoms.
    mask : torch.Tensor or None
        uint8 [d_out, ceil(n_atoms / 8)]; bit ``a & 7`` of byte ``a >> 3`` is set where atom `a` is
        used. None with full support.
    coeffs : torch.Tensor
        [d_out, sparsity], ascending by atom ([d_out, n_atoms] with full support).
    bias : torch.Tensor or None
        [d_out].

    All tensors lie on one device. Nothing is checked or copied on construction; see `validate`.
    """

    dictionary: torch.Tensor
    mask: torch.Tensor | None
    coeffs: torch.Tensor
    bias: torch.Tensor | None = None

    @classmethod
    def from_indices(
        cls,
        dictionary: torch.Tensor,
        indices: torch.Tensor,
        coeffs: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> SparseFactor:
        """Build a factor from atom positions instead of a mask.

        Parameters
        ----------
        dictionary : torch.Tensor
            [d_in, n_atoms].
        indices : torch.Tensor
            int32 [d_out, sparsity], strictly ascending in every row, in ``[0, n_atoms)``.
        coeffs : torch.Tensor
            [d_out, sparsity], same order.
        bias : torch.Tensor, optional
            [d_out].

        Raises
        ------
        InputError
            If shapes disagree or a row is not strictly ascending or out of range.
        """
        if dictionary.dim() != 2 or indices.dim() != 2 or coeffs.shape != indices.shape:
            raise InputError(
                "from_indices: expected dictionary [d_in, n_atoms], indices and coeffs [d_out, s], "
                f"got {list(dictionary.shape)}, {list(indices.shape)}, {list(coeffs.shape)}"
            )
        n_atoms = dictionary.shape[1]
        positions = indices.to(torch.int32).contiguous()
        if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= n_atoms):
            raise InputError(f"from_indices: an index is outside [0, {n_atoms})")
        if bool((positions[:, 1:] <= positions[:, :-1]).any()):
            raise InputError("from_indices: indices must be strictly ascending in every row")
        return cls(dictionary, native.pack_mask(positions, n_atoms), coeffs, bias)

    @property
    def spec(self) -> FactorSpec:
        """Shapes and storage types, read from the tensors.

        Raises
        ------
        InputError
            If the tensors cannot describe a factor.
        """
        if self.dictionary.dim() != 2 or self.coeffs.dim() != 2:
            raise InputError(
                "expected two-dimensional dictionary and coeffs, "
                f"got {list(self.dictionary.shape)} and {list(self.coeffs.shape)}"
            )
        return FactorSpec(
            d_in=self.dictionary.shape[0],
            d_out=self.coeffs.shape[0],
            n_atoms=self.dictionary.shape[1],
            sparsity=self.coeffs.shape[1],
            support="full" if self.mask is None else "mask",
            bias=self.bias is not None,
            dictionary_dtype=dtype_name(self.dictionary.dtype),
            coeffs_dtype=dtype_name(self.coeffs.dtype),
        )

    def indices(self) -> torch.Tensor:
        """Return the atom of every coefficient: int32 [d_out, sparsity], ascending in every row.

        Raises
        ------
        InputError
            If a row of the mask does not have exactly `sparsity` bits.
        """
        d_out, sparsity = self.coeffs.shape
        if self.mask is None:
            atoms = torch.arange(sparsity, dtype=torch.int32, device=self.coeffs.device)
            return atoms.expand(d_out, sparsity).contiguous()
        return native.unpack_mask(self.mask, self.dictionary.shape[1], sparsity)

    def dense_code(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the code with its zeros, transposed: [d_out, n_atoms] of `dtype`."""
        if self.mask is None:
            return self.coeffs.to(dtype)
        used = mask_to_bool(self.mask, self.dictionary.shape[1])
        code = torch.zeros(used.shape, dtype=dtype, device=self.coeffs.device)
        # masked_scatter_ fills row by row in ascending column order: the stored order of the
        # coefficients.
        return code.masked_scatter_(used, self.coeffs.to(dtype))

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Multiply the factor out.

        Parameters
        ----------
        dtype : torch.dtype
            Type of the result; the product is computed in float32, or in float64 where that is
            asked for.

        Returns
        -------
        torch.Tensor
            The weight [d_out, d_in], without the bias.
        """
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.dense_code(compute) @ self.dictionary.to(compute).t()).to(dtype)

    def to(self, dtype: torch.dtype) -> SparseFactor:
        """Return the factor with every floating-point tensor in `dtype`; the mask is shared."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return SparseFactor(self.dictionary.to(dtype), self.mask, self.coeffs.to(dtype), bias)

    def validate(self, name: str) -> None:
        """Check shapes, types, the population of the mask and that every number is finite.

        Parameters
        ----------
        name : str
            Module name, for the message.

        Raises
        ------
        CheckpointError
            On the first contradiction; the message names the tensor.
        """
        try:
            spec = self.spec
        except InputError as error:
            raise CheckpointError(f"{name}: {error}") from None
        if self.mask is not None:
            expected = (spec.d_out, spec.mask_row_bytes)
            if self.mask.dtype != torch.uint8 or tuple(self.mask.shape) != expected:
                raise CheckpointError(
                    f"{name}.mask: expected uint8 {list(expected)}, "
                    f"got {dtype_name(self.mask.dtype)} {list(self.mask.shape)}"
                )
            check_mask(self.mask, spec.n_atoms, spec.sparsity, f"{name}.mask")
        if self.bias is not None and tuple(self.bias.shape) != (spec.d_out,):
            raise CheckpointError(
                f"{name}.bias: expected [{spec.d_out}], got {list(self.bias.shape)}"
            )
        for part in ("dictionary", "coeffs", "bias"):
            tensor = cast("torch.Tensor | None", getattr(self, part))
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{name}.{part}: holds a value that is not finite")


def mask_to_bool(mask: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """Expand a bit mask uint8 [rows, ceil(n_atoms / 8)] to bool [rows, n_atoms], on its device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts) & 1  # [rows, bytes, 8], lowest bit first
    return bits.reshape(mask.shape[0], -1)[:, :n_atoms].bool()


def check_mask(mask: torch.Tensor, n_atoms: int, sparsity: int, name: str) -> None:
    """Check that every row of a mask has `sparsity` bits and no padding bit.

    Plain torch, so that it also runs where the mask was loaded to.

    Parameters
    ----------
    mask : torch.Tensor
        uint8 [d_out, ceil(n_atoms / 8)].
    n_atoms, sparsity : int
        Atoms that a row has bits for, and bits that must be set.
    name : str
        Tensor name, for the message.

    Raises
    ------
    CheckpointError
        Naming the first bad row.
    """
    if n_atoms % 8 and bool((mask[:, -1] >> (n_atoms % 8)).any()):
        row = int((mask[:, -1] >> (n_atoms % 8)).nonzero()[0])
        raise CheckpointError(f"{name}: row {row} has a padding bit set beyond atom {n_atoms - 1}")
    # Population count of bytes by halves: no table, no wider type than the mask itself.
    pairs = mask - ((mask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts = ((nibbles + (nibbles >> 4)) & 0x0F).sum(dim=1, dtype=torch.int64)
    wrong = counts != sparsity
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"{name}: row {row} selects {int(counts[row])} atoms, expected {sparsity}"
        )


def _bits(name: str) -> int:
    return 8 * STORAGE_DTYPES[name].itemsize


def brief(value: object) -> str:
    """Represent an untrusted value on one short line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
