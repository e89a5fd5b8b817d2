"""CUDA kernels on torch tensors: checks, addresses and the current stream.

Kernels are put into ``torch.cuda.current_stream()`` of the tensors' device and not waited for; outputs come from
torch's allocator, so the calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cospadi import _C
from cospadi.errors import CudaUnavailableError, InputError
from cospadi.native.packed import CODE_FORMATS, field_row_bytes, scale_group_count
from cospadi.native.sparse import FLOAT_CODES, FLOATS, mask_row_bytes
from cospadi.native.support import check_tensor, native_errors

MAX_DENSE_ROWS = 4
"""Most rows of `dense_gemm_cuda`."""

WAYS = {"auto": 0, "few": 1, "tensor": 2}
"""Kernels of `code_gemm_cuda`: chosen by size; on the CUDA cores; on the tensor cores."""

_BFLOAT_FIELD, _INTEGER_FIELD = 3, 4


@dataclass(frozen=True)
class CudaCode:
    """S ``[n_atoms, d_out]`` in its stored form, checked; its tensors stay referenced.

    Attributes
    ----------
    n_atoms, d_out, sparsity : int
        Sizes.
    device : torch.device
        Where the tensors are.
    arguments : tuple
        What the extension takes.
    tensors : tuple of torch.Tensor
        Mask, values and scales, contiguous.
    """

    n_atoms: int
    d_out: int
    sparsity: int
    device: torch.device
    arguments: tuple[int, int, int, int, int, int, int, int, int, int, int, int, int]
    tensors: tuple[torch.Tensor, ...]

    def rows(self, start: int, stop: int) -> CudaCode:
        """Return outputs `start` to `stop` as a matrix of their own."""
        arguments = list(self.arguments)
        arguments[1] = stop - start
        for address, row_bytes in ((3, 4), (5, 6)):
            if arguments[address]:
                arguments[address] += start * arguments[row_bytes]
        if arguments[9]:
            itemsize = 4 if arguments[10] == FLOAT_CODES[torch.float32] else 2
            arguments[9] += start * arguments[11] * itemsize
        return CudaCode(
            self.n_atoms,
            stop - start,
            self.sparsity,
            self.device,
            tuple(arguments),  # type: ignore[arg-type]
            self.tensors,
        )


def require_cuda(function: str, device: torch.device) -> None:
    """Raise `CudaUnavailableError` unless this build has kernels for `device`."""
    if not _C.cuda_built():
        raise CudaUnavailableError(
            f"{function}: expected CPU tensors, got one on {device}: this cospadi was {_C.cuda_unavailable_reason()}. "
            "Or move the model to the CPU with model.to('cpu')"
        )


def sparse_code_cuda(
    function: str, n_atoms: int, mask: torch.Tensor, coeffs: torch.Tensor
) -> CudaCode:
    """Check floating-point coefficients and their mask.

    Parameters
    ----------
    function : str
        Named in errors.
    n_atoms : int
        Rows of S.
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8, trusted as in `cospadi.native.sparse_gemm`.
    coeffs : torch.Tensor
        ``[d_out, sparsity]`` float32, bfloat16 or float16 on the same device.

    Raises
    ------
    InputError
        Wrong dtype, device or shape.
    """
    device = coeffs.device
    check_tensor(function, "coeffs", coeffs, (None, None), FLOATS, device)
    d_out, sparsity = coeffs.shape
    expected = (d_out, mask_row_bytes(n_atoms))
    check_tensor(function, "mask", mask, expected, (torch.uint8,), device)
    _check_sparsity(function, sparsity, n_atoms)
    mask, coeffs = mask.contiguous(), coeffs.contiguous()
    bits = 8 * coeffs.element_size()
    return CudaCode(
        n_atoms,
        d_out,
        sparsity,
        device,
        (
            n_atoms,
            d_out,
            sparsity,
            mask.data_ptr(),
            mask.shape[1],
            coeffs.data_ptr(),
            sparsity * coeffs.element_size(),
            FLOAT_CODES[coeffs.dtype],
            bits,
            0,
            0,
            0,
            0,
        ),
        (mask, coeffs),
    )


def packed_code_cuda(
    function: str,
    n_atoms: int,
    mask: torch.Tensor | None,
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None,
    group: int,
) -> CudaCode:
    """Check packed coefficients, their scales and their mask; as in `cospadi.native.packed_gemm`.

    Raises
    ------
    InputError
        Wrong dtype, device, shape, format, group or sparsity.
    """
    device = codes.device
    form = CODE_FORMATS.get(code_format)
    if form is None:
        raise InputError(
            f"{function}: code_format: expected one of {', '.join(CODE_FORMATS)}, got {code_format!r}"
        )
    _check_sparsity(function, sparsity, n_atoms)
    expected = (None, field_row_bytes(sparsity, form.bits))
    check_tensor(function, "codes", codes, expected, (torch.uint8,), device)
    d_out = codes.shape[0]
    if group < 0:
        raise InputError(
            f"{function}: group: expected 0 (one scale per output) or a number of coefficients, got {group}"
        )
    if form.has_scale:
        if scale is None:
            raise InputError(
                f"{function}: scale: {form.name} needs scales [d_out, n_groups], got None"
            )
        groups = (d_out, scale_group_count(sparsity, group))
        check_tensor(function, "scale", scale, groups, FLOATS, device)
        scale = scale.contiguous()
    elif scale is not None or group != 0:
        raise InputError(f"{function}: {form.name} has no scales; expected scale=None and group=0")
    if mask is not None:
        shape = (d_out, mask_row_bytes(n_atoms))
        check_tensor(function, "mask", mask, shape, (torch.uint8,), device)
        mask = mask.contiguous()
    elif sparsity != n_atoms:
        raise InputError(
            f"{function}: sparsity: expected all {n_atoms} atoms of z without a mask, got {sparsity}"
        )
    codes = codes.contiguous()
    tensors = tuple(t for t in (mask, codes, scale) if t is not None)
    return CudaCode(
        n_atoms,
        d_out,
        sparsity,
        device,
        (
            n_atoms,
            d_out,
            sparsity,
            0 if mask is None else mask.data_ptr(),
            0 if mask is None else mask.shape[1],
            codes.data_ptr(),
            codes.shape[1],
            _INTEGER_FIELD if form.has_scale else _BFLOAT_FIELD,
            form.bits,
            0 if scale is None else scale.data_ptr(),
            0 if scale is None else FLOAT_CODES[scale.dtype],
            0 if scale is None else scale.shape[1],
            group,
        ),
        tensors,
    )


def code_gemm_cuda(
    function: str,
    first: torch.Tensor,
    second: torch.Tensor | None,
    code: CudaCode,
    bias: torch.Tensor | None,
    *,
    way: str = "auto",
) -> torch.Tensor:
    """Multiply by S as it is stored: ``y = [first, second] @ S + bias``, for a few rows.

    Parameters
    ----------
    function : str
        Named in errors.
    first : torch.Tensor
        ``[rows, n_first]`` float32, bfloat16 or float16.
    second : torch.Tensor or None
        ``[rows, n_atoms - n_first]`` of the same dtype; None if `first` has all atoms.
    code : CudaCode
        S.
    bias : torch.Tensor or None
        ``[d_out]`` float32, bfloat16 or float16.
    way : str
        A name of `WAYS`.

    Returns
    -------
    torch.Tensor
        ``[rows, d_out]``, dtype of `first`. Sums are in float32 and rounded once.

    Raises
    ------
    InputError
        Wrong dtype, device or shape, or a way that does not take them.
    NativeError
        The device refused the launch.
    """
    device = code.device
    check_tensor(function, "z", first, (None, None), FLOATS, device)
    rows, n_first = first.shape
    n_second = 0 if second is None else second.shape[-1]
    if second is not None:
        check_tensor(function, "z", second, (rows, None), (first.dtype,), device)
    if n_first + n_second != code.n_atoms:
        raise InputError(
            f"{function}: z: expected {code.n_atoms} columns, got {n_first + n_second}"
        )
    if bias is not None:
        check_tensor(function, "bias", bias, (code.d_out,), FLOATS, device)
        bias = bias.contiguous()
    first = _unit_stride(first)
    second = None if second is None else _unit_stride(second)
    y = first.new_empty((rows, code.d_out))
    with native_errors(function):
        _C.cuda_code_gemm(
            _index(device),
            _stream(device),
            WAYS[way],
            FLOAT_CODES[first.dtype],
            rows,
            first.data_ptr(),
            _row_stride(first),
            n_first,
            0 if second is None else second.data_ptr(),
            0 if second is None else _row_stride(second),
            n_second,
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else FLOAT_CODES[bias.dtype],
            y.data_ptr(),
            FLOAT_CODES[y.dtype],
            code.arguments,
        )
    return y


def dense_gemm_cuda(function: str, x: torch.Tensor, dictionary: torch.Tensor) -> torch.Tensor:
    """Multiply ``x @ dictionary`` for at most `MAX_DENSE_ROWS` rows, at the speed of memory.

    Parameters
    ----------
    function : str
        Named in errors.
    x : torch.Tensor
        ``[rows, d_in]`` float32, bfloat16 or float16.
    dictionary : torch.Tensor
        ``[d_in, n_atoms]``, same dtype and device. Fastest where rows begin at multiples of 16 bytes.

    Returns
    -------
    torch.Tensor
        ``[rows, n_atoms]``, dtype of `x`. Sums are in float32 and rounded once.

    Raises
    ------
    InputError
        Wrong dtype, device or shape, or more rows.
    """
    device = dictionary.device
    check_tensor(function, "x", x, (None, dictionary.shape[0]), FLOATS, device)
    check_tensor(function, "dictionary", dictionary, (None, None), (x.dtype,), device)
    x, dictionary = _unit_stride(x), _unit_stride(dictionary)
    y = x.new_empty((x.shape[0], dictionary.shape[1]))
    with native_errors(function):
        _C.cuda_dense_gemm(
            _index(device),
            _stream(device),
            FLOAT_CODES[x.dtype],
            x.shape[0],
            x.data_ptr(),
            _row_stride(x),
            x.shape[1],
            dictionary.data_ptr(),
            _row_stride(dictionary),
            dictionary.shape[1],
            y.data_ptr(),
        )
    return y


def expand_cuda(function: str, code: CudaCode, dtype: torch.dtype) -> torch.Tensor:
    """Return S transposed as a dense matrix ``[d_out, n_atoms]`` of `dtype`, scales applied, values rounded once."""
    device = code.device
    out = torch.empty((code.d_out, code.n_atoms), dtype=dtype, device=device)
    with native_errors(function):
        _C.cuda_expand(
            _index(device), _stream(device), FLOAT_CODES[dtype], out.data_ptr(), code.arguments
        )
    return out


def decode_cuda(function: str, code: CudaCode) -> torch.Tensor:
    """Return the coefficients ``[d_out, sparsity]`` as float32, scales applied."""
    device = code.device
    out = torch.empty((code.d_out, code.sparsity), dtype=torch.float32, device=device)
    with native_errors(function):
        _C.cuda_decode(_index(device), _stream(device), out.data_ptr(), code.arguments)
    return out


def _check_sparsity(function: str, sparsity: int, n_atoms: int) -> None:
    if not 0 <= sparsity <= n_atoms:
        raise InputError(
            f"{function}: sparsity: s = {sparsity} is more than the {n_atoms} atoms of z"
            if sparsity > 0
            else f"{function}: sparsity: expected at least 0, got {sparsity}"
        )
    if n_atoms >= 2**31:
        raise InputError(f"{function}: z: expected fewer than 2^31 atoms, got {n_atoms}")


def _unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    """Return `matrix` with unit inner stride; a copy only where the layout asks for one."""
    rows, cols = matrix.shape
    if matrix.stride(1) == 1 and (rows == 1 or matrix.stride(0) >= cols):
        return matrix
    return matrix.contiguous()


def _row_stride(matrix: torch.Tensor) -> int:
    return max(matrix.stride(0), matrix.shape[1])


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
