"""A compressed projection as one torch operator, ``torch.ops.cospadi.linear``, for inference.

Where gradients are asked for, `linear` composes the differentiable operators of `cospadi.ops` instead.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F

from cospadi import native, ops, ops_cuda
from cospadi.errors import InputError

__all__ = ["linear"]

FEW_ROWS = 8
"""Up to this many rows one native call reads dictionary and coefficients once, as they are stored."""

FEW_PAIRED_ROWS = 16
"""The same for bfloat16, of which AVX-512 multiplies pairs."""

FEW_HALF_ROWS = 32
"""The same for 16-bit numbers where torch multiplies them slowly."""

HALVES_ARE_SLOW: bool = platform.machine().lower() in (
    "x86_64",
    "amd64",
) and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether torch multiplies 16-bit numbers slowly on this processor; a constant, which torch.compile can read.

Without AVX-512 its 16-bit products on x86 run at 2 to 10 GFLOP/s per core, in float32 at 90 (docs/results.md).
"""

_SCHEMA = (
    "linear(Tensor x, Tensor? dictionary, Tensor? dictionary_scale, bool has_identity, "
    "Tensor? mask, Tensor coeffs, SymInt sparsity, str? code_format, Tensor? coeffs_scale, "
    "int group, Tensor? bias) -> Tensor"
)


def linear(
    x: torch.Tensor,
    dictionary: torch.Tensor | None,
    dictionary_scale: torch.Tensor | None,
    has_identity: bool,
    mask: torch.Tensor | None,
    coeffs: torch.Tensor,
    sparsity: int,
    code_format: str | None = None,
    coeffs_scale: torch.Tensor | None = None,
    group: int = 0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a compressed projection: ``y = z @ S + bias`` with ``z = x @ D``, or ``[x ; x @ D]``.

    Parameters
    ----------
    x : torch.Tensor
        ``[..., d_in]`` float32, bfloat16 or float16, any batch shape (also empty), any strides.
    dictionary : torch.Tensor, optional
        Learned atoms: ``[d_in, n_atoms]`` in the dtype of `x`; or, with `dictionary_scale`, int8 ``[n_atoms, d_in]``.
    dictionary_scale : torch.Tensor, optional
        ``[n_atoms]`` float32, bfloat16 or float16.
    has_identity : bool
        The inputs are atoms, before the learned ones.
    mask, coeffs, sparsity, code_format, coeffs_scale, group, bias
        As in `cospadi.ops.packed_gemm`; floating-point coefficients ``[d_out, sparsity]`` where `code_format` is None,
        which without a mask have the dtype of `x`.

    Returns
    -------
    torch.Tensor
        ``[..., d_out]``, dtype and device of `x`, contiguous.

    Raises
    ------
    InputError
        Wrong dtype, device or shape.
    CudaUnavailableError
        `x` is a CUDA tensor, and this build has no CUDA kernels.

    Notes
    -----
    Differentiable as its parts are. Without gradients and for at most `FEW_ROWS` rows (`FEW_PAIRED_ROWS`,
    `FEW_HALF_ROWS`) on the CPU it is one native call.
    """
    arguments = (
        x, dictionary, dictionary_scale, has_identity, mask, coeffs, sparsity, code_format,
        coeffs_scale, group, bias,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad
        for t in (x, dictionary, dictionary_scale, coeffs, coeffs_scale, bias)
    ):
        return _composed(*arguments)
    result: torch.Tensor = torch.ops.cospadi.linear(*arguments)
    return result


def _composed(
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
    """The projection by the products it is made of."""
    z = x
    if dictionary is not None:
        products = _dictionary_products(x, dictionary, dictionary_scale)
        z = torch.cat((x, products), dim=-1) if has_identity else products
    if code_format is not None:
        return ops.packed_gemm(z, mask, coeffs, sparsity, code_format, coeffs_scale, group, bias)
    if mask is not None:
        return ops.sparse_gemm(z, mask, coeffs, bias)
    if _is_slow(z):
        return F.linear(z.float(), coeffs.float(), None if bias is None else bias.float()).to(
            z.dtype
        )
    return F.linear(z, coeffs, bias)


def _dictionary_products(
    x: torch.Tensor, dictionary: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    if scale is None:
        return (x.float() @ dictionary.float()).to(x.dtype) if _is_slow(x) else x @ dictionary
    return ops.packed_gemm(
        x, None, dictionary.view(torch.uint8), x.shape[-1], "int8", scale.unsqueeze(1)
    )


def _is_slow(x: torch.Tensor) -> bool:
    """Whether torch multiplies numbers of this type faster after making them float32.

    Sums are in float32 either way, and the result is rounded once.
    """
    return HALVES_ARE_SLOW and x.device.type == "cpu" and x.dtype != torch.float32


def _few_rows(x: torch.Tensor) -> int:
    if _is_slow(x):
        return FEW_HALF_ROWS
    return FEW_PAIRED_ROWS if x.dtype == torch.bfloat16 else FEW_ROWS


def _cpu(
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
    if dictionary is not None and dictionary_scale is None and dictionary.dtype != x.dtype:
        raise InputError(
            f"linear: dictionary: expected the dtype of x, {x.dtype}, got {dictionary.dtype}; "
            "cast the model with model.to(dtype)"
        )
    width = x.shape[-1] if x.dim() else 0
    run = native.linear if x.numel() <= _few_rows(x) * width else _composed
    return run(
        x, dictionary, dictionary_scale, has_identity, mask, coeffs, sparsity, code_format,
        coeffs_scale, group, bias,
    )  # fmt: skip


def _fake(
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
    torch._check(x.dim() >= 1, lambda: f"linear: x: expected [..., d_in], got {x.shape}")
    d_in = x.shape[-1]
    n_atoms = 0
    if dictionary is not None:
        inputs, atoms = (0, 1) if dictionary_scale is None else (1, 0)
        torch._check(
            dictionary.dim() == 2 and dictionary.shape[inputs] == d_in,
            lambda: f"linear: dictionary: expected {d_in} inputs, got {dictionary.shape}",
        )
        n_atoms = dictionary.shape[atoms]
    z = x.new_empty((*x.shape[:-1], n_atoms + d_in if has_identity else n_atoms))
    if code_format is not None:
        return torch.ops.cospadi.packed_gemm(
            z, mask, coeffs, sparsity, code_format, coeffs_scale, group, bias
        )
    if mask is None:
        return F.linear(z, coeffs.to(z.dtype), None if bias is None else bias.to(z.dtype))
    return torch.ops.cospadi.sparse_gemm(z, mask, coeffs, bias)


def _register() -> None:
    """Define the operator once per process, also when this module is imported a second time."""
    namespace: Any = torch.ops.cospadi
    if hasattr(namespace, "linear"):
        return
    library = torch.library.Library("cospadi", "FRAGMENT")
    library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("linear", _cpu, "CPU")
    library.impl("linear", ops_cuda.linear, "CUDA")
    torch.library.register_fake("cospadi::linear", _fake, lib=library)
    # The registration ends with this object, so it must outlive a reloaded or re-imported module.
    namespace._linear_library = library


_register()
