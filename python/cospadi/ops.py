"""The column-sparse product as a torch operator: `torch.compile`, autograd and export see one op.

``torch.ops.cospadi.sparse_gemm(z, mask, coeffs, bias)`` is defined when this module is imported.
The contract is this file: schema, fake (shapes only), one implementation per device, gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from cospadi import native
from cospadi.errors import CudaUnavailableError

__all__ = ["sparse_gemm"]

_SCHEMA = "sparse_gemm(Tensor z, Tensor mask, Tensor coeffs, Tensor? bias) -> Tensor"


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
        Wrong dtype or shape (CPU).
    CudaUnavailableError
        `z` is a CUDA tensor: this version has no CUDA kernel.

    Notes
    -----
    Differentiable in `z`, `coeffs` and `bias`; the gradient expands S to a dense matrix. Sums are
    in float32 and rounded once to the dtype of `z`.
    """
    result: torch.Tensor = torch.ops.cospadi.sparse_gemm(z, mask, coeffs, bias)
    return result


def _cpu(
    z: torch.Tensor, mask: torch.Tensor, coeffs: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return native.sparse_gemm(z, mask, coeffs, bias)


def _cuda(
    z: torch.Tensor, mask: torch.Tensor, coeffs: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    raise CudaUnavailableError(
        f"sparse_gemm: z is on {z.device}, but this version has CPU kernels only; "
        "move the model to the CPU with model.to('cpu')"
    )


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


def _register() -> None:
    """Define the operator once per process, also when this module is imported a second time."""
    namespace: Any = torch.ops.cospadi
    if hasattr(namespace, "sparse_gemm"):
        return
    library = torch.library.Library("cospadi", "FRAGMENT")
    library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("sparse_gemm", _cpu, "CPU")
    library.impl("sparse_gemm", _cuda, "CUDA")
    torch.library.register_fake("cospadi::sparse_gemm", _fake, lib=library)
    torch.library.register_autograd(
        "cospadi::sparse_gemm", _backward, setup_context=_setup_context, lib=library
    )
    # The registration ends with this object, so it must outlive a reloaded or re-imported module.
    namespace._library = library


_register()
