"""Rounding with error feedback against the reference, and what it promises on any problem."""

from __future__ import annotations

import itertools

import pytest
import torch

from cospadi import native
from cospadi.errors import InputError
from cospadi.native import round_code
from cospadi.reference import round_code_reference

# Atoms and coefficients around the vector widths (4, 8, 16 lanes), tiles and panels (8, 24, 32 rows).
SIZES = [
    (1, 1),
    (5, 1),
    (9, 4),
    (20, 8),
    (40, 15),
    (40, 17),
    (60, 23),
    (60, 25),
    (70, 33),
    (99, 65),
]
FULL_SIZES = [1, 3, 16, 17, 31, 32, 65]


def make_problem(n_atoms, sparsity, n_rows, *, group=0, decay=0.3, seed=0):
    """Correlated atoms of several lengths, random supports, steps that clamp a few coefficients at 7."""
    generator = torch.Generator().manual_seed(seed)
    dim = n_atoms + 5
    atoms = torch.randn(n_atoms, dim, generator=generator) * torch.arange(1, dim + 1) ** -decay
    atoms *= 0.3 + torch.rand(n_atoms, 1, generator=generator)
    order = torch.rand(n_rows, n_atoms, generator=generator).argsort(1)
    indices = order[:, :sparsity].sort(1).values.int()
    coeffs = torch.randn(n_rows, sparsity, generator=generator)
    n_groups = -(-sparsity // group) if group else 1
    steps = 0.2 + 0.2 * torch.rand(n_rows, n_groups, generator=generator)
    return atoms @ atoms.T, indices, coeffs, steps


def steps_of(coeffs, steps, group):
    return steps[:, torch.arange(coeffs.shape[1]) // (group or coeffs.shape[1])]


def plain(coeffs, steps, limit, group=0):
    """Integers without feedback."""
    return (coeffs / steps_of(coeffs, steps, group)).round().clamp(-limit, limit).int()


def objective(gram, indices, coeffs, steps, fields, group=0):
    """Float64 objective of every row."""
    error = coeffs.double() - steps_of(coeffs, steps, group).double() * fields
    if indices is None:
        return ((error @ gram.double()) * error).sum(1)
    dense = torch.zeros(coeffs.shape[0], gram.shape[0], dtype=torch.float64)
    dense.scatter_(1, indices.long(), error)
    return ((dense @ gram.double()) * dense).sum(1)


def assert_like_reference(gram, indices, coeffs, steps, limit, **options):
    """Equal fields in nearly all rows: rounding can push a coefficient over a half, and others then follow."""
    result = round_code(gram, indices, coeffs, steps, limit, with_errors=True, **options)
    fields, errors = round_code_reference(gram, indices, coeffs, steps, limit, **options)
    same = (result.fields == fields).all(1)
    assert same.double().mean() >= 0.8
    torch.testing.assert_close(result.errors.double()[same], errors[same], rtol=1e-4, atol=1e-6)
    own = objective(gram, indices, coeffs, steps, result.fields, options.get("group", 0))
    torch.testing.assert_close(result.errors.double(), own, rtol=1e-4, atol=1e-6)
    assert result.errors.double().mean() <= errors.mean() * 1.02
    assert result.n_raised == result.n_plain == 0


@pytest.mark.parametrize("order", ["energy", "index"])
@pytest.mark.parametrize("group", [0, 7, 1000])
@pytest.mark.parametrize(("n_atoms", "sparsity"), SIZES)
def test_equals_reference(n_atoms, sparsity, group, order):
    gram, indices, coeffs, steps = make_problem(n_atoms, sparsity, 12, group=group)
    for sweeps in (0, 2):
        assert_like_reference(
            gram, indices, coeffs, steps, 7, group=group, order=order, sweeps=sweeps
        )


@pytest.mark.parametrize("order", ["energy", "index"])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("n_atoms", FULL_SIZES)
def test_full_support_equals_reference(n_atoms, group, order):
    gram, indices, coeffs, steps = make_problem(
        n_atoms, n_atoms, 70 if n_atoms < 20 else 12, group=group
    )
    for sweeps in (0, 2):
        options = {"group": group, "order": order, "sweeps": sweeps}
        assert_like_reference(gram, None, coeffs, steps, 7, **options)
        listed = round_code(gram, indices, coeffs, steps, 7, **options)
        assert torch.equal(
            listed.fields, round_code(gram, None, coeffs, steps, 7, **options).fields
        )


@pytest.mark.parametrize("n_atoms", [4, 17, 40, 70])
@pytest.mark.parametrize("full", [True, False])
def test_exact_arithmetic_follows_the_formula_in_every_row(n_atoms, full):
    """A factor of small integers makes every step exact, halves included: ties go to the even integer."""
    generator = torch.Generator().manual_seed(n_atoms)
    lower = torch.randint(-1, 2, (n_atoms, n_atoms), generator=generator).double().tril(-1)
    lower += (2.0 ** torch.randint(0, 3, (n_atoms,), generator=generator)).diag()
    gram = torch.zeros(n_atoms + 1, n_atoms + 1)
    gram[:n_atoms, :n_atoms] = (lower @ lower.T).float()
    gram[n_atoms, n_atoms] = 1.0
    indices = torch.arange(n_atoms, dtype=torch.int32).repeat(40, 1)
    if full:
        gram, indices = gram[:n_atoms, :n_atoms], None
    coeffs = torch.randint(-40, 41, (40, n_atoms), generator=generator) / 8
    steps = torch.full((40, 1), 0.5)
    fields, errors = torch.zeros(2, 40, n_atoms, dtype=torch.float64)
    for j in reversed(range(n_atoms)):
        target = coeffs[:, j] + errors @ lower[:, j] / lower[j, j]
        fields[:, j] = (target / 0.5).round().clamp(-15, 15)
        errors[:, j] = coeffs[:, j] - 0.5 * fields[:, j]
    options = {"order": "index", "damping": 0.0, "sweeps": 0}
    result = round_code(gram, indices, coeffs, steps, 15, with_errors=True, **options)
    assert torch.equal(result.fields, fields.int())
    exact = (errors @ lower).square().sum(1)
    torch.testing.assert_close(result.errors.double(), exact, rtol=1e-5, atol=0.0)
    assert result.n_raised == result.n_plain == 0


@pytest.mark.parametrize("full", [True, False])
def test_orthogonal_atoms_are_rounded_one_by_one(full):
    gram = torch.diag(torch.rand(33) + 0.1)
    indices = torch.arange(30, dtype=torch.int32).repeat(20, 1)
    coeffs = torch.randint(-80, 81, (20, 33 if full else 30)) / 8
    steps = torch.full((20, 1), 0.25)
    result = round_code(gram, None if full else indices, coeffs, steps, 31)
    assert torch.equal(result.fields, plain(coeffs, steps, 31))
    assert result.n_moves == 0


@pytest.mark.parametrize("full", [True, False])
def test_energy_order_is_index_order_of_the_sorted_atoms(full):
    n_atoms = 45
    gram, indices, coeffs, steps = make_problem(n_atoms, n_atoms if full else 30, 60)
    order = gram.diagonal().argsort()
    rank = order.argsort()
    moved = rank[indices.long()].sort(1)
    options = {"sweeps": 0, "with_errors": True}
    by_energy = round_code(gram, indices, coeffs, steps, 7, order="energy", **options)
    by_index = round_code(
        gram[order][:, order].contiguous(),
        moved.values.int(),
        coeffs.gather(1, moved.indices),
        steps,
        7,
        order="index",
        **options,
    )
    assert torch.equal(by_energy.fields.gather(1, moved.indices), by_index.fields)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("limit", [1, 7, 127])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
def test_better_than_plain_rounding_and_sweeps_never_hurt(decay, limit, full):
    sparsity = 60 if full else 40
    gram, indices, coeffs, _ = make_problem(60, sparsity, 50, decay=decay)
    steps = coeffs.abs().amax(1, keepdim=True) / limit
    indices = None if full else indices
    before = objective(gram, indices, coeffs, steps, plain(coeffs, steps, limit))
    errors = [
        round_code(gram, indices, coeffs, steps, limit, sweeps=sweeps, with_errors=True).errors
        for sweeps in (0, 1, 2, 3, 50)
    ]
    assert errors[0].double().mean() < before.mean()
    for fewer, more in itertools.pairwise(errors):
        assert (more <= fewer * (1 + 1e-5)).all()


@pytest.mark.parametrize("full", [True, False])
def test_no_single_change_gains_after_the_last_sweep(full):
    gram, indices, coeffs, steps = make_problem(40, 40 if full else 25, 20, decay=0.6)
    indices = None if full else indices
    fields = round_code(gram, indices, coeffs, steps, 7, sweeps=1000).fields
    best = objective(gram, indices, coeffs, steps, fields)
    for j in range(coeffs.shape[1]):
        for change in (-1, 1):
            other = fields.clone()
            other[:, j] = (other[:, j] + change).clamp(-7, 7)
            assert (objective(gram, indices, coeffs, steps, other) >= best * (1 - 1e-4)).all()


def test_zero_coefficients():
    gram, indices, _, steps = make_problem(40, 20, 9)
    for support in (indices, None):
        zeros = torch.zeros(9, 20 if support is not None else 40)
        result = round_code(gram, support, zeros, steps, 7, with_errors=True)
        assert not result.fields.any()
        assert not result.errors.any()


@pytest.mark.parametrize("full", [True, False])
def test_limit_is_kept(full):
    gram, indices, coeffs, steps = make_problem(40, 40 if full else 25, 30)
    for scale in (1e3, 1e30):
        result = round_code(gram, None if full else indices, coeffs * scale, steps, 5)
        assert result.fields.abs().max() == 5


@pytest.mark.parametrize("full", [True, False])
def test_rank_deficient_gram_raises_the_ridge_and_says_so(full):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(60, 20, generator=generator)
    atoms[7] = 0
    gram = atoms @ atoms.T
    _, indices, coeffs, steps = make_problem(60, 60 if full else 40, 30)
    support = None if full else indices
    result = round_code(gram, support, coeffs, steps, 7, damping=0.0, sweeps=0, with_errors=True)
    assert result.n_raised == 30
    assert result.n_plain == 0
    before = objective(gram, support, coeffs, steps, plain(coeffs, steps, 7))
    assert result.errors.double().mean() < before.mean()
    damped = round_code(gram, support, coeffs, steps, 7, damping=0.01)
    assert damped.n_raised == 0


@pytest.mark.parametrize("full", [True, False])
def test_hopeless_gram_is_rounded_plainly_and_counted(full):
    _, indices, coeffs, steps = make_problem(40, 40 if full else 25, 30)
    result = round_code(
        torch.zeros(40, 40), None if full else indices, coeffs, steps, 7, with_errors=True
    )
    assert (result.n_raised, result.n_plain, result.n_moves) == (0, 30, 0)
    assert torch.equal(result.fields, plain(coeffs, steps, 7))
    assert not result.errors.any()


def test_only_the_rows_that_need_it_are_raised():
    gram = torch.eye(6)
    gram[0, 1] = gram[1, 0] = 1.0
    indices = torch.tensor([[0, 2], [0, 1], [1, 5]], dtype=torch.int32)
    coeffs = torch.full((3, 2), 0.6)
    result = round_code(gram, indices, coeffs, torch.ones(3, 1), 7, damping=0.0)
    assert (result.n_raised, result.n_plain) == (1, 0)
    assert result.fields[1].sum() == 1  # 0.6 + 0.6 in one direction


@pytest.mark.parametrize("full", [True, False])
def test_threads_and_company_change_nothing(full):
    gram, indices, coeffs, steps = make_problem(70, 70 if full else 30, 150, group=8)
    support = None if full else indices
    options = {"group": 8, "with_errors": True}
    first = round_code(gram, support, coeffs, steps, 7, num_threads=1, **options)
    for threads in (2, 3):
        other = round_code(gram, support, coeffs, steps, 7, num_threads=threads, **options)
        assert torch.equal(other.fields, first.fields)
        assert torch.equal(other.errors, first.errors)
        assert other.n_moves == first.n_moves
    rows = slice(3, 140, 5)
    some = None if full else support[rows]
    part = round_code(gram, some, coeffs[rows], steps[rows], 7, **options)
    assert torch.equal(part.fields, first.fields[rows])
    assert torch.equal(part.errors, first.errors[rows])


def test_layouts():
    gram, indices, coeffs, steps = make_problem(40, 20, 9, group=4)
    expected = round_code(gram, indices, coeffs, steps, 7, group=4).fields
    wide = torch.full((40, 50), torch.nan)
    wide[:, :40] = gram

    def scattered(tensor):
        return tensor.T.contiguous().T

    result = round_code(
        wide[:, :40], scattered(indices), scattered(coeffs), scattered(steps), 7, group=4
    )
    assert torch.equal(result.fields, expected)


def test_no_rows():
    result = round_code(torch.eye(4), None, torch.empty(0, 4), torch.empty(0, 1), 7)
    assert result.fields.shape == (0, 4)
    assert result.errors is None


def test_workspace_does_not_grow_with_the_rows():
    gram, indices, coeffs, steps = make_problem(64, 32, 40)
    few = round_code(gram, indices[:2], coeffs[:2], steps[:2], 7, num_threads=1)
    many = round_code(gram, indices, coeffs, steps, 7, num_threads=1)
    assert few.workspace_bytes == many.workspace_bytes


def with_value(tensor, position, value):
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gram": torch.eye(4)[:3]}, r"gram: expected shape \[3, 3\], got \[3, 4\]"),
        ({"gram": torch.eye(4).double()}, "gram: expected float32, got float64"),
        ({"gram": with_value(torch.eye(4), (1, 2), torch.inf)}, r"gram: element \[1, 2\] is not"),
        ({"gram": -torch.eye(4)}, "gram: diagonal element 0 is negative"),
        ({"indices": torch.tensor([[0, 4], [0, 1]]).int()}, r"indices: element \[0, 1\] is 4"),
        ({"indices": torch.tensor([[0, 1], [-1, 1]]).int()}, r"indices: element \[1, 0\] is -1"),
        ({"indices": torch.tensor([[0, 1], [2, 2]]).int()}, r"\[1, 1\] is 2; expected strictly"),
        ({"indices": torch.tensor([[0, 1], [1, 2]])}, "indices: expected int32, got int64"),
        ({"indices": torch.zeros(2, 1).int()}, r"indices: expected shape \[2, 2\], got \[2, 1\]"),
        ({"indices": None}, r"coeffs: expected shape \[\*, 4\], got \[2, 2\]"),
        ({"coeffs": torch.ones(2, 5)}, "coeffs: expected 1 to n_atoms = 4 columns, got 5"),
        ({"coeffs": torch.ones(2, 0)}, "coeffs: expected 1 to n_atoms = 4 columns, got 0"),
        ({"coeffs": with_value(torch.ones(2, 2), (1, 0), torch.nan)}, r"coeffs: element \[1, 0\]"),
        ({"steps": torch.ones(2, 2)}, r"steps: expected shape \[2, 1\], got \[2, 2\]"),
        ({"group": 1}, r"steps: expected shape \[2, 2\], got \[2, 1\]"),
        ({"steps": torch.tensor([[1.0], [0.0]])}, r"steps: element \[1, 0\] is not positive"),
        ({"steps": torch.tensor([[-1.0], [1.0]])}, r"steps: element \[0, 0\] is not positive"),
        ({"steps": torch.tensor([[1.0], [torch.nan]])}, "steps: element .* is not finite"),
        ({"limit": 0}, "limit: expected 1 to 1048576, got 0"),
        ({"limit": 1 << 21}, "limit: expected 1 to 1048576, got 2097152"),
        ({"group": -1}, "group: expected 0 to"),
        ({"sweeps": -1}, "sweeps: expected 0 to"),
        ({"damping": -0.1}, "damping: expected a finite number of at least 0"),
        ({"damping": float("nan")}, "damping: expected a finite number of at least 0"),
        ({"order": "random"}, "order: expected 'energy' or 'index', got 'random'"),
        ({"num_threads": 0}, "num_threads: expected at least 1"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments = {
        "gram": torch.eye(4),
        "indices": torch.tensor([[0, 1], [1, 3]], dtype=torch.int32),
        "coeffs": torch.ones(2, 2),
        "steps": torch.ones(2, 1),
        "limit": 7,
    } | change
    with pytest.raises(InputError, match=message):
        round_code(**arguments)


def test_limit_of_the_binding_is_the_one_stated():
    from cospadi.native.round_code import MAX_ROUND_LIMIT

    coeffs = torch.tensor([[float(MAX_ROUND_LIMIT)], [-3e9]])
    result = round_code(torch.eye(1), None, coeffs, torch.ones(2, 1), MAX_ROUND_LIMIT)
    assert result.fields.tolist() == [[MAX_ROUND_LIMIT], [-MAX_ROUND_LIMIT]]
    assert native.round_code is round_code
