"""The CUDA side of the operators on a machine without a GPU.

Its kernels are replaced by CPU kernels that read the same addresses, so that everything around them is what runs on a
GPU: checks, panels of the workspace, parts of z, the choice by number of rows. The kernels themselves are tested by
emulation (tests/cpp/test_cuda_*.cpp), and all of it on a GPU in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch
from packed_problems import make_packed
from sparse_problems import make_problem

from cospadi import _C, linear_op, ops, ops_cuda
from cospadi.errors import CudaUnavailableError, InputError, NativeError
from cospadi.native import cuda


def cpu_product(z, code, bias=None):
    """Multiply on the CPU by the matrix at the addresses that a CUDA kernel would get."""
    (n_atoms, d_out, sparsity, mask, mask_bytes, values, value_bytes, kind, bits, *rest) = (
        code.arguments
    )
    z = z.contiguous()
    y = z.new_empty((z.shape[0], d_out))
    dtype = cuda.FLOAT_CODES[z.dtype]
    bias_arguments = (0, 0) if bias is None else (bias.data_ptr(), cuda.FLOAT_CODES[bias.dtype])
    first = (z.data_ptr(), dtype, z.shape[0], n_atoms, n_atoms, mask, mask_bytes, values)
    if kind < 3:
        assert value_bytes == sparsity * bits // 8
        _C.sparse_gemm(*first, kind, d_out, sparsity, *bias_arguments, y.data_ptr(), 1)
    else:
        form = (d_out, value_bytes, sparsity, int(kind == 4), bits, *rest)
        _C.packed_gemm(*first, *form, *bias_arguments, y.data_ptr(), 1)
    return y


@pytest.fixture
def calls(monkeypatch):
    """Kernels on the CPU, and the names of those that were called."""
    names = []

    def gemm(function, first, second, code, bias, way="auto"):
        names.append("gemm")
        return cpu_product(first if second is None else torch.cat((first, second), 1), code, bias)

    def dense(function, x, dictionary):
        assert x.shape[0] <= cuda.MAX_DENSE_ROWS
        names.append("dense")
        return x @ dictionary

    def expand(function, code, dtype):
        names.append("expand")
        return cpu_product(torch.eye(code.n_atoms), code).T.to(dtype).contiguous()

    monkeypatch.setattr(cuda, "require_cuda", lambda *_: None)
    monkeypatch.setattr(cuda, "code_gemm_cuda", gemm)
    monkeypatch.setattr(cuda, "dense_gemm_cuda", dense)
    monkeypatch.setattr(cuda, "expand_cuda", expand)
    monkeypatch.setattr(
        cuda, "decode_cuda", lambda _, code: cpu_product(torch.eye(code.n_atoms), code).T
    )
    return names


ROWS = (0, 1, ops_cuda.MAX_KERNEL_ROWS, ops_cuda.MAX_KERNEL_ROWS + 1, 100)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("coeffs_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparse_gemm(calls, monkeypatch, rows, coeffs_dtype):
    monkeypatch.setattr(ops_cuda, "WORKSPACE_BYTES", 5 * 33 * 4)  # panels of five outputs
    z, mask, coeffs, bias = make_problem(rows, 33, 17, 9, coeffs_dtype=coeffs_dtype, exact=True)
    for b in (None, bias):
        y = ops_cuda.sparse_gemm(z, mask, coeffs, b)
        assert torch.equal(y, ops.sparse_gemm(z, mask, coeffs, b))
    assert calls == (["gemm"] * 2 if rows <= ops_cuda.MAX_KERNEL_ROWS else ["expand"] * 8)
    batched = ops_cuda.sparse_gemm(z.unsqueeze(0), mask, coeffs, bias)
    assert batched.shape == (1, rows, 17)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", [("bfloat14", 0), ("int8", 0), ("int5", 4), ("int4", 16)])
@pytest.mark.parametrize("all_atoms", [False, True])
def test_packed_gemm(calls, monkeypatch, rows, form, all_atoms):
    monkeypatch.setattr(ops_cuda, "WORKSPACE_BYTES", 1)  # one output at a time
    name, group = form
    problem = make_packed(rows, 40, 7, 12, name, group=group, all_atoms=all_atoms, exact=True)
    y = ops_cuda.packed_gemm(*problem)
    assert torch.equal(y, ops.packed_gemm(*problem))
    assert calls == (["gemm"] if rows <= ops_cuda.MAX_KERNEL_ROWS else ["expand"] * 7)


@pytest.mark.parametrize("form", [("bfloat14", 0), ("int8", 0), ("int5", 4)])
def test_decode_coeffs(calls, form):
    name, group = form
    _, _, codes, sparsity, code_format, scale, group, _ = make_packed(
        1, 40, 7, 12, name, group=group
    )
    decoded = ops_cuda.decode_coeffs(codes, sparsity, code_format, scale, group)
    expected = ops.decode_coeffs(codes, sparsity, code_format, scale, group)
    torch.testing.assert_close(decoded, expected, rtol=1e-6, atol=0)


def layer_arguments(kind, rows):
    """Return the arguments of `linear_op.linear` for a layer of d_in = 24, 16 atoms and 10 outputs."""
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (rows, 24)).float()
    n_identity = 24 if "identity" in kind else 0
    dictionary = torch.randint(-2, 3, (24, 16)).float()
    scale = None
    if "int8" in kind:
        dictionary = torch.randint(-5, 6, (16, 24)).to(torch.int8)
        scale = 2.0 ** torch.randint(-1, 2, (16,))
    if "alone" in kind:
        dictionary = None
    total = n_identity + (0 if dictionary is None else 16)
    if "packed" in kind:
        _, mask, codes, sparsity, name, coeffs_scale, group, bias = make_packed(
            1, total, 10, 7, "int4", group=4, exact=True
        )
        form = (mask, codes, sparsity, name, coeffs_scale, group, bias)
    elif "full" in kind:
        coeffs = torch.randint(-2, 3, (10, total)).float()
        form = (None, coeffs, total, None, None, 0, torch.ones(10))
    else:
        _, mask, coeffs, bias = make_problem(1, total, 10, 7, exact=True)
        form = (mask, coeffs, 7, None, None, 0, bias)
    return (x, dictionary, scale, n_identity > 0, *form)


KINDS = (
    "plain",
    "identity",
    "identity alone",
    "packed",
    "packed identity",
    "int8",
    "int8 packed identity",
    "full",
    "full identity",
)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_linear(calls, monkeypatch, kind, rows):
    monkeypatch.setattr(ops_cuda, "WORKSPACE_BYTES", 500)
    arguments = layer_arguments(kind, rows)
    y = ops_cuda.linear(*arguments)
    assert torch.equal(y, linear_op.linear(*arguments))
    if rows == 1 and kind in ("plain", "identity", "packed", "packed identity"):
        assert calls == ["dense", "gemm"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 5])
def test_linear_is_an_operator(kind, rows):
    torch.library.opcheck(torch.ops.cospadi.linear.default, layer_arguments(kind, rows))


def test_messages_without_cuda_in_the_build(monkeypatch):
    """Called as the dispatcher would: the messages must not need a GPU to be tested."""
    monkeypatch.setattr(_C, "cuda_built", lambda: False)
    monkeypatch.setattr(_C, "cuda_unavailable_reason", lambda: "built without CUDA")
    pattern = r"{}: expected CPU tensors, got one on cpu: this cospadi was built without CUDA.*model.to\('cpu'\)"
    z, mask, coeffs, bias = make_problem(2, 33, 17, 9)
    with pytest.raises(CudaUnavailableError, match=pattern.format("sparse_gemm")):
        ops_cuda.sparse_gemm(z, mask, coeffs, bias)
    problem = make_packed(2, 33, 17, 9, "int8")
    with pytest.raises(CudaUnavailableError, match=pattern.format("packed_gemm")):
        ops_cuda.packed_gemm(*problem)
    with pytest.raises(CudaUnavailableError, match=pattern.format("decode_coeffs")):
        ops_cuda.decode_coeffs(*problem[2:7])
    with pytest.raises(CudaUnavailableError, match=pattern.format("linear")):
        ops_cuda.linear(*layer_arguments("plain", 1))


@pytest.mark.skipif(not _C.cuda_built() or _C.cuda_device_count() > 0, reason="needs CUDA, no GPU")
def test_a_machine_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(cuda, "_index", lambda _: 0)
    monkeypatch.setattr(cuda, "_stream", lambda _: 0)
    with pytest.raises(NativeError, match="sparse_gemm: cudaGetDevice"):
        ops_cuda.sparse_gemm(*make_problem(2, 33, 17, 9))


def test_checks(calls):
    z, mask, coeffs, bias = make_problem(2, 33, 17, 9)
    with pytest.raises(InputError, match="mask: expected shape"):
        ops_cuda.sparse_gemm(z, mask[:5], coeffs, bias)
    with pytest.raises(InputError, match="coeffs: expected float32 or"):
        ops_cuda.sparse_gemm(z, mask, coeffs.double(), bias)
    with pytest.raises(InputError, match="s = 9 is more than the 8 atoms"):
        ops_cuda.sparse_gemm(z[:, :8], mask[:, :1], coeffs, bias)
    problem = list(make_packed(2, 40, 7, 12, "int4", group=4))
    for index, value, match in (
        (3, 13, "codes: expected shape"),
        (4, "int7", "code_format: expected one of"),
        (5, None, "scale: int4 needs scales"),
        (6, -1, "group: expected 0"),
        (1, None, "expected all 40 atoms of z without a mask, got 12"),
    ):
        wrong = list(problem)
        wrong[index] = value
        with pytest.raises(InputError, match=match):
            ops_cuda.packed_gemm(*wrong)
    wrong = list(make_packed(2, 40, 7, 12, "bfloat14"))
    wrong[5] = torch.ones(7, 1)
    with pytest.raises(InputError, match="bfloat14 has no scales"):
        ops_cuda.packed_gemm(*wrong)


def test_kernel_entries_check_what_they_are_given():
    z, mask, coeffs, bias = make_problem(2, 33, 17, 9)
    code = cuda.sparse_code_cuda("f", 33, mask, coeffs)
    with pytest.raises(InputError, match="f: z: expected 33 columns, got 32"):
        cuda.code_gemm_cuda("f", z[:, :32], None, code, bias)
    with pytest.raises(InputError, match="f: z: expected bfloat16"):
        cuda.code_gemm_cuda("f", z[:, :30].bfloat16(), z[:, 30:], code, bias)
    with pytest.raises(InputError, match="f: bias: expected shape"):
        cuda.code_gemm_cuda("f", z, None, code, bias[:3])
    with pytest.raises(InputError, match="f: dictionary: expected float32, got bfloat16"):
        cuda.dense_gemm_cuda("f", z, torch.zeros(33, 4).bfloat16())
