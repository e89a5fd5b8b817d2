"""The torch operators of packed coefficients: opcheck, gradients, torch.compile with free shapes, errors."""

from __future__ import annotations

import pytest
import torch
from packed_problems import coeffs_of, full_mask, make_packed
from sparse_problems import FLOATS, assert_close

from cospadi import native, ops
from cospadi.errors import InputError

FORMS = [("bfloat14", 0), ("int8", 0), ("int4", 4)]


def batched(problem, shape):
    """Return the problem with z [rows, n_atoms] as [*shape, n_atoms]."""
    z, *rest = problem
    return (z.view(*shape, z.shape[1]), *rest)


def with_grad(problem):
    """Return the problem with gradients asked for wherever there is one."""
    return tuple(
        t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in problem
    )


def make(rows, form, **options):
    return make_packed(rows, 33, 17, 9, form[0], group=form[1], **options)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_shapes(shape, dtype):
    problem = make(torch.Size(shape).numel(), ("int8", 0), dtype=dtype)
    y = ops.packed_gemm(*batched(problem, shape))
    assert y.shape == (*shape, 17)
    assert y.dtype == dtype
    z, mask, *_, bias = problem
    assert_close(y.view(-1, 17), z, mask, coeffs_of(problem), bias)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("all_atoms", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 3), (0,)])
def test_opcheck(shape, form, all_atoms, grad):
    problem = batched(make(torch.Size(shape).numel(), form, all_atoms=all_atoms), shape)
    arguments = with_grad(problem) if grad else problem
    torch.library.opcheck(torch.ops.cospadi.packed_gemm.default, arguments)
    torch.library.opcheck(torch.ops.cospadi.packed_gemm.default, (*arguments[:-1], None))
    torch.library.opcheck(torch.ops.cospadi.decode_coeffs.default, problem[2:7])


@pytest.mark.parametrize("all_atoms", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 3), (0,), (40,)])
def test_gradients(shape, form, all_atoms):
    """Against autograd through a dense matrix made of the fields and the scales."""
    problem = make(torch.Size(shape).numel(), form, all_atoms=all_atoms)
    z, mask, codes, sparsity, name, scale, group, bias = with_grad(batched(problem, shape))
    bits = native.CODE_FORMATS[name].bits
    if scale is None:
        coeffs = coeffs_of(problem).float()
    else:
        scale = scale.detach().float().requires_grad_()
        fields = native.unpack_fields(codes, sparsity, bits, signed=True)
        coeffs = fields * scale[:, torch.arange(sparsity) // (group or sparsity)]
    indices = native.unpack_mask(full_mask(17, 33) if mask is None else mask, 33, sparsity)
    dense = torch.zeros(17, 33).scatter(1, indices.long(), coeffs)
    leaves = [t for t in (z, scale, bias) if t is not None]
    grad = torch.randn(*shape, 17)
    expected = torch.autograd.grad(z @ dense.T + bias, leaves, grad)
    y = ops.packed_gemm(z, mask, codes, sparsity, name, scale, group, bias)
    for got, wanted, leaf in zip(
        torch.autograd.grad(y, leaves, grad), expected, leaves, strict=True
    ):
        assert got.shape == leaf.shape
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_keep_each_dtype():
    problem = with_grad(make(4, ("int4", 4), dtype=torch.float16))
    ops.packed_gemm(*problem).sum().backward()
    assert [t.grad.dtype for t in problem if isinstance(t, torch.Tensor) and t.requires_grad] == [
        torch.float16,
        torch.bfloat16,
        torch.float16,
    ]


@pytest.mark.parametrize("all_atoms", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_compile_with_free_row_count(form, all_atoms):
    torch._dynamo.reset()
    z, *rest = make(13, form, all_atoms=all_atoms)

    def layer(z):
        return 2 * ops.packed_gemm(z, *rest)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (1, 3, 13):
        part = z[:rows].clone().requires_grad_()
        y = compiled(part)
        torch.testing.assert_close(y, layer(part.detach()))
        (gradient,) = torch.autograd.grad(y.sum(), part)
        plain = part.detach().requires_grad_()
        torch.testing.assert_close(
            gradient, torch.autograd.grad(layer(plain).sum(), plain)[0], rtol=1e-5, atol=1e-5
        )


def test_meta_tensors():
    def to_meta(problem):
        return [t.to("meta") if isinstance(t, torch.Tensor) else t for t in problem]

    z, mask, codes, sparsity, name, scale, group, bias = to_meta(make(6, ("int4", 4)))
    y = ops.packed_gemm(z.view(2, 3, 33), mask, codes, sparsity, name, scale, group, bias)
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 3, 17), z.dtype)
    assert ops.decode_coeffs(codes, sparsity, name, scale, group).shape == (17, 9)
    for wrong, message in (
        ((z, mask[:3], codes, 9, name, scale, group, bias), r"mask: expected \[17, 5\]"),
        ((z, None, codes, 9, name, scale, group, bias), "expected all 33 atoms without a mask"),
        ((z, mask, codes, 12, name, scale, group, bias), "5 bytes per row do not match 12 x 4"),
        ((z, mask, codes, 9, name, scale, 0, bias), r"scale: expected \[17, 1\]"),
        ((z, mask, codes, 9, name, None, group, bias), "int4 needs scales"),
        ((z, mask, codes, 9, "int9", scale, group, bias), "code_format: expected one of"),
        ((z, mask, codes, 9, name, scale, group, bias[:3]), r"bias: expected \[17\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.packed_gemm(*wrong)


def test_wrong_arguments():
    z, *rest = make(2, ("int8", 0))
    with pytest.raises(InputError, match=r"mask: expected shape \[17, 6\], got \[17, 5\]"):
        ops.packed_gemm(torch.zeros(2, 41), *rest)
    with pytest.raises(InputError, match="z: expected float32"):
        ops.packed_gemm(z.double(), *rest)
