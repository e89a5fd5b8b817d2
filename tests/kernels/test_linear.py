"""A whole projection in one call: against float64, every form and dtype; errors; the torch operator."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from packed_problems import coeffs_of, make_packed
from sparse_problems import FLOATS, TOLERANCE, make_problem

from cospadi import linear_op, native, ops
from cospadi.errors import InputError
from cospadi.reference import linear_reference

FORMS = [None, *native.CODE_FORMATS]


def make_linear(
    rows,
    d_in,
    n_atoms,
    d_out,
    *,
    has_identity=True,
    code_format=None,
    group=0,
    int8_atoms=False,
    all_atoms=False,
    dtype=torch.float32,
    seed=0,
):
    """Return the arguments of `linear`, and the dictionary and coefficients they stand for in float64."""
    generator = torch.Generator().manual_seed(seed)
    total = n_atoms + (d_in if has_identity else 0)
    sparsity = total if all_atoms else (total + 1) // 2
    x = torch.randn(rows, d_in, generator=generator).to(dtype)
    dictionary = scale = values = None
    if n_atoms and int8_atoms:
        dictionary = torch.randint(-127, 128, (n_atoms, d_in), generator=generator).to(torch.int8)
        scale = (0.001 + 0.01 * torch.rand(n_atoms, generator=generator)).bfloat16()
        values = (dictionary.double() * scale.double().unsqueeze(1)).T
    elif n_atoms:
        dictionary = (torch.randn(d_in, n_atoms, generator=generator) / d_in**0.5).to(dtype)
        values = dictionary.double()
    if code_format is None:
        _, mask, coeffs, bias = make_problem(1, total, d_out, sparsity, dtype=dtype, seed=seed)
        coeffs = coeffs.to(dtype)
        mask, form, exact = None if all_atoms else mask, (sparsity, None, None, 0), coeffs.double()
    else:
        packed = make_packed(
            1, total, d_out, sparsity, code_format, group=group, all_atoms=all_atoms, dtype=dtype
        )
        _, mask, coeffs, sparsity, _, coeffs_scale, group, bias = packed
        form, exact = (sparsity, code_format, coeffs_scale, group), coeffs_of(packed)
    return (x, dictionary, scale, has_identity, mask, coeffs, *form, bias), values, exact


def assert_matches(y, arguments, dictionary, coeffs):
    """Compare with float64; one step of z's dtype in each product x D is allowed for."""
    x, mask, bias = arguments[0], arguments[4], arguments[-1]
    expected = linear_reference(x, dictionary, arguments[3], mask, coeffs, bias)
    magnitude = linear_reference(
        x.abs(), None if dictionary is None else dictionary.abs(), arguments[3], mask,
        coeffs.abs(), bias.abs(),
    )  # fmt: skip
    assert y.dtype == x.dtype
    error = (y.double() - expected).abs()
    assert (error <= 3 * TOLERANCE[x.dtype] * magnitude + 1e-30).all()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 9, 40])
@pytest.mark.parametrize("d_in", [1, 31, 33, 100])
def test_matches_the_reference(rows, d_in):
    for n_atoms, d_out, has_identity in itertools.product(
        (0, 1, 32, 33, 300), (1, 17), (True, False)
    ):
        arguments, dictionary, coeffs = make_linear(
            rows, d_in, n_atoms, d_out, has_identity=has_identity
        )
        assert_matches(native.linear(*arguments, num_threads=1), arguments, dictionary, coeffs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("code_format", FORMS)
@pytest.mark.parametrize("int8_atoms", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 12])
def test_every_stored_form(dtype, code_format, int8_atoms, rows):
    for all_atoms, group in ((False, 0), (True, 0), (False, 16)):
        if group and (code_format is None or not native.CODE_FORMATS[code_format].has_scale):
            continue
        arguments, dictionary, coeffs = make_linear(
            rows,
            70,
            45,
            33,
            code_format=code_format,
            group=group,
            int8_atoms=int8_atoms,
            all_atoms=all_atoms,
            dtype=dtype,
        )
        assert_matches(native.linear(*arguments), arguments, dictionary, coeffs)


def test_dtypes_may_differ():
    arguments, _, coeffs = make_linear(3, 70, 45, 33)
    x, atoms, *rest = arguments
    mixed = (x.bfloat16(), atoms.half(), *rest)
    assert_matches(native.linear(*mixed), mixed, atoms.half().double(), coeffs)


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_thread_count_changes_no_bit(rows):
    arguments, _, _ = make_linear(rows, 700, 1500, 900, dtype=torch.bfloat16)
    first = native.linear(*arguments, num_threads=1)
    for threads in (2, 3, 5):
        assert torch.equal(native.linear(*arguments, num_threads=threads), first)


def test_layouts():
    arguments, _, _ = make_linear(4, 65, 40, 20, dtype=torch.bfloat16)
    x, dictionary, *rest = arguments
    expected = native.linear(*arguments)
    wide = torch.full((4, 80), float("nan"), dtype=x.dtype)
    wide[:, 7:72] = x
    assert torch.equal(native.linear(wide[:, 7:72], dictionary, *rest), expected)
    assert torch.equal(native.linear(x.T.contiguous().T, dictionary, *rest), expected)
    assert torch.equal(native.linear(x, dictionary.T.contiguous().T, *rest), expected)
    batched = native.linear(x.view(2, 2, 65), dictionary, *rest)
    assert torch.equal(batched.view(4, 20), expected)


WRONG = {
    "x": (0, torch.zeros(()), r"x: expected shape \[..., d_in\], got a scalar"),
    "x dtype": (0, torch.zeros(2, 33, dtype=torch.float64), "x: expected float32"),
    "dictionary": (
        1,
        torch.zeros(32, 10),
        r"dictionary: expected shape \[33, \*\], got \[32, 10\]",
    ),
    "scale": (2, torch.zeros(10), "dictionary: expected int8, got float32"),
    "identity": (3, False, r"mask: expected shape \[19, 2\], got \[19, 6\]"),
    "mask": (4, None, "sparsity: expected all 43 atoms without a mask, got 22"),
    "sparsity": (6, 21, r"coeffs: expected shape \[\*, 21\]"),
    "format": (7, "int7", "code_format: expected one of"),
    "coeffs_scale": (8, torch.ones(19, 1), "expected None and 0 for floating-point"),
    "bias": (10, torch.zeros(18), r"bias: expected shape \[19\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    arguments, _, _ = make_linear(2, 33, 10, 19)
    place, value, message = WRONG[name]
    changed = [*arguments]
    changed[place] = value
    with pytest.raises(InputError, match=message):
        native.linear(*changed)


def test_scale_without_a_dictionary():
    arguments, _, _ = make_linear(2, 33, 0, 19)
    with pytest.raises(InputError, match="dictionary_scale: expected None without a dictionary"):
        native.linear(*arguments[:2], torch.ones(3), *arguments[3:])


@pytest.mark.parametrize("code_format", [None, "int4"])
@pytest.mark.parametrize("int8_atoms", [False, True])
@pytest.mark.parametrize("all_atoms", [False, True])
@pytest.mark.parametrize("rows", [2, 20])
def test_opcheck(code_format, int8_atoms, all_atoms, rows):
    arguments, _, _ = make_linear(
        rows, 40, 12, 17, code_format=code_format, int8_atoms=int8_atoms, all_atoms=all_atoms
    )
    torch.library.opcheck(torch.ops.cospadi.linear.default, arguments)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("beyond", [0, 1])
@pytest.mark.parametrize("few", [linear_op.FEW_ROWS, linear_op.FEW_PAIRED_ROWS])
def test_few_and_many_rows_agree(few, beyond, dtype):
    arguments, dictionary, coeffs = make_linear(few + beyond, 70, 45, 33, dtype=dtype)
    assert_matches(linear_op.linear(*arguments), arguments, dictionary, coeffs)


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("all_atoms", [False, True])
@pytest.mark.parametrize(
    "rows", [linear_op.FEW_ROWS + 1, linear_op.FEW_PAIRED_ROWS + 1, linear_op.FEW_HALF_ROWS + 1]
)
def test_whatever_torch_is_fast_at(rows, all_atoms, dtype, is_slow, monkeypatch):
    monkeypatch.setattr(linear_op, "HALVES_ARE_SLOW", is_slow)
    arguments, dictionary, coeffs = make_linear(rows, 70, 45, 33, all_atoms=all_atoms, dtype=dtype)
    assert_matches(linear_op.linear(*arguments), arguments, dictionary, coeffs)


def test_gradients_go_through_the_parts():
    arguments, _, _ = make_linear(3, 40, 12, 17)
    x, dictionary, _, _, mask, coeffs, *_, bias = arguments
    leaves = [t.requires_grad_() for t in (x, dictionary, coeffs, bias)]
    y = linear_op.linear(*arguments)
    got = torch.autograd.grad(y.sum(), leaves)
    z = torch.cat((x, x @ dictionary), dim=1)
    wanted = torch.autograd.grad(ops.sparse_gemm(z, mask, coeffs, bias).sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(linear_op.linear(*arguments), y)


def test_compiled_as_one_node():
    arguments, _, _ = make_linear(3, 40, 12, 17)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: linear_op.linear(x, *arguments[1:]), fullgraph=True, backend=backend, dynamic=True
    )
    for rows in (3, 4, 30):
        x = torch.randn(rows, 40)
        assert torch.equal(compiled(x), linear_op.linear(x, *arguments[1:]))
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["cospadi.linear"]


@pytest.mark.parametrize("is_slow", [False, True])
def test_compiled_with_gradients(is_slow, monkeypatch):
    monkeypatch.setattr(linear_op, "HALVES_ARE_SLOW", is_slow)
    arguments, _, _ = make_linear(9, 40, 12, 17, dtype=torch.bfloat16)
    x = arguments[0].requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: linear_op.linear(x, *arguments[1:]), fullgraph=True, backend="aot_eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = compiled(x)
    wanted = linear_op.linear(*arguments)
    torch.testing.assert_close(got, wanted)
    for one, other in zip(
        torch.autograd.grad(got.sum(), x), torch.autograd.grad(wanted.sum(), x), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_another_dtype_than_the_dictionary():
    arguments, _, _ = make_linear(3, 40, 12, 17)
    for rows in (3, 30):
        with pytest.raises((InputError, RuntimeError), match="dtype"):
            linear_op.linear(torch.zeros(rows, 40, dtype=torch.bfloat16), *arguments[1:])
