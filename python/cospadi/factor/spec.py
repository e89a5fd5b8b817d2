"""What a compressed projection is made of: sizes, storage types, tensors, and every way of counting its bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from cospadi import native
from cospadi.errors import InputError, brief

Support = Literal["mask", "full"]

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
"""Floating-point storage types of dictionaries and coefficients."""

PACKED_COEFFS = ("bfloat14", "int8", "int6", "int5", "int4", "int3")
"""Packed storage types of coefficients; `cospadi.native.CODE_FORMATS` says what their fields are."""

COEFFS_DTYPES = (*STORAGE_DTYPES, *PACKED_COEFFS)
"""Every storage type of coefficients."""

DICTIONARY_DTYPES = (*STORAGE_DTYPES, "int8")
"""Every storage type of dictionaries."""

SCALE_DTYPE = "bfloat16"
"""Storage type of the scales of integers."""

DICTIONARY_PARTS = ("dictionary", "dictionary_scale")
"""Tensors of the dictionary; those of a member belong to its leader."""

PARTS = (*DICTIONARY_PARTS, "mask", "coeffs", "coeffs_scale", "bias")
"""Tensors of a factor by the names that they have in files, in layers and in `SparseFactor`."""

MAX_SIZE = 2**31
"""Every size is below this, so that 32-bit indices suffice."""

MAX_ELEMENTS = 2**48
"""No tensor has more elements, so that byte counts and offsets never overflow 64 bits."""

DENSE_BITS_PER_VALUE = 16
"""The dense layer that ratios compare with is stored in bfloat16."""

_ITEM_BITS = {name: 8 * dtype.itemsize for name, dtype in STORAGE_DTYPES.items()}
_ITEM_BITS |= {"uint8": 8, "int8": 8}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of `dtype` as configs spell it, for example ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorSpec:
    """What must lie under one name: ``dtypes`` are the admitted types by torch's names, ``shape`` is exact."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class FactorSpec:
    """Shapes and storage types of one compressed projection.

    Parameters
    ----------
    d_in, d_out : int
        Features read and written by the projection; positive and below 2**31.
    n_atoms : int
        Learned atoms, the columns of the dictionary (K); 0 only with identity atoms.
    sparsity : int
        Coefficients per output (s), ``1 <= s <= total_atoms``; identity atoms count. Equal to
        `total_atoms` with full support.
    support : {"mask", "full"}
        Whether a mask selects the atoms of each output, or every output uses all of them.
    bias : bool
        Whether the projection adds a bias [d_out].
    dictionary_dtype : str
        One of `DICTIONARY_DTYPES`; the default where there is no dictionary.
    coeffs_dtype : str
        One of `COEFFS_DTYPES`.
    n_identity : int
        Identity atoms: 0 or `d_in`.
    coeffs_group : int
        Coefficients per scale, counted along the stored row; 0 gives each output one scale.
        Integer coefficients only.
    owns_dictionary : bool
        False for a member, whose dictionary belongs to another projection: all counts of bits and
        values then leave the dictionary to its leader, so that sums over a model count it once.

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
    n_identity: int = 0
    coeffs_group: int = 0
    owns_dictionary: bool = True

    def __post_init__(self) -> None:
        for field, least in (
            ("d_in", 1),
            ("d_out", 1),
            ("n_atoms", 0),
            ("sparsity", 1),
            ("n_identity", 0),
            ("coeffs_group", 0),
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{field}: expected an integer, got {brief(value)}")
            if not least <= value < MAX_SIZE:
                raise InputError(f"{field}: expected {least} to {MAX_SIZE - 1}, got {brief(value)}")
        if self.support not in ("mask", "full"):
            raise InputError(f'support: expected "mask" or "full", got {brief(self.support)}')
        for field in ("bias", "owns_dictionary"):
            value = getattr(self, field)
            if not isinstance(value, bool):
                raise InputError(f"{field}: expected true or false, got {brief(value)}")
        for field, known in (
            ("dictionary_dtype", DICTIONARY_DTYPES),
            ("coeffs_dtype", COEFFS_DTYPES),
        ):
            value = getattr(self, field)
            if not isinstance(value, str) or value not in known:
                raise InputError(f"{field}: expected one of {', '.join(known)}, got {brief(value)}")
        self._check_atoms()
        if self.coeffs_group and not self.has_coeffs_scale:
            raise InputError(
                f"coeffs_group: {self.coeffs_dtype} coefficients have no scale, "
                f"expected 0, got {self.coeffs_group}"
            )

    def _check_atoms(self) -> None:
        if self.n_identity not in (0, self.d_in):
            raise InputError(f"n_identity: expected 0 or d_in = {self.d_in}, got {self.n_identity}")
        if not self.total_atoms:
            raise InputError("n_atoms: expected at least 1 without identity atoms, got 0")
        if not self.n_atoms and (self.dictionary_dtype != "bfloat16" or not self.owns_dictionary):
            raise InputError(
                "n_atoms: without a dictionary (0 atoms) there is nothing to share, and "
                f"dictionary_dtype must be bfloat16, got {self.dictionary_dtype}"
            )
        if self.sparsity > self.total_atoms:
            raise InputError(f"sparsity: {self.sparsity} exceeds the {self.total_atoms} atoms")
        if self.support == "full" and self.sparsity != self.total_atoms:
            raise InputError(
                f"sparsity: full support uses all {self.total_atoms} atoms, got {self.sparsity}"
            )
        if self.total_atoms >= MAX_SIZE:
            raise InputError(f"n_atoms: {self.total_atoms} atoms in all exceed {MAX_SIZE - 1}")
        # The code's bound also covers coeffs and their scales (s <= total_atoms) and the mask.
        for rows, columns in (
            (self.d_in, self.n_atoms),
            (self.total_atoms, self.d_out),
            (self.d_in, self.d_out),
        ):
            if rows * columns >= MAX_ELEMENTS:
                raise InputError(f"{rows} x {columns} elements exceed the limit of 2**48")

    @property
    def total_atoms(self) -> int:
        """Rows of S: identity atoms first, then the learned ones."""
        return self.n_identity + self.n_atoms

    @property
    def is_packed(self) -> bool:
        """Whether the coefficients are bit fields instead of floats."""
        return self.coeffs_dtype not in STORAGE_DTYPES

    @property
    def has_coeffs_scale(self) -> bool:
        """Whether the coefficients are integers times a scale."""
        return self.is_packed and native.CODE_FORMATS[self.coeffs_dtype].has_scale

    @property
    def mask_row_bytes(self) -> int:
        """Bytes of one row of the mask: ``ceil(total_atoms / 8)``, or 0 with full support."""
        return (self.total_atoms + 7) // 8 if self.support == "mask" else 0

    @property
    def n_scale_groups(self) -> int:
        """Scales of one output: 1, or ``ceil(sparsity / coeffs_group)``; 0 for floats and bfloat14."""
        if not self.has_coeffs_scale:
            return 0
        return -(-self.sparsity // self.coeffs_group) if self.coeffs_group else 1

    def dictionary_tensors(self) -> dict[str, TensorSpec]:
        """Return the tensors of the dictionary that the projection uses, whoever owns them."""
        if not self.n_atoms:
            return {}
        if self.dictionary_dtype in STORAGE_DTYPES:
            return {"dictionary": TensorSpec((self.dictionary_dtype,), (self.d_in, self.n_atoms))}
        # One row per atom: the products with the inputs are then sums along rows, one scale each.
        return {
            "dictionary": TensorSpec((self.dictionary_dtype,), (self.n_atoms, self.d_in)),
            "dictionary_scale": TensorSpec((SCALE_DTYPE,), (self.n_atoms,)),
        }

    def tensors(self) -> dict[str, TensorSpec]:
        """Return the tensors that are stored for this projection, by the names in `PARTS`."""
        result = self.dictionary_tensors() if self.owns_dictionary else {}
        if self.support == "mask":
            result["mask"] = TensorSpec(("uint8",), (self.d_out, self.mask_row_bytes))
        if self.is_packed:
            bits = native.CODE_FORMATS[self.coeffs_dtype].bits
            result["coeffs"] = TensorSpec(("uint8",), (self.d_out, -(-bits * self.sparsity // 8)))
        else:
            result["coeffs"] = TensorSpec((self.coeffs_dtype,), (self.d_out, self.sparsity))
        if self.has_coeffs_scale:
            result["coeffs_scale"] = TensorSpec((SCALE_DTYPE,), (self.d_out, self.n_scale_groups))
        if self.bias:
            result["bias"] = TensorSpec(tuple(STORAGE_DTYPES), (self.d_out,))
        return result

    def _bits_on_disk(self, *parts: str) -> int:
        tensors = self.tensors()
        return sum(
            _ITEM_BITS[tensors[part].dtypes[0]] * prod(tensors[part].shape)
            for part in parts
            if part in tensors
        )

    @property
    def dictionary_bits(self) -> int:
        """Bits of the dictionary on disk, scales included; 0 for a member."""
        return self._bits_on_disk(*DICTIONARY_PARTS)

    @property
    def mask_bits(self) -> int:
        """Bits of the mask on disk, padding included."""
        return self._bits_on_disk("mask")

    @property
    def coeffs_bits(self) -> int:
        """Bits of the coefficients on disk, scales and the padding of packed rows included."""
        return self._bits_on_disk("coeffs", "coeffs_scale")

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
    def n_dictionary_values(self) -> int:
        """Numbers in the dictionary, 0 for a member."""
        return self.d_in * self.n_atoms if self.owns_dictionary else 0

    @property
    def n_values(self) -> int:
        """Numbers kept, mask not counted: ``d_in n_atoms + sparsity d_out``."""
        return self.n_dictionary_values + self.sparsity * self.d_out

    @property
    def mask16_bits(self) -> int:
        """Nominal bits of CoSpaDi Eq. 10: values of 16 bits, and a mask of 1 bit per atom and output.

        Whatever the storage types are; there is no mask with full support.
        """
        mask = self.total_atoms * self.d_out if self.support == "mask" else 0
        return 16 * self.n_values + mask

    @property
    def mask14_bits(self) -> int:
        """Nominal bits of CoSpaDi Eq. 11: as `mask16_bits`, the mask paid by coefficients of 14 bits.

        Where every output uses half of the atoms, 14-bit coefficients and mask are as large as
        16-bit coefficients. Full support has no mask to pay and keeps 16 bits.
        """
        dropped = 2 * self.sparsity * self.d_out if self.support == "mask" else 0
        return self.mask16_bits - dropped

    @property
    def dense_bits(self) -> int:
        """Bits of the dense bfloat16 weight."""
        return DENSE_BITS_PER_VALUE * self.d_in * self.d_out

    @property
    def values_ratio(self) -> float:
        """Removed share of values, the mask not counted (the ratio of the literature)."""
        return removed_shares([self])["values"]

    @property
    def mask16_ratio(self) -> float:
        """Removed share of bits by CoSpaDi Eq. 10, see `mask16_bits`."""
        return removed_shares([self])["mask16"]

    @property
    def mask14_ratio(self) -> float:
        """Removed share of bits by CoSpaDi Eq. 11, see `mask14_bits`."""
        return removed_shares([self])["mask14"]

    @property
    def stored_ratio(self) -> float:
        """Removed share of bytes, the mask counted: ``1 - stored_bits / dense_bits``."""
        return removed_shares([self])["stored"]


def removed_shares(specs: Iterable[FactorSpec], other_values: int = 0) -> dict[str, float]:
    """Return the removed share over several projections in every convention.

    Parameters
    ----------
    specs : iterable of FactorSpec
        The projections, not empty.
    other_values : int
        Numbers outside of them that stay as they are, in bfloat16; gives the shares of a model.

    Returns
    -------
    dict of str to float
        ``values`` (numbers, mask not counted), ``mask16`` and ``mask14`` (CoSpaDi Eq. 10 and 11) and
        ``stored`` (bytes on disk), each ``1 - kept / dense``.
    """
    specs = list(specs)
    other_bits = DENSE_BITS_PER_VALUE * other_values
    dense = sum(spec.dense_bits for spec in specs) + other_bits
    kept = {
        "values": sum(DENSE_BITS_PER_VALUE * spec.n_values for spec in specs),
        "mask16": sum(spec.mask16_bits for spec in specs),
        "mask14": sum(spec.mask14_bits for spec in specs),
        "stored": sum(spec.stored_bits for spec in specs),
    }
    return {name: 1.0 - (bits + other_bits) / dense for name, bits in kept.items()}
