"""A compressed projection in one call: the dictionary's products and the column-sparse code behind them."""

from __future__ import annotations

import math
from typing import NoReturn

import torch

from cospadi import _C
from cospadi.errors import InputError
from cospadi.native.packed import CODE_FORMATS, check_coeffs, is_mask, is_scale, scale_arguments
from cospadi.native.sparse import FLOAT_CODES, FLOATS, is_bias, mask_row_bytes
from cospadi.native.support import check_tensor, native_errors, thread_count


def linear(
    x: torch.Tensor,
    dictionary: torch.Tensor | None,
    dictionary_scale: torch.Tensor | None,
    has_identity: bool,
    mask: torch.Tensor | None,
    coeffs: torch.Tensor,
    sparsity: int,
    code_format: str | None,
    coeffs_scale: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None,
    *,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Apply a compressed projection: ``y = z @ S + bias`` with ``z = x @ D``, or ``[x ; x @ D]``.

    Parameters
    ----------
    x : torch.Tensor
        ``[..., d_in]`` float32, bfloat16 or float16 on the CPU, any number of rows. A matrix may have any row stride;
        other views that are not contiguous are copied.
    dictionary : torch.Tensor or None
        Learned atoms: ``[d_in, n_atoms]`` float32, bfloat16 or float16; or, with `dictionary_scale`, int8
        ``[n_atoms, d_in]``. None: there are none.
    dictionary_scale : torch.Tensor or None
        ``[n_atoms]`` float32, bfloat16 or float16, for an int8 dictionary.
    has_identity : bool
        The inputs are atoms, before the learned ones.
    mask : torch.Tensor or None
        ``[d_out, ceil(total_atoms / 8)]`` uint8, trusted as in `cospadi.native.sparse_gemm`, ``total_atoms`` being
        ``n_atoms``, plus ``d_in`` if the inputs are atoms. None: every output uses every atom.
    coeffs : torch.Tensor
        ``[d_out, sparsity]`` float32, bfloat16 or float16 if `code_format` is None, else packed as in
        `cospadi.native.packed_gemm`.
    sparsity : int
        Coefficients per output.
    code_format : str or None
        A name of `CODE_FORMATS`.
    coeffs_scale, group
        As ``scale`` and ``group`` of `cospadi.native.packed_gemm`.
    bias : torch.Tensor or None
        ``[d_out]`` float32, bfloat16 or float16.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        ``[..., d_out]``, dtype of `x`, contiguous; no autograd.

    Raises
    ------
    InputError
        Wrong dtype, device, shape, format, group or sparsity.

    Notes
    -----
    ``x @ D`` is rounded to the dtype of `x`; sums are in float32, the result is rounded once and is the same to the
    bit for any thread count. For few rows dictionary and coefficients are read once, as they are stored; for many,
    torch's products with the dictionary are the faster way.
    """
    form = None if code_format is None else CODE_FORMATS.get(code_format)
    d_in, coeffs_shape = x.shape[-1] if x.dim() else -1, coeffs.shape
    n_atoms = 0
    if dictionary is not None:
        n_atoms = dictionary.shape[1 if dictionary_scale is None else 0]
    total_atoms = n_atoms + d_in if has_identity else n_atoms
    is_valid = (
        x.is_cpu
        and d_in >= 0
        and x.dtype in FLOAT_CODES
        and _is_dictionary(dictionary, dictionary_scale, d_in)
        and coeffs.is_cpu
        and len(coeffs_shape) == 2
        and (sparsity == total_atoms if mask is None else 0 <= sparsity <= total_atoms)
        and (mask is None or is_mask(mask, coeffs_shape[0], total_atoms))
        and (
            (
                coeffs.dtype in FLOAT_CODES
                and coeffs_shape[1] == sparsity
                and coeffs_scale is None
                and group == 0
            )
            if code_format is None
            else (
                form is not None
                and coeffs.dtype is torch.uint8
                and coeffs_shape[1] == (sparsity * form.bits + 7) // 8
                and is_scale(coeffs_scale, coeffs_shape[0], sparsity, form, group)
            )
        )
        and (bias is None or is_bias(bias, coeffs_shape[0]))
    )
    if not is_valid:
        _raise_error(
            x, dictionary, dictionary_scale, total_atoms, mask, coeffs, sparsity, code_format,
            coeffs_scale, group, bias,
        )  # fmt: skip
    *batch, d_in = x.shape
    d_out = coeffs_shape[0]
    x_stride = d_in
    if not x.is_contiguous():
        if len(batch) == 1 and x.stride(1) == 1 and x.stride(0) >= d_in:
            x_stride = x.stride(0)
        else:
            x = x.contiguous()
    y = x.new_empty((*batch, d_out))
    # Copies stay referenced until the call has returned.
    coeffs = coeffs.contiguous()
    dictionary_arguments = (0, 0, 0)
    if dictionary is not None:
        dictionary = dictionary.contiguous()
        dictionary_arguments = (
            dictionary.data_ptr(),
            FLOAT_CODES.get(dictionary.dtype, 0),
            n_atoms,
        )
    dictionary_scale_address = dictionary_scale_code = 0
    if dictionary_scale is not None:
        dictionary_scale = dictionary_scale.contiguous()
        dictionary_scale_address = dictionary_scale.data_ptr()
        dictionary_scale_code = FLOAT_CODES[dictionary_scale.dtype]
    mask_address = mask_cols = bias_address = bias_code = 0
    if mask is not None:
        mask = mask.contiguous()
        mask_address, mask_cols = mask.data_ptr(), mask.shape[1]
    if bias is not None:
        bias = bias.contiguous()
        bias_address, bias_code = bias.data_ptr(), FLOAT_CODES[bias.dtype]
    coeffs_scale, scale_values = scale_arguments(coeffs_scale)
    try:
        _C.linear(
            x.data_ptr(),
            FLOAT_CODES[x.dtype],
            math.prod(batch),
            x_stride,
            d_in,
            has_identity,
            *dictionary_arguments,
            dictionary_scale_address,
            dictionary_scale_code,
            mask_address,
            mask_cols,
            coeffs.data_ptr(),
            FLOAT_CODES.get(coeffs.dtype, 0),
            d_out,
            coeffs_shape[1],
            sparsity,
            0 if form is None else int(form.has_scale),
            0 if form is None else form.bits,
            *scale_values,
            group,
            bias_address,
            bias_code,
            y.data_ptr(),
            thread_count(num_threads),
        )
    except (ValueError, RuntimeError) as error:
        with native_errors("linear"):  # here, since entering it costs a tenth of a small call
            raise error
    return y


def _is_dictionary(dictionary: torch.Tensor | None, scale: torch.Tensor | None, d_in: int) -> bool:
    if dictionary is None:
        return scale is None
    if not dictionary.is_cpu or dictionary.dim() != 2:
        return False
    if scale is None:
        return dictionary.dtype in FLOAT_CODES and dictionary.shape[0] == d_in
    return (
        dictionary.dtype is torch.int8
        and dictionary.shape[1] == d_in
        and is_bias(scale, dictionary.shape[0])
    )


def _raise_error(
    x: torch.Tensor,
    dictionary: torch.Tensor | None,
    dictionary_scale: torch.Tensor | None,
    total_atoms: int,
    mask: torch.Tensor | None,
    coeffs: torch.Tensor,
    sparsity: int,
    code_format: str | None,
    coeffs_scale: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None,
) -> NoReturn:
    """Say what is wrong; apart from the call, so that a correct call pays for one condition."""
    name = "linear"
    if x.dim() == 0:
        raise InputError(f"{name}: x: expected shape [..., d_in], got a scalar")
    check_tensor(name, "x", x, (None,) * x.dim(), FLOATS)
    d_in = x.shape[-1]
    if dictionary is None:
        if dictionary_scale is not None:
            raise InputError(f"{name}: dictionary_scale: expected None without a dictionary")
    elif dictionary_scale is None:
        check_tensor(name, "dictionary", dictionary, (d_in, None), FLOATS)
    else:
        check_tensor(name, "dictionary", dictionary, (None, d_in), (torch.int8,))
        check_tensor(name, "dictionary_scale", dictionary_scale, (dictionary.shape[0],), FLOATS)
    if code_format is not None:
        check_coeffs(name, coeffs, sparsity, code_format, coeffs_scale, group)
    else:
        check_tensor(name, "coeffs", coeffs, (None, sparsity), FLOATS)
        if coeffs_scale is not None or group != 0:
            raise InputError(
                f"{name}: coeffs_scale, group: expected None and 0 for floating-point coefficients"
            )
    d_out = coeffs.shape[0]
    if mask is not None:
        check_tensor(name, "mask", mask, (d_out, mask_row_bytes(total_atoms)), (torch.uint8,))
    if bias is not None:
        check_tensor(name, "bias", bias, (d_out,), FLOATS)
    if mask is None:
        raise InputError(
            f"{name}: sparsity: expected all {total_atoms} atoms without a mask, got {sparsity}"
        )
    raise InputError(f"{name}: sparsity: s = {sparsity} is more than the {total_atoms} atoms")
