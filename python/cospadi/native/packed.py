"""Packed coefficients: fields of a few bits, and the product with a matrix that is stored so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch

from cospadi import _C
from cospadi.errors import InputError
from cospadi.native.sparse import FLOAT_CODES, FLOATS, is_bias, mask_row_bytes
from cospadi.native.support import check_tensor, native_errors, thread_count

MIN_FIELD_BITS, MAX_FIELD_BITS = 2, 16
"""Narrowest and widest field of `pack_fields`."""


@dataclass(frozen=True)
class CodeFormat:
    """What the fields of packed coefficients mean.

    Attributes
    ----------
    name : str
        As in `CODE_FORMATS` and in a checkpoint's ``coeffs_dtype``.
    bits : int
        Bits per coefficient.
    has_scale : bool
        True: a two's complement integer that is multiplied by its scale. False: the upper bits of a bfloat16.
    """

    name: str
    bits: int
    has_scale: bool


CODE_FORMATS = {
    code_format.name: code_format
    for code_format in (
        CodeFormat("bfloat14", 14, has_scale=False),
        *(CodeFormat(f"int{bits}", bits, has_scale=True) for bits in (8, 6, 5, 4, 3)),
    )
}
"""Every packed form of coefficients, by name."""


def field_row_bytes(n: int, bits: int) -> int:
    """Return the bytes of a packed row of `n` fields: ``ceil(bits n / 8)``."""
    return (n * bits + 7) // 8


def scale_group_count(sparsity: int, group: int) -> int:
    """Return the scales per output: one if `group` is 0, else ``ceil(sparsity / group)``."""
    return 1 if group == 0 else -(-sparsity // group)


def packed_gemm(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None,
    *,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Multiply by a column-sparse matrix with packed coefficients: ``y = z @ S + bias``.

    ``y[r, j] = bias[j] + sum over the atoms a of output j of z[r, a] * S[a, j]``, where coefficient t of output j is
    its field times ``scale[j, t // group]``, times ``scale[j, 0]`` if `group` is 0, or the field itself.

    Parameters
    ----------
    z : torch.Tensor
        ``[..., n_atoms]`` float32, bfloat16 or float16 on the CPU, any number of rows. A matrix may have any row
        stride; other views that are not contiguous are copied.
    mask : torch.Tensor or None
        ``[d_out, ceil(n_atoms / 8)]`` uint8, trusted as in `cospadi.native.sparse_gemm`. None: every output uses every
        atom, and `sparsity` is ``n_atoms``.
    codes : torch.Tensor
        ``[d_out, ceil(bits sparsity / 8)]`` uint8, the fields as `pack_fields` writes them, ascending by atom.
    sparsity : int
        Coefficients per output.
    code_format : str
        A name of `CODE_FORMATS`.
    scale : torch.Tensor or None
        ``[d_out, n_groups]`` float32, bfloat16 or float16, ``n_groups`` 1 if `group` is 0, else
        ``ceil(sparsity / group)``. None for "bfloat14".
    group : int
        Consecutive coefficients of an output that share a scale; 0: all of them.
    bias : torch.Tensor or None
        ``[d_out]`` float32, bfloat16 or float16.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        ``[..., d_out]``, dtype of `z`, contiguous; no autograd (see `cospadi.ops.packed_gemm`).

    Raises
    ------
    InputError
        Wrong dtype, device, shape, format, group or sparsity.

    Notes
    -----
    Sums are in float32 and rounded once; the result is the same to the bit for any thread count. The fields are
    decoded in the cache, so that memory is read at the packed size.
    """
    form = CODE_FORMATS.get(code_format)
    codes_shape = codes.shape
    is_valid = (
        form is not None
        and z.is_cpu
        and codes.is_cpu
        and z.dim() > 0
        and len(codes_shape) == 2
        and z.dtype in FLOAT_CODES
        and codes.dtype is torch.uint8
        and codes_shape[1] == (sparsity * form.bits + 7) // 8
        and (sparsity == z.shape[-1] if mask is None else 0 <= sparsity <= z.shape[-1])
        and (mask is None or is_mask(mask, codes_shape[0], z.shape[-1]))
        and is_scale(scale, codes_shape[0], sparsity, form, group)
        and (bias is None or is_bias(bias, codes_shape[0]))
    )
    if not is_valid or form is None:
        _raise_packed_gemm_error(z, mask, codes, sparsity, code_format, scale, group, bias)
    *batch, n_atoms = z.shape
    d_out, row_bytes = codes_shape
    z_stride = n_atoms
    if not z.is_contiguous():
        if len(batch) == 1 and z.stride(1) == 1 and z.stride(0) >= n_atoms:
            z_stride = z.stride(0)
        else:
            z = z.contiguous()
    y = z.new_empty((*batch, d_out))
    # Copies stay referenced until the call has returned.
    codes = codes.contiguous()
    mask_address = mask_cols = bias_address = bias_code = 0
    if mask is not None:
        mask = mask.contiguous()
        mask_address, mask_cols = mask.data_ptr(), mask.shape[1]
    if bias is not None:
        bias = bias.contiguous()
        bias_address, bias_code = bias.data_ptr(), FLOAT_CODES[bias.dtype]
    scale, scale_values = scale_arguments(scale)
    try:
        _C.packed_gemm(
            z.data_ptr(),
            FLOAT_CODES[z.dtype],
            math.prod(batch),
            z_stride,
            n_atoms,
            mask_address,
            mask_cols,
            codes.data_ptr(),
            d_out,
            row_bytes,
            sparsity,
            int(form.has_scale),
            form.bits,
            *scale_values,
            group,
            bias_address,
            bias_code,
            y.data_ptr(),
            thread_count(num_threads),
        )
    except (ValueError, RuntimeError) as error:
        with native_errors("packed_gemm"):  # here, since entering it costs a tenth of a small call
            raise error
    return y


def is_mask(mask: torch.Tensor, d_out: int, n_atoms: int) -> bool:
    """Whether `mask` is a CPU tensor of the shape and type of a mask."""
    return (
        mask.is_cpu and mask.dtype is torch.uint8 and mask.shape == (d_out, mask_row_bytes(n_atoms))
    )


def is_scale(
    scale: torch.Tensor | None, d_out: int, sparsity: int, form: CodeFormat, group: int
) -> bool:
    """Whether `scale` is what the format asks for: a CPU tensor of scales, or None."""
    if not form.has_scale:
        return scale is None and group == 0
    return (
        scale is not None
        and group >= 0
        and scale.is_cpu
        and scale.dtype in FLOAT_CODES
        and scale.shape == (d_out, scale_group_count(sparsity, group))
    )


def scale_arguments(
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor | None, tuple[int, int, int]]:
    """Return `scale` contiguous, and its address, dtype and scales per output."""
    if scale is None:
        return None, (0, 0, 0)
    scale = scale.contiguous()
    return scale, (scale.data_ptr(), FLOAT_CODES[scale.dtype], scale.shape[1])


def _raise_packed_gemm_error(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None,
) -> NoReturn:
    """Say what is wrong; apart from the call, so that a correct call pays for one condition."""
    name = "packed_gemm"
    if z.dim() == 0:
        raise InputError(f"{name}: z: expected shape [..., n_atoms], got a scalar")
    check_tensor(name, "z", z, (None,) * z.dim(), FLOATS)
    n_atoms = z.shape[-1]
    check_coeffs(name, codes, sparsity, code_format, scale, group)
    d_out = codes.shape[0]
    if mask is not None:
        check_tensor(name, "mask", mask, (d_out, mask_row_bytes(n_atoms)), (torch.uint8,))
    if bias is not None:
        check_tensor(name, "bias", bias, (d_out,), FLOATS)
    if mask is None:
        raise InputError(
            f"{name}: sparsity: expected all {n_atoms} atoms of z without a mask, got {sparsity}"
        )
    raise InputError(f"{name}: sparsity: s = {sparsity} is more than the {n_atoms} atoms of z")


def check_coeffs(
    function: str,
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None,
    group: int,
) -> CodeFormat:
    """Raise `InputError` unless the parts of packed coefficients fit together; returns their format."""
    form = CODE_FORMATS.get(code_format)
    if form is None:
        raise InputError(
            f"{function}: code_format: expected one of {', '.join(CODE_FORMATS)}, got {code_format!r}"
        )
    if sparsity < 0:
        raise InputError(f"{function}: sparsity: expected at least 0, got {sparsity}")
    if group < 0:
        raise InputError(
            f"{function}: group: expected 0 (one scale per output) or a number of coefficients, got {group}"
        )
    check_tensor(
        function, "codes", codes, (None, field_row_bytes(sparsity, form.bits)), (torch.uint8,)
    )
    if not form.has_scale:
        if scale is not None or group != 0:
            raise InputError(
                f"{function}: {form.name} has no scales; expected scale=None and group=0"
            )
    elif scale is None:
        raise InputError(f"{function}: scale: {form.name} needs scales [d_out, n_groups], got None")
    else:
        expected = (codes.shape[0], scale_group_count(sparsity, group))
        check_tensor(function, "scale", scale, expected, FLOATS)
    return form


def decode_coeffs(
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None,
    group: int,
    *,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Return the coefficients that packed fields and scales stand for.

    Parameters
    ----------
    codes, sparsity, code_format, scale, group
        As for `packed_gemm`.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        ``[d_out, sparsity]`` float32: the field as a float, times its scale, rounded once.

    Raises
    ------
    InputError
        Wrong dtype, device, shape, format, group or sparsity.
    """
    name = "decode_coeffs"
    form = check_coeffs(name, codes, sparsity, code_format, scale, group)
    codes = codes.contiguous()
    scale, scale_values = scale_arguments(scale)
    d_out, row_bytes = codes.shape
    out = torch.empty((d_out, sparsity), dtype=torch.float32, device=codes.device)
    with native_errors(name):
        _C.decode_coeffs(
            codes.data_ptr(),
            d_out,
            row_bytes,
            sparsity,
            int(form.has_scale),
            form.bits,
            *scale_values,
            group,
            out.data_ptr(),
            thread_count(num_threads),
        )
    return out


def pack_fields(values: torch.Tensor, bits: int, *, num_threads: int | None = None) -> torch.Tensor:
    """Write integers as fields of `bits` bits.

    Parameters
    ----------
    values : torch.Tensor
        ``[rows, n]`` int32 on the CPU, from ``-2^(bits - 1)`` to ``2^bits - 1``; each is taken modulo ``2^bits``, so
        that negative ones become two's complement.
    bits : int
        2 to 16.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        ``[rows, ceil(bits n / 8)]`` uint8: field j is bits ``[bits j, bits (j + 1))`` of its row, least significant
        bit first; zero bits pad the row.

    Raises
    ------
    InputError
        Wrong dtype, device, shape or width; a value out of range (its row and column are named).
    """
    name = "pack_fields"
    _check_bits(name, bits)
    check_tensor(name, "values", values, (None, None), (torch.int32,))
    values = values.contiguous()
    rows, n = values.shape
    packed = torch.empty((rows, field_row_bytes(n, bits)), dtype=torch.uint8, device=values.device)
    with native_errors(name):
        _C.pack_fields(
            values.data_ptr(), rows, n, bits, packed.data_ptr(), thread_count(num_threads)
        )
    return packed


def unpack_fields(
    packed: torch.Tensor, n: int, bits: int, *, signed: bool, num_threads: int | None = None
) -> torch.Tensor:
    """Read fields of `bits` bits; the inverse of `pack_fields`.

    Parameters
    ----------
    packed : torch.Tensor
        ``[rows, ceil(bits n / 8)]`` uint8 on the CPU.
    n, bits : int
        Fields per row and bits per field, 2 to 16.
    signed : bool
        True: two's complement. False: 0 to ``2^bits - 1``.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        ``[rows, n]`` int32.

    Raises
    ------
    InputError
        Wrong dtype, device, shape or width.
    """
    name = "unpack_fields"
    _check_bits(name, bits)
    if n < 0:
        raise InputError(f"{name}: n: expected at least 0, got {n}")
    check_tensor(name, "packed", packed, (None, field_row_bytes(n, bits)), (torch.uint8,))
    packed = packed.contiguous()
    values = torch.empty((packed.shape[0], n), dtype=torch.int32, device=packed.device)
    with native_errors(name):
        _C.unpack_fields(
            packed.data_ptr(),
            packed.shape[0],
            n,
            bits,
            signed,
            values.data_ptr(),
            thread_count(num_threads),
        )
    return values


def _check_bits(function: str, bits: int) -> None:
    if not MIN_FIELD_BITS <= bits <= MAX_FIELD_BITS:
        raise InputError(
            f"{function}: bits: expected {MIN_FIELD_BITS} to {MAX_FIELD_BITS}, got {bits}"
        )
