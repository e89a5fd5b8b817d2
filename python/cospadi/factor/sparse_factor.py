"""One compressed projection: a dictionary and a sparse code.

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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch

from cospadi import native
from cospadi.errors import CheckpointError, InputError, brief
from cospadi.factor.checks import (
    check_finite,
    check_integers,
    check_mask,
    check_tensor,
    mask_to_bool,
)
from cospadi.factor.spec import (
    DICTIONARY_PARTS,
    PACKED_COEFFS,
    PARTS,
    FactorSpec,
    dtype_name,
)


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
            check_tensor(tensors.get(part), expected.get(part), f"{owner}.{part}")
        if self.mask is not None:
            check_mask(self.mask, spec.total_atoms, spec.sparsity, f"{name}.mask")
        if self.dictionary is not None and self.dictionary.dtype == torch.int8:
            check_integers(self.dictionary, 8, f"{leader or name}.dictionary")
            atoms = cast("torch.Tensor", self.float_dictionary())
            check_finite(atoms, f"{leader or name}.dictionary")
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
            check_integers(fields, code_format.bits, name)
        check_finite(self.float_coeffs(), name)


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
