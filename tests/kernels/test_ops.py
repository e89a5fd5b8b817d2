"""The torch operator: opcheck, gradients, torch.compile with free shapes, errors."""

from __future__ import annotations

import importlib

import pytest
import torch
from sparse_problems import FLOATS, assert_close, dense_of, make_problem

from cospadi import ops
from cospadi.errors import InputError

OP = "cospadi::sparse_gemm"


@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,), (2, 0), (1, 1, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_batch_shapes(shape, dtype):
    z, mask, coeffs, bias = make_problem(
        torch.Size(shape).numel(), 33, 17, 9, dtype=dtype, coeffs_dtype=torch.bfloat16
    )
    y = ops.sparse_gemm(z.view(*shape, 33), mask, coeffs, bias)
    assert y.shape == (*shape, 17)
    assert y.is_contiguous()
    assert_close(y.view(-1, 17), z, mask, coeffs, bias)


def test_non_contiguous_z():
    z, mask, coeffs, bias = make_problem(30, 33, 17, 9)
    expected = ops.sparse_gemm(z, mask, coeffs, bias)
    batched = z.view(5, 6, 33)
    permuted = ops.sparse_gemm(batched.transpose(0, 1), mask, coeffs, bias)
    assert torch.equal(permuted.transpose(0, 1).reshape(30, 17), expected)
    scattered = torch.empty(30, 66)
    scattered[:, ::2] = z
    assert torch.equal(ops.sparse_gemm(scattered[:, ::2], mask, coeffs, bias), expected)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(shape, with_bias, grad):
    z, mask, coeffs, bias = make_problem(torch.Size(shape).numel(), 33, 17, 9)
    inputs = [z.view(*shape, 33), mask, coeffs, bias if with_bias else None]
    if grad:
        inputs = [
            t.requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs
        ]
    torch.library.opcheck(torch.ops.cospadi.sparse_gemm.default, tuple(inputs))


@pytest.mark.parametrize("shape", [(4,), (2, 3), (0,)])
def test_gradients(shape):
    z, mask, coeffs, bias = make_problem(torch.Size(shape).numel(), 40, 17, 12)
    z = z.view(*shape, 40)
    leaves = [t.requires_grad_() for t in (z, coeffs, bias)]
    indices = dense_of(mask, torch.arange(1, 13).expand(17, 12), 40).T.nonzero()[:, 1].view(17, 12)
    dense = torch.zeros(17, 40).scatter(1, indices, coeffs)
    grad = torch.randn(*shape, 17)
    expected = torch.autograd.grad(z @ dense.T + bias, leaves, grad)
    result = torch.autograd.grad(ops.sparse_gemm(z, mask, coeffs, bias), leaves, grad)
    for got, wanted, leaf in zip(result, expected, leaves, strict=True):
        assert got.shape == leaf.shape
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_gradients_keep_each_dtype():
    z, mask, coeffs, bias = make_problem(
        4, 40, 17, 12, dtype=torch.bfloat16, coeffs_dtype=torch.float32
    )
    leaves = [t.requires_grad_() for t in (z, coeffs, bias)]
    ops.sparse_gemm(z, mask, coeffs, bias).sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.bfloat16, torch.float32, torch.bfloat16]


class Layer(torch.nn.Module):
    """The product between two other operations, as in a model."""

    def __init__(self):
        super().__init__()
        _, mask, coeffs, bias = make_problem(1, 33, 17, 9)
        self.register_buffer("mask", mask)
        self.coeffs = torch.nn.Parameter(coeffs)
        self.bias = torch.nn.Parameter(bias)

    def forward(self, x):
        """Scale, multiply, activate."""
        return torch.relu(ops.sparse_gemm(2 * x, self.mask, self.coeffs, self.bias)) + 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile(backend, dynamic):
    if backend == "inductor" and dynamic is None:
        pytest.skip("one run of the C++ compiler is enough")
    torch._dynamo.reset()
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in ((4, 33), (7, 33), (1, 33), (0, 33), (2, 5, 33), (3, 9, 33)):
        x = torch.randn(*shape)
        torch.testing.assert_close(compiled(x), layer(x))
    x = torch.randn(6, 33, requires_grad=True)
    compiled(x).sum().backward()
    other = x.detach().clone().requires_grad_()
    layer(other).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)


def test_sequence_length_does_not_recompile():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Layer(), fullgraph=True, backend=backend, dynamic=True)
    for rows in (4, 5, 64, 129):
        compiled(torch.randn(rows, 33))
    assert len(graphs) == 1


def test_export():
    program = torch.export.export(
        Layer(), (torch.randn(4, 33),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},)
    )
    names = [str(node.target) for node in program.graph.nodes]
    assert "cospadi.sparse_gemm.default" in names
    x = torch.randn(9, 33)
    torch.testing.assert_close(program.module()(x), Layer()(x))


def test_importing_again_keeps_the_operator():
    before = torch.ops.cospadi.sparse_gemm.default
    importlib.reload(ops)
    assert torch.ops.cospadi.sparse_gemm.default is before
    z, mask, coeffs, bias = make_problem(2, 33, 17, 9)
    assert ops.sparse_gemm(z, mask, coeffs, bias).shape == (2, 17)


def test_meta_tensors():
    z, mask, coeffs, bias = (t.to("meta") for t in make_problem(6, 33, 17, 9))
    y = ops.sparse_gemm(z.view(2, 3, 33), mask, coeffs, bias)
    assert y.device.type == "meta"
    assert y.shape == (2, 3, 17)
    with pytest.raises(RuntimeError, match="coeffs: expected 3 rows, got 17"):
        ops.sparse_gemm(z, mask[:3], coeffs, bias)
    with pytest.raises(RuntimeError, match="5 bytes per row do not match 48 atoms"):
        ops.sparse_gemm(torch.empty(2, 48, device="meta"), mask, coeffs, bias)


def test_wrong_arguments():
    z, mask, coeffs, bias = make_problem(2, 33, 17, 9)
    with pytest.raises(InputError, match=r"mask: expected shape \[17, 6\], got \[17, 5\]"):
        ops.sparse_gemm(torch.zeros(2, 41), mask, coeffs, bias)
    with pytest.raises(InputError, match="z: expected float32"):
        ops.sparse_gemm(z.double(), mask, coeffs, bias)
    with pytest.raises(InputError, match="z: expected shape"):
        ops.sparse_gemm(torch.zeros(()), mask, coeffs, bias)
