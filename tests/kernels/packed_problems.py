"""Problems of the product with packed coefficients."""

from __future__ import annotations

import torch
from sparse_problems import random_indices

from cospadi import native
from cospadi.reference import coeffs_of_fields_reference

SCALED = [name for name, form in native.CODE_FORMATS.items() if form.has_scale]


def random_fields(generator, rows, n, code_format, *, exact=False):
    """Return int32 [rows, n]: fields of every value the format allows, or of small integers."""
    form = native.CODE_FORMATS[code_format]
    if form.has_scale:
        largest = 3 if exact else 2 ** (form.bits - 1) - 1
        return torch.randint(-largest, largest + 1, (rows, n), generator=generator).int()
    values = torch.randn(rows, n, generator=generator)
    if exact:
        values = torch.randint(-3, 4, (rows, n), generator=generator)
    return (values.bfloat16().view(torch.int16).int() & 0xFFFF) >> (16 - form.bits)


def make_packed(
    rows,
    n_atoms,
    d_out,
    sparsity,
    code_format,
    *,
    group=0,
    all_atoms=False,
    dtype=torch.float32,
    exact=False,
    seed=0,
):
    """Return the arguments of `packed_gemm`; with `exact`, sums that no dtype rounds."""
    form = native.CODE_FORMATS[code_format]
    generator = torch.Generator().manual_seed(seed)
    mask = None
    if all_atoms:
        sparsity = n_atoms
    else:
        mask = native.pack_mask(random_indices(generator, d_out, n_atoms, sparsity), n_atoms)
    fields = random_fields(generator, d_out, sparsity, code_format, exact=exact)
    scale = None
    if form.has_scale:
        n_groups = 1 if group == 0 else -(-sparsity // group)
        scale = 0.01 + torch.rand(d_out, n_groups, generator=generator)
        if exact:
            scale = 2.0 ** torch.randint(-1, 2, (d_out, n_groups), generator=generator)
        scale = scale.bfloat16()

    def draw(*shape):
        if exact:
            return torch.randint(-2, 3, shape, generator=generator).to(dtype)
        return torch.randn(*shape, generator=generator).to(dtype)

    codes = native.pack_fields(fields, form.bits)
    return draw(rows, n_atoms), mask, codes, sparsity, code_format, scale, group, draw(d_out)


def coeffs_of(problem):
    """Return the exact coefficients [d_out, sparsity], float64, from the fields by torch arithmetic."""
    _, _, codes, sparsity, code_format, scale, group, _ = problem
    form = native.CODE_FORMATS[code_format]
    fields = native.unpack_fields(codes, sparsity, form.bits, signed=form.has_scale)
    return coeffs_of_fields_reference(fields, form.bits, scale, group)


def full_mask(d_out, n_atoms):
    """Return the mask in which every output uses every atom."""
    return native.pack_mask(torch.arange(n_atoms, dtype=torch.int32).repeat(d_out, 1), n_atoms)
