"""Native functions whatever torch's defaults are.

Servers build and run models with another default dtype (vLLM: the model's) or device. What a kernel writes to is
allocated on our side; with the default's size it would write beyond it.
"""

from __future__ import annotations

import pytest
import torch
from packed_problems import make_packed
from sparse_problems import make_problem, random_indices

from cospadi import native

ROWS, ATOMS, OUT, SPARSITY = 3, 96, 80, 40

NO_TENSORS = {"has_cuda_kernels", "runtime_info"}
OPERATORS = {"gradient_step", "project_rows"}
"""torch makes their results, from their inputs."""


def calls():
    """Return a call of every function; its inputs exist already."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    z, mask, coeffs, bias = make_problem(ROWS, ATOMS, OUT, SPARSITY)
    indices = random_indices(generator, OUT, ATOMS, SPARSITY)
    packed = make_packed(ROWS, ATOMS, OUT, SPARSITY, "int4", group=16)
    _, _, codes, _, _, scale, group, _ = packed
    atoms = torch.nn.functional.normalize(draw(24, 16))
    gram, signals = atoms @ atoms.T, draw(10, 16)
    correlations, energies = signals @ atoms.T, signals.square().sum(1)
    few, few_coeffs = random_indices(generator, 10, 24, 5), draw(10, 5)
    x = draw(4 * ATOMS, ATOMS)
    input_gram, steps = x.T @ x, torch.full((OUT, 1), 0.1)
    integers = torch.randint(-7, 8, (OUT, SPARSITY), generator=generator).int()
    fields = native.pack_fields(integers, 4)
    dictionary, all_coeffs = draw(ATOMS, 8), draw(OUT, 8)

    def update_atoms():
        changed, codes_of = atoms.clone(), few_coeffs.clone()
        native.update_atoms(changed, signals, few, codes_of)
        return changed, codes_of

    def omp_encode():
        found = native.omp_encode(gram, correlations, 5, signal_energies=energies)
        return found.indices, found.coeffs, found.residual_energies

    def round_code():
        found = native.round_code(input_gram, indices, coeffs, steps, 7, with_errors=True)
        return found.fields, found.errors

    return {
        "decode_coeffs": lambda: native.decode_coeffs(codes, SPARSITY, "int4", scale, group),
        "gemm": lambda: native.gemm(x, input_gram),
        "linear": lambda: native.linear(
            z, dictionary, None, False, None, all_coeffs, 8, None, None, 0, None
        ),
        "omp_encode": omp_encode,
        "pack_fields": lambda: native.pack_fields(integers, 4),
        "pack_mask": lambda: native.pack_mask(indices, ATOMS),
        "packed_gemm": lambda: native.packed_gemm(*packed),
        "round_code": round_code,
        "select_largest": lambda: native.select_largest(z.abs(), 7),
        "sparse_gemm": lambda: native.sparse_gemm(z, mask, coeffs, bias),
        "unpack_fields": lambda: native.unpack_fields(fields, SPARSITY, 4, signed=True),
        "unpack_mask": lambda: native.unpack_mask(mask, ATOMS, SPARSITY),
        "update_atoms": update_atoms,
        "validate_mask": lambda: native.validate_mask(mask, ATOMS, SPARSITY),
    }


def test_every_function_is_called():
    functions = {name for name in native.__all__ if name[0].islower()}
    assert functions - NO_TENSORS - OPERATORS == calls().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", calls())
def test_results_do_not_depend_on_the_defaults(name, dtype, device):
    call = calls()[name]
    expected = call()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = call()
    finally:
        torch.set_default_dtype(default)
    if not isinstance(expected, tuple):
        expected, found = (expected,), (found,)
    for a, b in zip(expected, found, strict=True):
        assert a is b is None or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
