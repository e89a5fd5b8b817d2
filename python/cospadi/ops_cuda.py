"""How the operators of `cospadi.ops` and `cospadi.linear_op` run on CUDA: which kernel for how many rows.

Up to `MAX_KERNEL_ROWS` rows S is read once per few rows, as it is stored. Beyond, panels of its outputs are expanded
to dense matrices of the type of z, at most `WORKSPACE_BYTES` at a time, and multiplied by torch: a coefficient is then
rounded to the type of z, which changes nothing unless it is stored in more bits or has a scale per group.
"""

from __future__ import annotations

import torch

from cospadi.native import cuda

MAX_KERNEL_ROWS = 32
"""Most rows for which S is multiplied as it is stored."""

WORKSPACE_BYTES = 256 * 2**20
"""Most bytes of S expanded at a time."""


def sparse_gemm(
    z: torch.Tensor, mask: torch.Tensor, coeffs: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`cospadi.ops.sparse_gemm` on CUDA."""
    name = "sparse_gemm"
    cuda.require_cuda(name, z.device)
    code = cuda.sparse_code_cuda(name, z.shape[-1], mask, coeffs)
    rows = z.reshape(-1, z.shape[-1])
    return _code_product(name, rows, None, code, bias).view(*z.shape[:-1], code.d_out)


def packed_gemm(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`cospadi.ops.packed_gemm` on CUDA."""
    name = "packed_gemm"
    cuda.require_cuda(name, z.device)
    code = cuda.packed_code_cuda(
        name, z.shape[-1], mask, codes, sparsity, code_format, scale, group
    )
    rows = z.reshape(-1, z.shape[-1])
    return _code_product(name, rows, None, code, bias).view(*z.shape[:-1], code.d_out)


def decode_coeffs(
    codes: torch.Tensor, sparsity: int, code_format: str, scale: torch.Tensor | None, group: int
) -> torch.Tensor:
    """`cospadi.ops.decode_coeffs` on CUDA."""
    name = "decode_coeffs"
    cuda.require_cuda(name, codes.device)
    # as many atoms as coefficients: without a mask every output uses every atom
    code = cuda.packed_code_cuda(name, sparsity, None, codes, sparsity, code_format, scale, group)
    return cuda.decode_cuda(name, code)


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
) -> torch.Tensor:
    """`cospadi.linear_op.linear` on CUDA."""
    name = "linear"
    cuda.require_cuda(name, x.device)
    rows = x.reshape(-1, x.shape[-1])
    products = None if dictionary is None else _products(name, rows, dictionary, dictionary_scale)
    first, second = (rows, products) if has_identity or products is None else (products, None)
    n_atoms = first.shape[1] + (0 if second is None else second.shape[1])
    if code_format is None:
        if mask is None:
            z = first if second is None else torch.cat((first, second), dim=1)
            y = torch.nn.functional.linear(z, coeffs.to(z.dtype), bias)
            return y.view(*x.shape[:-1], coeffs.shape[0])
        code = cuda.sparse_code_cuda(name, n_atoms, mask, coeffs)
    else:
        code = cuda.packed_code_cuda(
            name, n_atoms, mask, coeffs, sparsity, code_format, coeffs_scale, group
        )
    return _code_product(name, first, second, code, bias).view(*x.shape[:-1], code.d_out)


def _products(
    name: str, x: torch.Tensor, dictionary: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """Return ``x D`` [rows, n_atoms]."""
    if scale is not None:  # int8, one row per atom
        d_in = x.shape[1]
        atoms = dictionary.view(torch.uint8)
        code = cuda.packed_code_cuda(name, d_in, None, atoms, d_in, "int8", scale.unsqueeze(1), 0)
        return _code_product(name, x, None, code, None)
    if x.shape[0] <= cuda.MAX_DENSE_ROWS and dictionary.stride(1) == 1:
        return cuda.dense_gemm_cuda(name, x, dictionary)
    return x @ dictionary


def _code_product(
    name: str,
    first: torch.Tensor,
    second: torch.Tensor | None,
    code: cuda.CudaCode,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``[first, second] S + bias`` [rows, d_out]."""
    if first.shape[0] <= MAX_KERNEL_ROWS:
        return cuda.code_gemm_cuda(name, first, second, code, bias)
    # a copy of the rows costs less than writing and reading y twice, which would round it twice, too
    z = first if second is None else torch.cat((first, second), dim=1)
    bias = None if bias is None else bias.to(z.dtype)
    y = z.new_empty((z.shape[0], code.d_out))
    step = max(1, WORKSPACE_BYTES // (max(code.n_atoms, 1) * z.element_size()))
    for start in range(0, code.d_out, step):
        stop = min(start + step, code.d_out)
        panel = cuda.expand_cuda(name, code.rows(start, stop), z.dtype).T  # [n_atoms, outputs]
        if bias is None:
            torch.mm(z, panel, out=y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], z, panel, out=y[:, start:stop])
    return y
