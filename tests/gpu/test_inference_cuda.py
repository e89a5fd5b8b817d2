"""Inference on a GPU: every operator and layer against the CPU, compiled, in graphs and on several streams."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_models import KINDS, kind_factor
from packed_problems import make_packed
from sparse_problems import FLOATS, assert_close, make_problem

from cospadi import native, ops, ops_cuda
from cospadi.model.layers import CospadiLinear
from cospadi.native import cuda

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.runtime_info()["cuda_built"]),
    reason="needs a CUDA device, torch with CUDA and a build with CUDA",
)

ROWS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 100)
SIZES = ((1, 1, 1), (33, 17, 9), (130, 5, 61), (1048, 37, 524), (2016, 64, 1008), (4300, 9, 900))
"""n_atoms, d_out, sparsity."""

FORMS = (("bfloat14", 0), ("int8", 0), ("int6", 0), ("int5", 0), ("int4", 0), ("int3", 0))
GROUPED = (("int8", 64), ("int4", 5), ("int3", 16))


def to_cuda(arguments):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments]


def assert_exact(y, expected, rows):
    """Compare to the bit; but torch's product of many rows may round partial sums."""
    if rows <= ops_cuda.MAX_KERNEL_ROWS:
        assert torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_sparse_gemm_is_exact_on_integers(rows, size):
    n_atoms, d_out, sparsity = size
    for dtype in FLOATS:
        for coeffs_dtype in FLOATS:
            problem = make_problem(
                rows, n_atoms, d_out, sparsity, dtype=dtype, coeffs_dtype=coeffs_dtype, exact=True
            )
            expected = ops.sparse_gemm(*problem)
            poison = torch.full_like(expected, torch.nan, device="cuda")
            del poison
            assert_exact(ops.sparse_gemm(*to_cuda(problem)).cpu(), expected, rows)


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("dtype", FLOATS)
def test_sparse_gemm_rounds_once(rows, dtype):
    problem = make_problem(rows, 2016, 300, 1008, dtype=dtype, coeffs_dtype=dtype)
    y = ops.sparse_gemm(*to_cuda(problem)).cpu()
    if dtype is torch.float32 and rows > ops_cuda.MAX_KERNEL_ROWS:
        torch.testing.assert_close(y, ops.sparse_gemm(*problem), rtol=1e-2, atol=1e-1)
        return  # torch's own product, whose precision is torch's setting
    if rows <= ops_cuda.MAX_KERNEL_ROWS:
        assert_close(y, *problem)


@pytest.mark.parametrize("way", ["few", "tensor"])
@pytest.mark.parametrize("rows", [1, 3, 8, 11, 16, 40])
def test_each_kernel(way, rows):
    for dtype in (torch.bfloat16, torch.float16):
        z, mask, coeffs, bias = to_cuda(
            make_problem(rows, 700, 130, 350, dtype=dtype, coeffs_dtype=dtype, exact=True)
        )
        code = cuda.sparse_code_cuda("test", 700, mask, coeffs)
        for first in (z, z[:, :300].contiguous(), z[:, :301]):
            n_first = first.shape[1]
            second = None if n_first == 700 else z[:, n_first:]
            y = cuda.code_gemm_cuda("test", first, second, code, bias, way=way)
            expected = ops.sparse_gemm(z.cpu(), mask.cpu(), coeffs.cpu(), bias.cpu())
            assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("form", FORMS + GROUPED)
@pytest.mark.parametrize("all_atoms", [False, True])
def test_packed_gemm_is_exact_on_integers(form, all_atoms):
    name, group = form
    for n_atoms, d_out, sparsity in SIZES:
        for rows in ROWS:
            for dtype in FLOATS:
                problem = make_packed(
                    rows,
                    n_atoms,
                    d_out,
                    sparsity,
                    name,
                    group=group,
                    all_atoms=all_atoms,
                    dtype=dtype,
                    exact=True,
                )
                expected = ops.packed_gemm(*problem)
                result = ops.packed_gemm(*to_cuda(problem)).cpu()
                assert_exact(result, expected, rows)


@pytest.mark.parametrize("form", FORMS + GROUPED)
def test_decode_coeffs(form):
    name, group = form
    problem = make_packed(1, 300, 50, 150, name, group=group)[2:7]
    decoded = ops.decode_coeffs(*to_cuda(problem)).cpu()
    assert torch.equal(decoded, ops.decode_coeffs(*problem))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (2048, 1048), (8192, 1436), (65, 33), (300, 8)])
def test_dense_gemm(rows, shape):
    d_in, n_atoms = shape
    for dtype in FLOATS:
        x = torch.randint(-2, 3, (rows, d_in)).to(dtype)
        d = torch.randint(-2, 3, (d_in, n_atoms)).to(dtype)
        y = cuda.dense_gemm_cuda("test", x.cuda(), d.cuda())
        assert torch.equal(y.cpu(), (x.double() @ d.double()).to(dtype))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [1, 4, 20, 100])
def test_layers(name, rows):
    torch.manual_seed(0)
    factor = kind_factor(KINDS[name], 64, 40, torch.randn(40))
    layer = CospadiLinear.from_factor(factor, dtype=torch.bfloat16)
    on_cuda = copy.deepcopy(layer).cuda()
    x = torch.randn(rows, 64).bfloat16()
    expected = layer(x).double()
    with torch.no_grad():
        result = on_cuda(x.cuda()).cpu().double()
    assert (result - expected).norm() <= 0.01 * expected.norm()
    tracked = on_cuda(x.cuda())  # the way with gradients
    assert (tracked.cpu().double() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("rows", [2, 50])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(rows, grad):
    inputs = to_cuda(make_problem(rows, 33, 17, 9))
    if grad:
        inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    torch.library.opcheck(torch.ops.cospadi.sparse_gemm.default, tuple(inputs))
    packed = to_cuda(make_packed(rows, 40, 7, 12, "int4", group=4))
    torch.library.opcheck(torch.ops.cospadi.packed_gemm.default, tuple(packed))
    torch.library.opcheck(torch.ops.cospadi.decode_coeffs.default, tuple(packed[2:7]))
    z, mask, coeffs, bias = (t.detach() for t in inputs)
    arguments = (z, None, None, True, mask, coeffs, 9, None, None, 0, bias)
    torch.library.opcheck(torch.ops.cospadi.linear.default, arguments)


def test_gradients():
    problem = make_problem(6, 40, 17, 12)
    packed = make_packed(6, 40, 7, 12, "int4", group=4)
    for device in ("cpu", "cuda"):
        z, mask, coeffs, bias = (t.to(device) for t in problem)
        leaves = [t.detach().requires_grad_() for t in (z, coeffs, bias)]
        ops.sparse_gemm(leaves[0], mask, leaves[1], leaves[2]).square().sum().backward()
        grads = [t.grad.cpu() for t in leaves]
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in packed]
        for i in (0, 5, 7):
            arguments[i] = arguments[i].float().detach().requires_grad_()
        ops.packed_gemm(*arguments).square().sum().backward()
        grads += [arguments[i].grad.cpu() for i in (0, 5, 7)]
        if device == "cpu":
            expected = grads
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    factor = kind_factor(KINDS["plain"], 64, 40, torch.randn(40))
    layer = CospadiLinear.from_factor(factor, dtype=torch.bfloat16).cuda()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (1, 3, 20, 100):
            x = torch.randn(rows, 64, device="cuda").bfloat16()
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_graph_capture(rows):
    factor = kind_factor(KINDS["plain"], 64, 40, torch.randn(40))
    layer = CospadiLinear.from_factor(factor, dtype=torch.bfloat16).cuda()
    x = torch.randn(rows, 64, device="cuda").bfloat16()
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.copy_(torch.randn(rows, 64))
            graph.replay()
            assert torch.equal(y, layer(x))


def test_two_streams():
    """Work on one stream is not ordered by the other, and each sees its own inputs."""
    problem = to_cuda(make_problem(4, 2016, 2048, 1008, dtype=torch.bfloat16, exact=True))
    z, rest = problem[0], problem[1:]
    expected = [ops.sparse_gemm(z * k, *rest) for k in (1, -1)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(ops.sparse_gemm(z * (1, -1)[i], *rest))
    torch.cuda.synchronize()
    for i in range(2):
        for y in results[i]:
            assert torch.equal(y, expected[i])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_device_of_the_tensors_is_used():
    problem = make_problem(3, 130, 40, 61, exact=True)
    with torch.cuda.device(0):
        y = ops.sparse_gemm(*(t.to("cuda:1") for t in problem))
        assert torch.cuda.current_device() == 0
    assert torch.equal(y.cpu(), ops.sparse_gemm(*problem))
