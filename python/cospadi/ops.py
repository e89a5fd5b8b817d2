"""The column-sparse products as torch operators: `torch.compile`, autograd and export see one op each.

``torch.ops.cospadi.sparse_gemm(z, mask, coeffs, bias)``, ``torch.ops.cospadi.packed_gemm(z, mask, codes, sparsity,
code_format, scale, group, bias)`` and ``torch.ops.cospadi.decode_coeffs(codes, sparsity, code_format, scale, group)``
are defined when this module is imported. The contract is this file: schema, fake (shapes only), one implementation per
device (those of CUDA in `cospadi.ops_cuda`), gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from cospadi import native, ops_cuda

__all__ = ["decode_coeffs", "packed_gemm", "sparse_gemm"]

_SCHEMAS = (
    "sparse_gemm(Tensor z, Tensor mask, Tensor coeffs, Tensor? bias) -> Tensor",
    "packed_gemm(Tensor z, Tensor? mask, Tensor codes, SymInt sparsity, str code_format, "
    "Tensor? scale, int group, Tensor? bias) -> Tensor",
    "decode_coeffs(Tensor codes, SymInt sparsity, str code_format, Tensor? scale, int group) "
    "-> Tensor",
)


def sparse_gemm(
    z: torch.Tensor, mask: torch.Tensor, coeffs: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply by a column-sparse matrix in its stored form: ``y = z @ S + bias``.

    Parameters
    ----------
    z : torch.Tensor
        ``[..., n_atoms]`` float32, bfloat16 or float16, any batch shape (also empty), any strides.
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8, validated (see `cospadi.native.validate_mask`).
    coeffs : torch.Tensor
        ``[d_out, sparsity]`` float32, bfloat16 or float16, ascending by atom; its dtype need not be
        that of `z`.
    bias : torch.Tensor, optional
        ``[d_out]`` float32, bfloat16 or float16.

    Returns
    -------
    torch.Tensor
        ``[..., d_out]``, dtype and device of `z`, contiguous.

    Raises
    ------
    InputError
        Wrong dtype, device or shape.
    CudaUnavailableError
        `z` is a CUDA tensor, and this build has no CUDA kernels.

    Notes
    -----
    Differentiable in `z`, `coeffs` and `bias`; the gradient expands S to a dense matrix. Sums are
    in float32 and rounded once to the dtype of `z`.
    """
    result: torch.Tensor = torch.ops.cospadi.sparse_gemm(z, mask, coeffs, bias)
    return result


def packed_gemm(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None = None,
    group: int = 0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by a column-sparse matrix with packed coefficients: ``y = z @ S + bias``.

    Parameters
    ----------
    z : torch.Tensor
        ``[..., n_atoms]`` float32, bfloat16 or float16, any batch shape (also empty), any strides.
    mask : torch.Tensor or None
        ``[d_out, ceil(n_atoms / 8)]`` uint8, validated (see `cospadi.native.validate_mask`). None: every output uses
        every atom, and `sparsity` is ``n_atoms``.
    codes : torch.Tensor
        ``[d_out, ceil(bits sparsity / 8)]`` uint8, fields ascending by atom (see `cospadi.native.pack_fields`).
    sparsity : int
        Coefficients per output.
    code_format : str
        A name of `cospadi.native.CODE_FORMATS`.
    scale : torch.Tensor, optional
        ``[d_out, n_groups]`` float32, bfloat16 or float16, positive, for integer formats.
    group : int
        Consecutive coefficients that share a scale; 0: all of an output.
    bias : torch.Tensor, optional
        ``[d_out]`` float32, bfloat16 or float16.

    Returns
    -------
    torch.Tensor
        ``[..., d_out]``, dtype and device of `z`, contiguous.

    Raises
    ------
    InputError
        Wrong dtype, device, shape, format, group or sparsity.
    CudaUnavailableError
        `z` is a CUDA tensor, and this build has no CUDA kernels.

    Notes
    -----
    Differentiable in `z`, `scale` and `bias`; the gradient expands S to a dense matrix. Sums are in float32 and
    rounded once to the dtype of `z`.
    """
    result: torch.Tensor = torch.ops.cospadi.packed_gemm(
        z, mask, codes, sparsity, code_format, scale, group, bias
    )
    return result


def decode_coeffs(
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None = None,
    group: int = 0,
) -> torch.Tensor:
    """Return the coefficients that packed fields and scales stand for: float32 ``[d_out, sparsity]``.

    Parameters
    ----------
    codes, sparsity, code_format, scale, group
        As for `packed_gemm`.

    Returns
    -------
    torch.Tensor
        ``[d_out, sparsity]`` float32 on the device of `codes`; not differentiable.

    Raises
    ------
    InputError
        Wrong dtype, device, shape, format, group or sparsity.
    CudaUnavailableError
        `codes` is a CUDA tensor, and this build has no CUDA kernels.
    """
    result: torch.Tensor = torch.ops.cospadi.decode_coeffs(
        codes, sparsity, code_format, scale, group
    )
    return result


def _cpu(
    z: torch.Tensor, mask: torch.Tensor, coeffs: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return native.sparse_gemm(z, mask, coeffs, bias)


def _packed_cpu(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return native.packed_gemm(z, mask, codes, sparsity, code_format, scale, group, bias)


def _decode_cpu(
    codes: torch.Tensor, sparsity: int, code_format: str, scale: torch.Tensor | None, group: int
) -> torch.Tensor:
    return native.decode_coeffs(codes, sparsity, code_format, scale, group)


def _fake(
    z: torch.Tensor, mask: torch.Tensor, coeffs: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    torch._check(z.dim() >= 1, lambda: f"sparse_gemm: z: expected [..., n_atoms], got {z.shape}")
    torch._check(
        mask.dim() == 2 and coeffs.dim() == 2,
        lambda: (
            f"sparse_gemm: mask and coeffs: expected matrices, got {mask.shape}, {coeffs.shape}"
        ),
    )
    d_out, n_bytes = mask.shape
    torch._check(
        coeffs.shape[0] == d_out,
        lambda: f"sparse_gemm: coeffs: expected {d_out} rows, got {coeffs.shape[0]}",
    )
    torch._check(
        n_bytes == (z.shape[-1] + 7) // 8,
        lambda: f"sparse_gemm: mask: {n_bytes} bytes per row do not match {z.shape[-1]} atoms",
    )
    torch._check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == d_out),
        lambda: f"sparse_gemm: bias: expected [{d_out}]",
    )
    return z.new_empty((*z.shape[:-1], d_out))


def _packed_fake(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None,
    group: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    name = "packed_gemm"
    torch._check(z.dim() >= 1, lambda: f"{name}: z: expected [..., n_atoms], got {z.shape}")
    _check_packed(name, codes, sparsity, code_format, scale, group)
    d_out, n_atoms = codes.shape[0], z.shape[-1]
    torch._check(
        mask is not None or sparsity == n_atoms,
        lambda: f"{name}: sparsity: expected all {n_atoms} atoms without a mask, got {sparsity}",
    )
    torch._check(
        mask is None
        or (mask.dim() == 2 and mask.shape[0] == d_out and mask.shape[1] == (n_atoms + 7) // 8),
        lambda: f"{name}: mask: expected [{d_out}, {(n_atoms + 7) // 8}]",
    )
    torch._check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == d_out),
        lambda: f"{name}: bias: expected [{d_out}]",
    )
    return z.new_empty((*z.shape[:-1], d_out))


def _decode_fake(
    codes: torch.Tensor, sparsity: int, code_format: str, scale: torch.Tensor | None, group: int
) -> torch.Tensor:
    _check_packed("decode_coeffs", codes, sparsity, code_format, scale, group)
    return codes.new_empty((codes.shape[0], sparsity), dtype=torch.float32)


def _check_packed(
    name: str,
    codes: torch.Tensor,
    sparsity: int,
    code_format: str,
    scale: torch.Tensor | None,
    group: int,
) -> None:
    """Check the shapes of packed coefficients without their data."""
    torch._check(
        code_format in native.CODE_FORMATS,
        lambda: (
            f"{name}: code_format: expected one of {list(native.CODE_FORMATS)}, got {code_format!r}"
        ),
    )
    form = native.CODE_FORMATS[code_format]
    torch._check(codes.dim() == 2, lambda: f"{name}: codes: expected a matrix, got {codes.shape}")
    d_out, row_bytes = codes.shape
    torch._check(
        row_bytes == (sparsity * form.bits + 7) // 8,
        lambda: (
            f"{name}: codes: {row_bytes} bytes per row do not match {sparsity} x {form.bits} bits"
        ),
    )
    torch._check(
        (scale is not None) == form.has_scale,
        lambda: f"{name}: scale: {code_format} {'needs' if form.has_scale else 'has no'} scales",
    )
    n_groups = 1 if group == 0 else (sparsity + group - 1) // group
    torch._check(
        scale is None
        or (scale.dim() == 2 and scale.shape[0] == d_out and scale.shape[1] == n_groups),
        lambda: f"{name}: scale: expected [{d_out}, {n_groups}]",
    )


def _dense(mask: torch.Tensor, coeffs: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """S^T [d_out, n_atoms] in the dtype of `coeffs`."""
    return coeffs.new_zeros((coeffs.shape[0], n_atoms)).masked_scatter_(
        _positions(mask, n_atoms), coeffs
    )


def _positions(mask: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """Mask bits as bool [d_out, n_atoms]."""
    bit = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> bit) & 1  # [d_out, bytes, 8], lowest bit first
    return bits.flatten(1)[:, :n_atoms].to(torch.bool)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ANN401
    z, mask, coeffs, bias = inputs
    ctx.save_for_backward(z, mask, coeffs)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
    z, mask, coeffs = ctx.saved_tensors
    n_atoms = z.shape[-1]
    rows = grad_y.reshape(-1, grad_y.shape[-1])  # [rows, d_out]
    grad_z = grad_coeffs = grad_bias = None
    if ctx.needs_input_grad[0]:
        dense = _dense(mask, coeffs, n_atoms).to(grad_y.dtype)
        grad_z = (rows @ dense).view(z.shape)
    if ctx.needs_input_grad[2]:
        full = rows.T @ z.reshape(-1, n_atoms)  # [d_out, n_atoms]
        grad_coeffs = full[_positions(mask, n_atoms)].view(coeffs.shape).to(coeffs.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_z, None, grad_coeffs, grad_bias


def _packed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ANN401
    z, mask, codes, ctx.sparsity, ctx.code_format, scale, ctx.group, bias = inputs
    ctx.save_for_backward(z, mask, codes, scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _packed_backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
    z, mask, codes, scale = ctx.saved_tensors
    n_atoms = z.shape[-1]
    rows = grad_y.reshape(-1, grad_y.shape[-1])  # [rows, d_out]
    grad_z = grad_scale = grad_bias = None
    if ctx.needs_input_grad[0]:
        coeffs = decode_coeffs(codes, ctx.sparsity, ctx.code_format, scale, ctx.group)
        dense = coeffs if mask is None else _dense(mask, coeffs, n_atoms)
        grad_z = (rows @ dense.to(grad_y.dtype)).view(z.shape)
    if ctx.needs_input_grad[5]:
        full = (rows.T @ z.reshape(-1, n_atoms)).float()  # [d_out, n_atoms]
        grad_coeffs = full if mask is None else full[_positions(mask, n_atoms)]
        ones = torch.ones_like(scale)
        fields = decode_coeffs(codes, ctx.sparsity, ctx.code_format, ones, ctx.group)
        grad_fields = grad_coeffs.view(fields.shape) * fields
        grad_scale = _group_sums(grad_fields, ctx.group, scale.shape[1]).to(scale.dtype)
    if ctx.needs_input_grad[7]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_z, None, None, None, None, grad_scale, None, grad_bias


def _group_sums(values: torch.Tensor, group: int, n_groups: int) -> torch.Tensor:
    """Sums [d_out, n_groups] over `group` consecutive columns of [d_out, sparsity]; over all of them if 0."""
    if group == 0:
        return values.sum(1, keepdim=True)
    padding = n_groups * group - values.shape[1]
    return torch.nn.functional.pad(values, (0, padding)).unflatten(1, (n_groups, group)).sum(2)


def _register() -> None:
    """Define the operators once per process, also when this module is imported a second time."""
    namespace: Any = torch.ops.cospadi
    if hasattr(namespace, "sparse_gemm"):
        return
    library = torch.library.Library("cospadi", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, cpu, cuda, fake in (
        ("sparse_gemm", _cpu, ops_cuda.sparse_gemm, _fake),
        ("packed_gemm", _packed_cpu, ops_cuda.packed_gemm, _packed_fake),
        ("decode_coeffs", _decode_cpu, ops_cuda.decode_coeffs, _decode_fake),
    ):
        library.impl(name, cpu, "CPU")
        library.impl(name, cuda, "CUDA")
        torch.library.register_fake(f"cospadi::{name}", fake, lib=library)
    torch.library.register_autograd(
        "cospadi::sparse_gemm", _backward, setup_context=_setup_context, lib=library
    )
    torch.library.register_autograd(
        "cospadi::packed_gemm", _packed_backward, setup_context=_packed_setup_context, lib=library
    )
    # The registration ends with this object, so it must outlive a reloaded or re-imported module.
    namespace._library = library


_register()
