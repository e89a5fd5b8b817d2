"""Column-sparse product and mask packing."""

from __future__ import annotations

import math
from typing import NoReturn

import torch

from cospadi import _C
from cospadi.errors import InputError
from cospadi.native.support import check_tensor, native_errors, thread_count

FLOAT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Storage types of the column-sparse GEMM and their numbers in the extension (``DType``)."""

FLOATS = tuple(FLOAT_CODES)


def mask_row_bytes(n_atoms: int) -> int:
    """Return the bytes of one mask row: ``ceil(n_atoms / 8)``."""
    return (n_atoms + 7) // 8


def sparse_gemm(
    z: torch.Tensor,
    mask: torch.Tensor,
    coeffs: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Multiply by a column-sparse matrix in its stored form: ``y = z @ S + bias``.

    ``y[r, j] = bias[j] + sum over the atoms a of output j of z[r, a] * S[a, j]``.

    Parameters
    ----------
    z : torch.Tensor
        ``[..., n_atoms]`` float32, bfloat16 or float16 on the CPU, any number of rows. A matrix may
        have any row stride; other views that are not contiguous are copied.
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8: bit ``a & 7`` of byte ``a >> 3`` is set if output j
        uses atom a. Trusted: `validate_mask` is the check to make once, when a matrix is loaded.
        With a wrong mask the result is wrong, but no memory outside the tensors is read.
    coeffs : torch.Tensor
        ``[d_out, sparsity]`` float32, bfloat16 or float16, ascending by atom.
    bias : torch.Tensor, optional
        ``[d_out]`` float32, bfloat16 or float16.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        ``[..., d_out]``, dtype of `z`, contiguous; no autograd (see `cospadi.ops.sparse_gemm`).

    Raises
    ------
    InputError
        Wrong dtype, device or shape, or more coefficients than atoms.

    Notes
    -----
    Sums are in float32 and rounded once; the result is the same to the bit for any thread count.
    Up to about 16 rows the cost is one pass over `mask` and `coeffs`; beyond, a dense product.
    """
    mask_shape, coeffs_shape = mask.shape, coeffs.shape
    is_valid = (
        z.is_cpu
        and mask.is_cpu
        and coeffs.is_cpu
        and z.dim() > 0
        and len(mask_shape) == len(coeffs_shape) == 2
        and z.dtype in FLOAT_CODES
        and mask.dtype is torch.uint8
        and coeffs.dtype in FLOAT_CODES
        and mask_shape[0] == coeffs_shape[0]
        and mask_shape[1] == (z.shape[-1] + 7) // 8
        and coeffs_shape[1] <= z.shape[-1]
        and (bias is None or is_bias(bias, coeffs_shape[0]))
    )
    if not is_valid:
        _raise_sparse_gemm_error(z, mask, coeffs, bias)
    *batch, n_atoms = z.shape
    d_out, sparsity = coeffs_shape
    z_stride = n_atoms
    if not z.is_contiguous():
        if len(batch) == 1 and z.stride(1) == 1 and z.stride(0) >= n_atoms:
            z_stride = z.stride(0)
        else:
            z = z.contiguous()
    y = z.new_empty((*batch, d_out))
    # Copies stay referenced until the call has returned.
    mask, coeffs = mask.contiguous(), coeffs.contiguous()
    bias_address = bias_code = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_address, bias_code = bias.data_ptr(), FLOAT_CODES[bias.dtype]
    try:
        _C.sparse_gemm(
            z.data_ptr(),
            FLOAT_CODES[z.dtype],
            math.prod(batch),
            z_stride,
            n_atoms,
            mask.data_ptr(),
            mask_shape[1],
            coeffs.data_ptr(),
            FLOAT_CODES[coeffs.dtype],
            d_out,
            sparsity,
            bias_address,
            bias_code,
            y.data_ptr(),
            thread_count(num_threads),
        )
    except (ValueError, RuntimeError) as error:
        with native_errors("sparse_gemm"):  # here, since entering it costs a tenth of a small call
            raise error
    return y


def is_bias(bias: torch.Tensor, d_out: int) -> bool:
    """Whether `bias` is a CPU tensor ``[d_out]`` of a storage type."""
    return bias.is_cpu and bias.dtype in FLOAT_CODES and bias.shape == (d_out,)


def _raise_sparse_gemm_error(
    z: torch.Tensor, mask: torch.Tensor, coeffs: torch.Tensor, bias: torch.Tensor | None
) -> NoReturn:
    """Say what is wrong; apart from the call, so that a correct call pays for one condition."""
    name = "sparse_gemm"
    if z.dim() == 0:
        raise InputError(f"{name}: z: expected shape [..., n_atoms], got a scalar")
    check_tensor(name, "z", z, (None,) * z.dim(), FLOATS)
    n_atoms = z.shape[-1]
    check_tensor(name, "coeffs", coeffs, (None, None), FLOATS)
    d_out, sparsity = coeffs.shape
    check_tensor(name, "mask", mask, (d_out, mask_row_bytes(n_atoms)), (torch.uint8,))
    if bias is not None:
        check_tensor(name, "bias", bias, (d_out,), FLOATS)
    raise InputError(f"{name}: coeffs: s = {sparsity} is more than the {n_atoms} atoms of z")


def pack_mask(indices: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """Write the atoms of each output as bits.

    Parameters
    ----------
    indices : torch.Tensor
        ``[d_out, sparsity]`` int32 on the CPU, strictly ascending per row, in ``0 .. n_atoms - 1``.
    n_atoms : int
        Atoms of the dictionary.

    Returns
    -------
    torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8: bit ``a & 7`` of byte ``a >> 3``; padding bits zero.

    Raises
    ------
    InputError
        Wrong dtype, device or shape; an index out of range or out of order (the row is named).
    """
    name = "pack_mask"
    check_tensor(name, "indices", indices, (None, None), (torch.int32,))
    _check_atoms(name, n_atoms)
    indices = indices.detach().contiguous()
    mask = torch.empty(
        (indices.shape[0], mask_row_bytes(n_atoms)), dtype=torch.uint8, device=indices.device
    )
    with native_errors(name):
        _C.pack_mask(
            indices.data_ptr(), indices.shape[0], indices.shape[1], n_atoms, mask.data_ptr()
        )
    return mask


def unpack_mask(mask: torch.Tensor, n_atoms: int, sparsity: int) -> torch.Tensor:
    """Read the atoms of each output from its bits; the inverse of `pack_mask`.

    Parameters
    ----------
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8 on the CPU.
    n_atoms, sparsity : int
        Atoms of the dictionary and bits set in every row.

    Returns
    -------
    torch.Tensor
        ``[d_out, sparsity]`` int32, strictly ascending per row.

    Raises
    ------
    InputError
        As `validate_mask`.
    """
    mask = _checked_mask("unpack_mask", mask, n_atoms, sparsity)
    indices = torch.empty((mask.shape[0], sparsity), dtype=torch.int32, device=mask.device)
    with native_errors("unpack_mask"):
        _C.unpack_mask(mask.data_ptr(), mask.shape[0], n_atoms, sparsity, indices.data_ptr())
    return indices


def validate_mask(mask: torch.Tensor, n_atoms: int, sparsity: int) -> None:
    """Check that every row of `mask` has exactly `sparsity` bits and none beyond the last atom.

    `sparse_gemm` trusts its mask; this is the check to make once, when a matrix is loaded or made.

    Parameters
    ----------
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8 on the CPU.
    n_atoms, sparsity : int
        Atoms of the dictionary and bits expected in every row.

    Raises
    ------
    InputError
        Wrong dtype, device or shape; a row with another number of bits, or with a padding bit set
        (the first such row is named).
    """
    mask = _checked_mask("validate_mask", mask, n_atoms, sparsity)
    with native_errors("validate_mask"):
        _C.validate_mask(mask.data_ptr(), mask.shape[0], n_atoms, sparsity)


def _check_atoms(function: str, n_atoms: int) -> None:
    if not 0 <= n_atoms < 2**31:
        raise InputError(f"{function}: n_atoms: expected 0 to 2^31 - 1, got {n_atoms}")


def _checked_mask(function: str, mask: torch.Tensor, n_atoms: int, sparsity: int) -> torch.Tensor:
    _check_atoms(function, n_atoms)
    if not 0 <= sparsity <= n_atoms:
        raise InputError(f"{function}: sparsity: expected 0 to n_atoms = {n_atoms}, got {sparsity}")
    check_tensor(function, "mask", mask, (None, mask_row_bytes(n_atoms)), (torch.uint8,))
    return mask.contiguous()
