"""Slow and obvious versions of the native kernels, in float64 and plain torch.

They define what `cospadi.native` computes and are what the tests compare with.
"""

from __future__ import annotations

import torch

__all__ = [
    "coeffs_of_fields_reference",
    "decode_coeffs_reference",
    "omp_encode_reference",
    "pack_fields_reference",
    "pack_mask_reference",
    "packed_gemm_reference",
    "round_code_reference",
    "select_largest_reference",
    "sparse_gemm_reference",
    "unpack_fields_reference",
    "unpack_mask_reference",
    "update_atoms_reference",
]


def pack_mask_reference(indices: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """Write the atoms of each output as bits.

    Parameters
    ----------
    indices : torch.Tensor
        ``[d_out, sparsity]`` integers, ascending per row.
    n_atoms : int
        Atoms of the dictionary.

    Returns
    -------
    torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8: bit ``a & 7`` of byte ``a >> 3``.
    """
    mask = torch.zeros((indices.shape[0], (n_atoms + 7) // 8), dtype=torch.uint8)
    for row, atoms in zip(mask, indices.tolist(), strict=True):
        for atom in atoms:
            row[atom >> 3] |= 1 << (atom & 7)
    return mask


def unpack_mask_reference(mask: torch.Tensor, n_atoms: int, sparsity: int) -> torch.Tensor:
    """Read the atoms of each output from its bits.

    Parameters
    ----------
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8.
    n_atoms, sparsity : int
        Atoms of the dictionary and bits set in every row.

    Returns
    -------
    torch.Tensor
        ``[d_out, sparsity]`` int32, ascending per row.
    """
    rows = [
        [atom for atom in range(n_atoms) if row[atom >> 3] >> (atom & 7) & 1]
        for row in mask.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32).reshape(mask.shape[0], sparsity)


def sparse_gemm_reference(
    z: torch.Tensor, mask: torch.Tensor, coeffs: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Expand S to a dense matrix and multiply: ``y = z @ S + bias``.

    Parameters
    ----------
    z : torch.Tensor
        ``[rows, n_atoms]``.
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8.
    coeffs : torch.Tensor
        ``[d_out, sparsity]`` ascending by atom.
    bias : torch.Tensor, optional
        ``[d_out]``.

    Returns
    -------
    torch.Tensor
        ``[rows, d_out]`` float64: the exact result up to float64 rounding.
    """
    indices = unpack_mask_reference(mask, z.shape[1], coeffs.shape[1]).long()
    dense = torch.zeros((coeffs.shape[0], z.shape[1]), dtype=torch.float64)  # S^T
    dense.scatter_(1, indices, coeffs.double())
    y = z.double() @ dense.T
    return y if bias is None else y + bias.double()


def pack_fields_reference(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Write each row of integers bit by bit.

    Parameters
    ----------
    values : torch.Tensor
        ``[rows, n]`` integers, taken modulo ``2^bits``.
    bits : int
        Bits per field.

    Returns
    -------
    torch.Tensor
        ``[rows, ceil(bits n / 8)]`` uint8: bit k of field j is bit ``bits j + k`` of the row, and bit ``i & 7`` of
        byte ``i >> 3`` is bit i of the row.
    """
    rows, n = values.shape
    packed = torch.zeros((rows, (bits * n + 7) // 8), dtype=torch.uint8)
    for row, fields in zip(packed, values.tolist(), strict=True):
        for j, field in enumerate(fields):
            for k in range(bits):
                row[(bits * j + k) >> 3] |= (field >> k & 1) << ((bits * j + k) & 7)
    return packed


def unpack_fields_reference(
    packed: torch.Tensor, n: int, bits: int, *, signed: bool
) -> torch.Tensor:
    """Read each row as one long integer and cut it into fields.

    Parameters
    ----------
    packed : torch.Tensor
        ``[rows, ceil(bits n / 8)]`` uint8.
    n, bits : int
        Fields per row, bits per field.
    signed : bool
        Two's complement, or 0 to ``2^bits - 1``.

    Returns
    -------
    torch.Tensor
        ``[rows, n]`` int32.
    """
    values = []
    for row in packed.tolist():
        number = int.from_bytes(bytes(row), "little")
        fields = [number >> (bits * j) & (2**bits - 1) for j in range(n)]
        is_negative = [signed and field >= 2 ** (bits - 1) for field in fields]
        values.append(
            [f - 2**bits if neg else f for f, neg in zip(fields, is_negative, strict=True)]
        )
    return torch.tensor(values, dtype=torch.int32).reshape(packed.shape[0], n)


def decode_coeffs_reference(
    codes: torch.Tensor, sparsity: int, bits: int, scale: torch.Tensor | None, group: int
) -> torch.Tensor:
    """Return the coefficients of packed fields.

    Parameters
    ----------
    codes : torch.Tensor
        ``[d_out, ceil(bits sparsity / 8)]`` uint8.
    sparsity, bits : int
        Fields per output, bits per field.
    scale : torch.Tensor or None
        ``[d_out, n_groups]``: fields are integers, field j times ``scale[:, j // group]`` (``scale[:, 0]`` if `group`
        is 0). None: fields are the upper bits of a bfloat16.
    group : int
        Fields that share a scale.

    Returns
    -------
    torch.Tensor
        ``[d_out, sparsity]`` float64, exact.
    """
    fields = unpack_fields_reference(codes, sparsity, bits, signed=scale is not None)
    return coeffs_of_fields_reference(fields, bits, scale, group)


def coeffs_of_fields_reference(
    fields: torch.Tensor, bits: int, scale: torch.Tensor | None, group: int
) -> torch.Tensor:
    """Return the coefficients of fields; see `decode_coeffs_reference`.

    Parameters
    ----------
    fields : torch.Tensor
        ``[d_out, sparsity]`` integers, signed if there is a `scale`.
    bits, scale, group
        As for `decode_coeffs_reference`.

    Returns
    -------
    torch.Tensor
        ``[d_out, sparsity]`` float64, exact.
    """
    if scale is None:
        return (fields.long() << (32 - bits)).to(torch.uint32).view(torch.float32).double()
    sparsity = fields.shape[1]
    group_of_field = torch.arange(sparsity) // (group or max(sparsity, 1))
    return fields.double() * scale.double()[:, group_of_field]


def packed_gemm_reference(
    z: torch.Tensor,
    mask: torch.Tensor | None,
    coeffs: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by decoded coefficients: ``y = z @ S + bias``.

    Parameters
    ----------
    z : torch.Tensor
        ``[rows, n_atoms]``.
    mask : torch.Tensor or None
        ``[d_out, ceil(n_atoms / 8)]`` uint8; None: every output uses every atom.
    coeffs : torch.Tensor
        ``[d_out, sparsity]`` as from `decode_coeffs_reference`.
    bias : torch.Tensor, optional
        ``[d_out]``.

    Returns
    -------
    torch.Tensor
        ``[rows, d_out]`` float64.
    """
    if mask is None:
        all_atoms = torch.arange(z.shape[1], dtype=torch.int32).repeat(coeffs.shape[0], 1)
        mask = pack_mask_reference(all_atoms, z.shape[1])
    return sparse_gemm_reference(z, mask, coeffs, bias)


def linear_reference(
    x: torch.Tensor,
    dictionary: torch.Tensor | None,
    has_identity: bool,
    mask: torch.Tensor | None,
    coeffs: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a compressed projection: ``y = z @ S + bias`` with ``z = x @ D``, or ``[x ; x @ D]``.

    Parameters
    ----------
    x : torch.Tensor
        ``[rows, d_in]``.
    dictionary : torch.Tensor or None
        ``[d_in, n_atoms]``.
    has_identity : bool
        The inputs are atoms, before the learned ones.
    mask, coeffs, bias
        As in `packed_gemm_reference`.

    Returns
    -------
    torch.Tensor
        ``[rows, d_out]`` float64; ``x @ D`` is rounded to the dtype of `x`, as the kernels do.
    """
    parts = [x] if has_identity else []
    if dictionary is not None:
        parts.append((x.double() @ dictionary.double()).to(x.dtype))
    z = torch.cat(parts, dim=1) if parts else x.new_empty((x.shape[0], 0))
    return packed_gemm_reference(z, mask, coeffs, bias)


def omp_encode_reference(
    gram: torch.Tensor,
    correlations: torch.Tensor,
    sparsity: int,
    *,
    signal_energies: torch.Tensor | None = None,
    selection: str = "omp",
    tolerance: float = 1e-10,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Orthogonal matching pursuit that solves the normal equations anew at every step.

    Parameters
    ----------
    gram : torch.Tensor
        ``[n_atoms, n_atoms]``.
    correlations : torch.Tensor
        ``[n_signals, n_atoms]``.
    sparsity : int
        Atoms per signal.
    signal_energies : torch.Tensor, optional
        ``[n_signals]`` squared norms.
    selection : {"omp", "ormp"}
        Score of atom j with correlation ``c_j = <d_j, r>``: ``c_j^2 / |d_j|^2``, or ``c_j^2 / |q_j|^2`` with
        ``q_j`` the part of the atom orthogonal to the chosen ones.
    tolerance : float
        Atoms with ``|q_j|^2 <= tolerance |d_j|^2`` are never chosen. When no other is left the lowest
        unused indices follow with coefficient 0.

    Returns
    -------
    indices, coeffs, residual_energies : torch.Tensor
        ``[n_signals, sparsity]`` int32 ascending, ``[n_signals, sparsity]`` float64, ``[n_signals]`` or None.
    """
    gram, correlations = gram.double(), correlations.double()
    n_atoms = gram.shape[0]
    diagonal = gram.diagonal()
    all_indices, all_coeffs, explained = [], [], []
    for p in correlations:
        support: list[int] = []
        x = torch.zeros(0, dtype=torch.float64)
        for _ in range(sparsity):
            g_ss = gram[support][:, support]
            g_sa = gram[support]
            residual_correlation = p - g_sa.T @ x
            orthogonal_energy = diagonal - (g_sa * torch.linalg.solve(g_ss, g_sa)).sum(0)
            is_allowed = orthogonal_energy > tolerance * diagonal
            is_allowed[support] = False
            if not is_allowed.any():
                break
            divisor = diagonal if selection == "omp" else orthogonal_energy
            score = torch.where(is_allowed, residual_correlation**2 / divisor, -1.0)
            support.append(int(score.argmax()))
            x = torch.linalg.solve(gram[support][:, support], p[support])
        explained.append(float(x @ p[support]))
        code = dict(zip(support, x.tolist(), strict=True))
        for atom in range(n_atoms):
            if len(code) < sparsity:
                code.setdefault(atom, 0.0)
        all_indices.append(sorted(code))
        all_coeffs.append([code[atom] for atom in sorted(code)])
    shape = (correlations.shape[0], sparsity)
    indices = torch.tensor(all_indices, dtype=torch.int32).reshape(shape)
    coeffs = torch.tensor(all_coeffs, dtype=torch.float64).reshape(shape)
    if signal_energies is None:
        return indices, coeffs, None
    residual = signal_energies.double() - torch.tensor(explained, dtype=torch.float64)
    return indices, coeffs, residual.clamp_min(0.0)


def select_largest_reference(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Sort every row.

    Parameters
    ----------
    scores : torch.Tensor
        ``[n, A]``, not NaN.
    count : int
        Scores kept per row.

    Returns
    -------
    torch.Tensor
        ``[n, count]`` int32 indices, ascending; equal scores are broken by the lowest index.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values.int()


def round_code_reference(
    gram: torch.Tensor,
    indices: torch.Tensor | None,
    coeffs: torch.Tensor,
    steps: torch.Tensor,
    limit: int,
    *,
    group: int = 0,
    order: str = "energy",
    damping: float = 1e-3,
    sweeps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round one coefficient after the other and solve for those that are left.

    With E what is fixed and F what is not, F moves to its least-squares place ``x_F + G_FF^-1 G_FE (x - step q)_E``
    before its last coefficient is rounded: the feedback of `cospadi.native.round_code` without a factorisation.

    Parameters
    ----------
    gram, indices, coeffs, steps, limit, group, order, damping, sweeps
        As for `cospadi.native.round_code`. A Gram that is not positive definite with this damping is an error.

    Returns
    -------
    fields, errors : torch.Tensor
        ``[n, s]`` int32 and ``[n]`` float64.
    """
    n, s = coeffs.shape
    all_steps = steps.double()[:, torch.arange(s) // (group or s)]
    fields = torch.zeros((n, s), dtype=torch.int32)
    errors = torch.zeros(n, dtype=torch.float64)
    for row in range(n):
        atoms = torch.arange(s) if indices is None else indices[row].long()
        g, x, step = gram.double()[atoms][:, atoms], coeffs[row].double(), all_steps[row]
        damped = g + damping * g.diagonal().mean() * torch.eye(s, dtype=torch.float64)
        order_fixed = list(range(s))[::-1]
        if order == "energy":
            order_fixed = g.diagonal().argsort(descending=True, stable=True).tolist()
        q, e = torch.zeros_like(x), torch.zeros_like(x)
        for count, j in enumerate(order_fixed):
            fixed, free = order_fixed[:count], order_fixed[count:]
            moved = torch.linalg.solve(damped[free][:, free], damped[free][:, fixed] @ e[fixed])
            q[j] = ((x[j] + moved[0]) / step[j]).round().clamp(-limit, limit)
            e[j] = x[j] - step[j] * q[j]
        for _ in range(sweeps):
            before = q.clone()
            for j in range(s):
                if g[j, j] > 0:
                    best = q[j] + (g[j] @ e / (step[j] * g[j, j])).round()
                    q[j] = best.clamp(-limit, limit)
                    e[j] = x[j] - step[j] * q[j]
            if torch.equal(q, before):
                break
        fields[row], errors[row] = q.int(), e @ g @ e
    return fields, errors


def update_atoms_reference(
    atoms: torch.Tensor,
    signals: torch.Tensor,
    indices: torch.Tensor,
    coeffs: torch.Tensor,
    *,
    power_iterations: int = 1,
    block_size: int = 64,
    sweeps: int = 1,
    unused: str = "skip",
) -> tuple[torch.Tensor, torch.Tensor]:
    """K-SVD with dense matrices; all atoms of a block see the same residual.

    A block that raises the objective is undone and halved; after four accepted blocks in a row the size doubles.
    ``power_iterations=0`` takes the first singular vectors of ``E``, with the sign that the power iteration tends to.

    Parameters
    ----------
    atoms : torch.Tensor
        ``[n_atoms, d]``; not changed.
    signals : torch.Tensor
        ``[n_signals, d]``.
    indices, coeffs : torch.Tensor
        ``[n_signals, sparsity]``; not changed.
    power_iterations, block_size, sweeps : int
        As for `cospadi.native.update_atoms`.
    unused : {"skip", "reseed"}
        Whether atoms that no signal uses become the residual direction of the worst coded signals.

    Returns
    -------
    atoms, coeffs : torch.Tensor
        The new ones, float64.
    """
    d, y = atoms.double().clone(), signals.double()
    x = torch.zeros(y.shape[0], d.shape[0], dtype=torch.float64)
    x.scatter_(1, indices.long(), coeffs.double())
    is_used = torch.zeros_like(x, dtype=torch.bool).scatter_(1, indices.long(), True)
    for _ in range(sweeps):
        first, limit, n_accepted = 0, block_size, 0
        while first < d.shape[0]:
            residual = y - x @ d
            block = range(first, min(first + limit, d.shape[0]))
            new_d, new_x = d.clone(), x.clone()
            for k in block:
                rows = is_used[:, k]
                error = residual[rows] + torch.outer(x[rows, k], d[k])
                if power_iterations == 0:
                    start = error.T @ x[rows, k]
                    if start.norm() > 0:
                        top = torch.linalg.svd(error, full_matrices=False).Vh[0]
                        new_d[k] = top if top @ start >= 0 else -top
                        new_x[rows, k] = error @ new_d[k]
                for _ in range(power_iterations):
                    candidate = error.T @ new_x[rows, k]
                    if candidate.norm() == 0:
                        break
                    new_d[k] = candidate / candidate.norm()
                    new_x[rows, k] = error @ new_d[k]
            new_objective = (y - new_x @ new_d).square().sum()
            if len(block) > 1 and new_objective > residual.square().sum():
                limit, n_accepted = len(block) // 2, 0
                continue
            d, x, first, n_accepted = new_d, new_x, block.stop, n_accepted + 1
            if n_accepted >= 4 and limit < block_size:
                limit, n_accepted = min(2 * limit, block_size), 0
    residual = y - x @ d
    if unused == "reseed":
        worst = residual.square().sum(1).argsort(descending=True, stable=True).tolist()
        for k, signal in zip((~is_used.any(0)).nonzero().flatten().tolist(), worst, strict=False):
            if residual[signal].norm() > 0:
                d[k] = residual[signal] / residual[signal].norm()
    return d, x.gather(1, indices.long())
