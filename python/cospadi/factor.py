"""One compressed projection: a dictionary, a sparse code and the arithmetic of their sizes.

A projection is ``y = z S + bias`` with ``z = x D``, or ``z = [x ; x D]`` where the inputs themselves are atoms too
(*identity atoms*, which cost no dictionary). `S` [total_atoms, d_out] has exactly `sparsity` coefficients in every
column; identity atoms come first. Corners of this model: a dictionary with a code (CoSpaDi), full support (a truncated
SVD), identity atoms only (unstructured pruning), identity atoms with full support (a quantised dense weight).

Positions are bits of `mask`, one row per output; values are the rows of `coeffs` in ascending order of the atom, as
floats or packed into fields of a few bits. With ``support="full"`` every atom is used and there is no mask. Several
projections may use one dictionary: the *leader* owns it, the others are members. FORMAT.md states the same layout byte
by byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
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


@dataclass(frozen=True)
class Packing:
    """How packed coefficients are read; a row of bytes does not tell.

    Parameters
    ----------
    dtype : str
        One of `PACKED_COEFFS`.
    sparsity : int
        Fields of a row.
    group : int
        Coefficients per scale, 0 for one scale per output.
    """

    dtype: str
    sparsity: int
    group: int = 0


@dataclass
class SparseFactor:
    """The tensors of one compressed projection.

    Parameters
    ----------
    dictionary : torch.Tensor or None
        [d_in, n_atoms], floating point; columns are atoms. Or int8 [n_atoms, d_in], one row per atom,
        with `dictionary_scale`. None without learned atoms.
    mask : torch.Tensor or None
        uint8 [d_out, ceil(total_atoms / 8)]; bit ``a & 7`` of byte ``a >> 3`` is set where atom `a`
        is used. None with full support.
    coeffs : torch.Tensor
        [d_out, sparsity], ascending by atom; or, with `packing`, uint8 [d_out, ceil(bits s / 8)].
    bias : torch.Tensor or None
        [d_out].
    dictionary_scale : torch.Tensor or None
        bfloat16 [n_atoms], positive; with an int8 dictionary.
    coeffs_scale : torch.Tensor or None
        bfloat16 [d_out, n_scale_groups], positive; with integer coefficients.
    packing : Packing or None
        How packed coefficients are read; None where they are floats.
    n_identity : int
        Identity atoms: 0 or d_in.
    owns_dictionary : bool
        False for a member; the dictionary's tensors are then those of its leader.

    All tensors lie on one device. Nothing is checked or copied on construction; see `validate`.
    """

    dictionary: torch.Tensor | None
    mask: torch.Tensor | None
    coeffs: torch.Tensor
    bias: torch.Tensor | None = None
    dictionary_scale: torch.Tensor | None = None
    coeffs_scale: torch.Tensor | None = None
    packing: Packing | None = None
    n_identity: int = 0
    owns_dictionary: bool = True

    @classmethod
    def from_indices(
        cls,
        dictionary: torch.Tensor | None,
        indices: torch.Tensor | None,
        coeffs: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        n_identity: int = 0,
        packed_dtype: str | None = None,
        coeffs_scale: torch.Tensor | None = None,
        coeffs_group: int = 0,
        dictionary_scale: torch.Tensor | None = None,
        owns_dictionary: bool = True,
    ) -> SparseFactor:
        """Build a factor from atom positions instead of a mask, and from fields instead of packed bytes.

        A pruned weight has ``dictionary=None, n_identity=d_in`` and the kept inputs as `indices`; a
        quantised dense weight has no indices either, and fields in `coeffs`.

        Parameters
        ----------
        dictionary : torch.Tensor or None
            [d_in, n_atoms], or int8 [n_atoms, d_in] with `dictionary_scale`; None without learned
            atoms.
        indices : torch.Tensor or None
            int32 [d_out, sparsity], strictly ascending in every row, in ``[0, n_identity + n_atoms)``,
            identity atoms first. None is full support.
        coeffs : torch.Tensor
            [d_out, sparsity], same order: floats, or the int32 fields of `packed_dtype` (integers
            ``|q| <= 2^(b-1) - 1``; for bfloat14 the upper 14 bits of a bfloat16 as a number).
        bias : torch.Tensor, optional
            [d_out].
        n_identity : int
            Identity atoms: 0 or d_in.
        packed_dtype : str, optional
            One of `PACKED_COEFFS`.
        coeffs_scale : torch.Tensor, optional
            bfloat16 [d_out, n_scale_groups], with integer fields.
        coeffs_group : int
            Coefficients per scale, 0 for one scale per output.
        dictionary_scale : torch.Tensor, optional
            bfloat16 [n_atoms], with an int8 dictionary.
        owns_dictionary : bool
            False for a member of a shared dictionary.

        Raises
        ------
        InputError
            If shapes disagree, a row is not strictly ascending or out of range, or a field does not
            fit.
        """
        if coeffs.dim() != 2 or (dictionary is not None and dictionary.dim() != 2):
            raise InputError(
                "from_indices: expected dictionary [d_in, n_atoms] and coeffs [d_out, s], got "
                f"{None if dictionary is None else list(dictionary.shape)}, {list(coeffs.shape)}"
            )
        mask = None
        if indices is not None:
            total_atoms = n_identity + _n_atoms(dictionary)
            mask = _mask_of(indices, coeffs.shape, total_atoms)
        packing = None
        if packed_dtype is not None:
            if packed_dtype not in PACKED_COEFFS:
                raise InputError(
                    f"from_indices: packed_dtype: expected one of {', '.join(PACKED_COEFFS)}, "
                    f"got {brief(packed_dtype)}"
                )
            packing = Packing(packed_dtype, coeffs.shape[1], coeffs_group)
            bits = native.CODE_FORMATS[packed_dtype].bits
            coeffs = native.pack_fields(coeffs.to(torch.int32), bits)
        return cls(
            dictionary=dictionary,
            mask=mask,
            coeffs=coeffs,
            bias=bias,
            dictionary_scale=dictionary_scale,
            coeffs_scale=coeffs_scale,
            packing=packing,
            n_identity=n_identity,
            owns_dictionary=owns_dictionary,
        )

    @classmethod
    def from_tensors(cls, spec: FactorSpec, tensors: Mapping[str, torch.Tensor]) -> SparseFactor:
        """Build a factor of known shape from its tensors; the inverse of `spec` and `tensors`.

        Parameters
        ----------
        spec : FactorSpec
            Shapes and storage types, as stored.
        tensors : mapping of str to torch.Tensor
            By the names in `PARTS`; those of a member include the dictionary of its leader.
        """
        packing = None
        if spec.is_packed:
            packing = Packing(spec.coeffs_dtype, spec.sparsity, spec.coeffs_group)
        return cls(
            dictionary=tensors.get("dictionary"),
            mask=tensors.get("mask"),
            coeffs=tensors["coeffs"],
            bias=tensors.get("bias"),
            dictionary_scale=tensors.get("dictionary_scale"),
            coeffs_scale=tensors.get("coeffs_scale"),
            packing=packing,
            n_identity=spec.n_identity,
            owns_dictionary=spec.owns_dictionary,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors that there are, by the names in `PARTS`; the dictionary also for a member."""
        return {part: tensor for part in PARTS if (tensor := getattr(self, part)) is not None}

    @property
    def spec(self) -> FactorSpec:
        """Shapes and storage types, read from the tensors.

        Raises
        ------
        InputError
            If the tensors cannot describe a factor.
        """
        if self.coeffs.dim() != 2 or (self.dictionary is not None and self.dictionary.dim() != 2):
            shape = None if self.dictionary is None else list(self.dictionary.shape)
            raise InputError(
                "expected two-dimensional dictionary and coeffs, "
                f"got {shape} and {list(self.coeffs.shape)}"
            )
        d_in, dictionary_dtype = self.n_identity, "bfloat16"
        if self.dictionary is not None:
            d_in = self.dictionary.shape[1 if self.dictionary.dtype == torch.int8 else 0]
            dictionary_dtype = dtype_name(self.dictionary.dtype)
        packing = self.packing
        return FactorSpec(
            d_in=d_in,
            d_out=self.coeffs.shape[0],
            n_atoms=_n_atoms(self.dictionary),
            sparsity=self.coeffs.shape[1] if packing is None else packing.sparsity,
            support="full" if self.mask is None else "mask",
            bias=self.bias is not None,
            dictionary_dtype=dictionary_dtype,
            coeffs_dtype=dtype_name(self.coeffs.dtype) if packing is None else packing.dtype,
            n_identity=self.n_identity,
            coeffs_group=0 if packing is None else packing.group,
            owns_dictionary=self.owns_dictionary,
        )

    @property
    def total_atoms(self) -> int:
        """Identity and learned atoms."""
        return self.n_identity + _n_atoms(self.dictionary)

    def indices(self) -> torch.Tensor:
        """Return the atom of every coefficient: int32 [d_out, sparsity], ascending in every row.

        Raises
        ------
        InputError
            If a row of the mask does not have exactly `sparsity` bits.
        """
        spec = self.spec
        if self.mask is None:
            atoms = torch.arange(spec.sparsity, dtype=torch.int32, device=self.coeffs.device)
            return atoms.expand(spec.d_out, spec.sparsity).contiguous()
        return native.unpack_mask(self.mask, spec.total_atoms, spec.sparsity)

    def float_coeffs(self) -> torch.Tensor:
        """Return the values of the coefficients [d_out, sparsity]: decoded to float32, or as stored."""
        if self.packing is None:
            return self.coeffs
        scale = None if self.coeffs_scale is None else self.coeffs_scale.cpu()
        values = native.decode_coeffs(
            self.coeffs.cpu(), self.packing.sparsity, self.packing.dtype, scale, self.packing.group
        )
        return values.to(self.coeffs.device)

    def float_dictionary(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """Return the learned atoms as columns [d_in, n_atoms] of `dtype`; None without any."""
        if self.dictionary is None or self.dictionary_scale is None:
            return None if self.dictionary is None else self.dictionary.to(dtype)
        return (self.dictionary.to(dtype) * self.dictionary_scale.to(dtype)[:, None]).t()

    def dense_code(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the code with its zeros, transposed: [d_out, total_atoms] of `dtype`."""
        coeffs = self.float_coeffs().to(dtype)
        if self.mask is None:
            return coeffs
        used = mask_to_bool(self.mask, self.total_atoms)
        code = torch.zeros(used.shape, dtype=dtype, device=coeffs.device)
        # masked_scatter_ fills row by row in ascending column order: the stored order of the
        # coefficients.
        return code.masked_scatter_(used, coeffs)

    def dense_weight(
        self, dtype: torch.dtype = torch.float32, *, device: torch.device | None = None
    ) -> torch.Tensor:
        """Multiply the factor out.

        Parameters
        ----------
        dtype : torch.dtype
            Type of the result; the product is computed in float32, or in float64 where that is
            asked for.
        device : torch.device, optional
            Where the product runs and the result lies; that of the factor by default.

        Returns
        -------
        torch.Tensor
            The weight [d_out, d_in], without the bias.
        """
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        device = self.coeffs.device if device is None else device
        code = self.dense_code(compute).to(device)
        identity, learned = code[:, : self.n_identity], code[:, self.n_identity :]
        dictionary = self.float_dictionary(compute)
        if dictionary is None:
            return identity.to(dtype)
        weight = learned @ dictionary.to(device).t()
        return (weight + identity if self.n_identity else weight).to(dtype)

    def to(self, dtype: torch.dtype) -> SparseFactor:
        """Return the factor with floating-point dictionary, coefficients and bias in `dtype`.

        Masks, packed coefficients, integers and their scales are shared: another type would not
        hold them.
        """

        def in_dtype(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return replace(
            self,
            dictionary=None if self.dictionary is None else in_dtype(self.dictionary),
            coeffs=in_dtype(self.coeffs),
            bias=None if self.bias is None else in_dtype(self.bias),
        )

    def validate(self, name: str, leader: str | None = None) -> None:
        """Check shapes, types, the population of the mask and that every value is one.

        That is: numbers and what integers decode to are finite, scales are positive, integers are in
        their symmetric range, padding bits are zero.

        Parameters
        ----------
        name : str
            Module name, for the message.
        leader : str, optional
            Name of the module that owns the dictionary, where that is another one.

        Raises
        ------
        CheckpointError
            On the first contradiction; the message names the tensor.
        """
        try:
            spec = self.spec
        except InputError as error:
            raise CheckpointError(f"{name}: {error}") from None
        tensors = self.tensors()
        expected = spec.tensors() | spec.dictionary_tensors()
        for part in PARTS:
            owner = name if leader is None or part not in DICTIONARY_PARTS else leader
            _check_tensor(tensors.get(part), expected.get(part), f"{owner}.{part}")
        if self.mask is not None:
            check_mask(self.mask, spec.total_atoms, spec.sparsity, f"{name}.mask")
        if self.dictionary is not None and self.dictionary.dtype == torch.int8:
            _check_integers(self.dictionary, 8, f"{leader or name}.dictionary")
            atoms = cast("torch.Tensor", self.float_dictionary())
            _check_finite(atoms, f"{leader or name}.dictionary")
        if self.packing is not None:
            self._check_packed(self.packing, f"{name}.coeffs")

    def _check_packed(self, packing: Packing, name: str) -> None:
        code_format = native.CODE_FORMATS[packing.dtype]
        padding = -code_format.bits * packing.sparsity % 8
        stray = self.coeffs[:, -1] >> (8 - padding) if padding else None
        if stray is not None and bool(stray.any()):
            raise CheckpointError(
                f"{name}: row {int(stray.nonzero()[0])} has a padding bit set beyond its "
                f"{packing.sparsity} fields"
            )
        if code_format.has_scale:
            fields = native.unpack_fields(
                self.coeffs.cpu(), packing.sparsity, code_format.bits, signed=True
            )
            _check_integers(fields, code_format.bits, name)
        _check_finite(self.float_coeffs(), name)


def _n_atoms(dictionary: torch.Tensor | None) -> int:
    if dictionary is None:
        return 0
    return dictionary.shape[0 if dictionary.dtype == torch.int8 else 1]


def _mask_of(indices: torch.Tensor, shape: torch.Size, total_atoms: int) -> torch.Tensor:
    if indices.shape != shape:
        raise InputError(
            f"from_indices: expected indices of the shape of coeffs {list(shape)}, "
            f"got {list(indices.shape)}"
        )
    positions = indices.to(torch.int32).contiguous()
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= total_atoms):
        raise InputError(f"from_indices: an index is outside [0, {total_atoms})")
    if bool((positions[:, 1:] <= positions[:, :-1]).any()):
        raise InputError("from_indices: indices must be strictly ascending in every row")
    return native.pack_mask(positions, total_atoms)


def _check_tensor(tensor: torch.Tensor | None, expected: TensorSpec | None, name: str) -> None:
    """Check presence, type and shape, that floats are finite and that scales are positive."""
    if tensor is None and expected is None:
        return
    wanted = (
        "none" if expected is None else f"{' or '.join(expected.dtypes)} {list(expected.shape)}"
    )
    found = "none" if tensor is None else f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
    if (
        tensor is None
        or expected is None
        or dtype_name(tensor.dtype) not in expected.dtypes
        or tuple(tensor.shape) != expected.shape
    ):
        raise CheckpointError(f"{name}: expected {wanted}, got {found}")
    if tensor.is_floating_point():
        _check_finite(tensor, name)
    if name.endswith("_scale") and bool((tensor <= 0).any()):
        raise CheckpointError(f"{name}: holds a scale that is not positive")


def _check_finite(values: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{name}: holds a value that is not finite")


def _check_integers(values: torch.Tensor, bits: int, name: str) -> None:
    least = -(1 << (bits - 1))
    if bool((values == least).any()):
        row = int((values == least).any(dim=1).nonzero()[0])
        raise CheckpointError(f"{name}: row {row} holds {least}, expected at least {least + 1}")


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


def brief(value: object) -> str:
    """Represent an untrusted value on one short line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
