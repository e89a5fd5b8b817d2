"""Native kernels on torch tensors: the only module that imports the extension ``_C``.

Functions here check dtype, device and layout, pass addresses, and turn the extension's errors into cospadi's. Shapes
follow the learner's convention: signals and atoms are rows. Every function has a slow twin in `cospadi.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch

from cospadi import _C
from cospadi.errors import InputError, NativeError

__all__ = [
    "AtomUpdateStats",
    "OmpResult",
    "gemm",
    "omp_encode",
    "pack_mask",
    "runtime_info",
    "sparse_gemm",
    "unpack_mask",
    "update_atoms",
    "validate_mask",
]


@contextmanager
def _native_errors(function: str) -> Iterator[None]:
    """Map the extension's exceptions to cospadi's; MemoryError passes as it is."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{function}: {error}") from error
    except RuntimeError as error:
        raise NativeError(f"{function}: {error}") from error


def _check_tensor(
    function: str,
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    """Raise `InputError` unless `tensor` is a strided CPU tensor of this shape (None: any size) and dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(
            f"{function}: {name}: expected a torch.Tensor, got {type(tensor).__name__}"
        )
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise InputError(
            f"{function}: {name}: expected a strided CPU tensor, got {tensor.layout} on {tensor.device}; call .cpu()"
        )
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"{function}: {name}: expected {names}, got {str(tensor.dtype).removeprefix('torch.')}"
        )
    matches = tensor.dim() == len(shape) and all(
        wanted is None or wanted == got for wanted, got in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        wanted_text = ", ".join("*" if size is None else str(size) for size in shape)
        raise InputError(
            f"{function}: {name}: expected shape [{wanted_text}], got {list(tensor.shape)}"
        )


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` detached and with unit inner stride; a copy only where the layout asks for one."""
    tensor = tensor.detach()
    if (
        tensor.dim() == 2
        and tensor.numel() > 0
        and (tensor.stride(1) != 1 or tensor.stride(0) < tensor.shape[1])
    ):
        return tensor.contiguous()
    return tensor if tensor.dim() == 2 else tensor.contiguous()


def _row_stride(tensor: torch.Tensor) -> int:
    """Row stride in elements; a single row may carry any stride, so it gets its length."""
    return max(tensor.stride(0), tensor.shape[1]) if tensor.shape[0] > 1 else tensor.shape[1]


def _threads(num_threads: int | None) -> int:
    if num_threads is None:
        return torch.get_num_threads()
    if num_threads < 1:
        raise InputError(f"num_threads: expected at least 1 or None, got {num_threads}")
    return num_threads


def runtime_info() -> dict[str, Any]:
    """Describe this build and this machine.

    Returns
    -------
    dict
        ``version``, ``isa`` (in use), ``available_isas``, ``cuda_built``, ``cuda_devices``, ``openmp`` (default
        thread count).

    Raises
    ------
    InputError
        If the environment variable ``COSPADI_ISA`` names an instruction set that is not available here.
    """
    with _native_errors("runtime_info"):
        return {
            "version": _C.version(),
            "isa": _C.isa_name(),
            "available_isas": _C.available_isas(),
            "cuda_built": _C.cuda_built(),
            "cuda_devices": _C.cuda_device_count(),
            "openmp": _C.default_thread_count(),
        }


@dataclass(frozen=True)
class OmpResult:
    """Sparse codes of a batch of signals.

    Attributes
    ----------
    indices : torch.Tensor
        ``[n_signals, sparsity]`` int32, strictly ascending per row.
    coeffs : torch.Tensor
        ``[n_signals, sparsity]``, dtype of the inputs, in the order of `indices`.
    residual_energies : torch.Tensor or None
        ``[n_signals]`` squared residual norms; None without signal energies.
    n_padded : int
        Support entries filled at coefficient 0 because every remaining atom was dependent.
    workspace_bytes : int
        Memory held during the call, all threads together.
    n_passes, n_rows : int
        Passes over a history and history rows computed, summed over the signals; ``n_rows`` above
        ``n_signals * (sparsity - 1)`` is wasted speculation.
    """

    indices: torch.Tensor
    coeffs: torch.Tensor
    residual_energies: torch.Tensor | None
    n_padded: int
    workspace_bytes: int
    n_passes: int
    n_rows: int


def omp_encode(
    gram: torch.Tensor,
    correlations: torch.Tensor,
    sparsity: int,
    *,
    signal_energies: torch.Tensor | None = None,
    selection: Literal["omp", "ormp"] = "omp",
    num_threads: int | None = None,
    block_size: int = 0,
) -> OmpResult:
    """Code every signal with exactly `sparsity` atoms by orthogonal matching pursuit.

    ``argmin_x |y - D x|`` over the support that the greedy method builds one atom at a time.

    Parameters
    ----------
    gram : torch.Tensor
        ``[n_atoms, n_atoms]`` float32 or float64 on the CPU, ``D^T D``. Atoms need no unit norm.
    correlations : torch.Tensor
        ``[n_signals, n_atoms]``, same dtype; row n is ``D^T y_n``.
    sparsity : int
        Atoms per signal, ``1 <= sparsity <= n_atoms``.
    signal_energies : torch.Tensor, optional
        ``[n_signals]``, same dtype, ``|y_n|^2``; enables `OmpResult.residual_energies`.
    selection : {"omp", "ormp"}
        ``omp``: largest correlation with the residual per unit atom norm. ``ormp``: largest decrease of the
        error (orthogonal least squares; what SPAMS' ``omp`` does).
    num_threads : int, optional
        Default ``torch.get_num_threads()``.
    block_size : int
        History rows computed per pass, 0 chooses. It changes the speed only, 1 is the plain algorithm.

    Returns
    -------
    OmpResult
        Codes and statistics.

    Raises
    ------
    InputError
        Wrong dtype, device, shape or sparsity; a non-finite element of an input; a negative diagonal.
    MemoryError
        The workspace (about ``sparsity * n_atoms`` elements per thread) cannot be allocated.

    Notes
    -----
    Time about ``1.4 n_atoms sparsity^2`` flops per signal; memory independent of the number of signals. Equal
    scores are broken by the lowest index; the result is the same to the bit for any thread count and block size.

    References
    ----------
    Rubinstein, Zibulevsky, Elad: Efficient implementation of the K-SVD algorithm using Batch-OMP (2008);
    Zhu et al., Electronics 9 (2020) 1507, for the history recurrence.
    """
    name = "omp_encode"
    dtypes = (torch.float32, torch.float64)
    _check_tensor(name, "gram", gram, (None, None), dtypes)
    n_atoms = gram.shape[0]
    _check_tensor(name, "gram", gram, (n_atoms, n_atoms), dtypes)
    _check_tensor(name, "correlations", correlations, (None, n_atoms), (gram.dtype,))
    n_signals = correlations.shape[0]
    if selection not in ("omp", "ormp"):
        raise InputError(f"{name}: selection: expected 'omp' or 'ormp', got {selection!r}")
    if not 1 <= sparsity <= n_atoms:
        raise InputError(f"{name}: sparsity: expected 1 to n_atoms = {n_atoms}, got {sparsity}")
    gram, correlations = _rows(gram), _rows(correlations)
    residual_energies = None
    if signal_energies is not None:
        _check_tensor(name, "signal_energies", signal_energies, (n_signals,), (gram.dtype,))
        signal_energies = _rows(signal_energies)
        residual_energies = torch.empty(n_signals, dtype=gram.dtype)
    indices = torch.empty((n_signals, sparsity), dtype=torch.int32)
    coeffs = torch.empty((n_signals, sparsity), dtype=gram.dtype)
    encode = _C.omp_encode_f32 if gram.dtype == torch.float32 else _C.omp_encode_f64
    with _native_errors(name):
        n_padded, workspace_bytes, n_passes, n_rows = encode(
            gram.data_ptr(),
            _row_stride(gram),
            correlations.data_ptr(),
            _row_stride(correlations) if n_signals else n_atoms,
            0 if signal_energies is None else signal_energies.data_ptr(),
            n_signals,
            n_atoms,
            sparsity,
            selection == "ormp",
            _threads(num_threads),
            block_size,
            indices.data_ptr(),
            coeffs.data_ptr(),
            0 if residual_energies is None else residual_energies.data_ptr(),
        )
    return OmpResult(
        indices, coeffs, residual_energies, n_padded, workspace_bytes, n_passes, n_rows
    )


@dataclass(frozen=True)
class AtomUpdateStats:
    """What one call of `update_atoms` did.

    Attributes
    ----------
    objective_before, objective_after : float
        ``|Y - X D|^2`` (squared Frobenius norm), accumulated in double precision.
    n_unused : int
        Atoms that no signal uses.
    n_reseeded : int
        Unused atoms replaced by the residual direction of a badly coded signal.
    n_halved : int
        Blocks undone and halved because they would have raised the objective.
    workspace_bytes : int
        Memory held during the call.
    """

    objective_before: float
    objective_after: float
    n_unused: int
    n_reseeded: int
    n_halved: int
    workspace_bytes: int


def update_atoms(
    atoms: torch.Tensor,
    signals: torch.Tensor,
    indices: torch.Tensor,
    coeffs: torch.Tensor,
    *,
    power_iterations: int = 1,
    block_size: int = 64,
    sweeps: int = 1,
    unused: Literal["skip", "reseed"] = "skip",
    num_threads: int | None = None,
) -> AtomUpdateStats:
    """Improve atoms and coefficients in place with the supports kept (K-SVD).

    For each atom ``d`` with coefficients ``x`` on the signals ``Omega`` that use it, and
    ``E = R_Omega + x d^T`` the residual without it: `power_iterations` times ``d = E^T x / |E^T x|``,
    ``x = E d``.

    Parameters
    ----------
    atoms : torch.Tensor
        ``[n_atoms, d]`` float32 or float64 on the CPU, rows with unit inner stride, updated in place; used
        atoms have unit norm afterwards.
    signals : torch.Tensor
        ``[n_signals, d]``, same dtype.
    indices : torch.Tensor
        ``[n_signals, sparsity]`` int32, strictly ascending per row.
    coeffs : torch.Tensor
        ``[n_signals, sparsity]``, same dtype as `atoms`, unit inner stride, updated in place.
    power_iterations : int
        At least 1.
    block_size : int
        Atoms updated together against one residual. 1 is the strictly sequential method; larger blocks run as
        dense matrix products. A block that would raise the objective is undone and halved, so the objective
        never increases beyond rounding.
    sweeps : int
        Passes over all atoms.
    unused : {"skip", "reseed"}
        Atoms that no signal uses stay, or become the direction of the residual of the worst coded signal (each
        signal serves once).
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    AtomUpdateStats
        Objective before and after, counts.

    Raises
    ------
    InputError
        Wrong dtype, device, shape or layout, an option out of range, an index out of range or out of order, a
        non-finite input. Nothing has been changed then.
    MemoryError
        The workspace (about ``n_signals * d`` elements) cannot be allocated.

    Notes
    -----
    An atom whose update is zero stays as it is. The result is the same for any thread count.

    References
    ----------
    Aharon, Elad, Bruckstein: K-SVD (2006); Rubinstein et al. (2008) for the power iteration; Irofti, Dumitrescu,
    arXiv:1509.05054, for updating atoms in parallel.
    """
    name = "update_atoms"
    dtypes = (torch.float32, torch.float64)
    _check_tensor(name, "atoms", atoms, (None, None), dtypes)
    n_atoms, dim = atoms.shape
    _check_tensor(name, "signals", signals, (None, dim), (atoms.dtype,))
    n_signals = signals.shape[0]
    _check_tensor(name, "indices", indices, (n_signals, None), (torch.int32,))
    sparsity = indices.shape[1]
    _check_tensor(name, "coeffs", coeffs, (n_signals, sparsity), (atoms.dtype,))
    if unused not in ("skip", "reseed"):
        raise InputError(f"{name}: unused: expected 'skip' or 'reseed', got {unused!r}")
    for label, tensor in (("atoms", atoms), ("coeffs", coeffs)):
        if tensor.numel() and _rows(tensor).data_ptr() != tensor.data_ptr():
            raise InputError(
                f"{name}: {label}: updated in place, so rows must have unit stride; call .contiguous()"
            )
    signals, indices = _rows(signals), _rows(indices)
    update = _C.update_atoms_f32 if atoms.dtype == torch.float32 else _C.update_atoms_f64
    with _native_errors(name):
        before, after, n_unused, n_reseeded, n_halved, workspace_bytes = update(
            atoms.data_ptr(),
            _row_stride(atoms),
            signals.data_ptr(),
            _row_stride(signals),
            indices.data_ptr(),
            _row_stride(indices),
            coeffs.data_ptr(),
            _row_stride(coeffs),
            n_atoms,
            dim,
            n_signals,
            sparsity,
            power_iterations,
            block_size,
            sweeps,
            unused == "reseed",
            _threads(num_threads),
        )
    return AtomUpdateStats(before, after, n_unused, n_reseeded, n_halved, workspace_bytes)


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Dense product ``out = alpha a b + beta out``: the kernels' own, for tests and benchmarks.

    Parameters
    ----------
    a, b : torch.Tensor
        ``[m, k]`` and ``[k, n]``, float32 or float64 on the CPU, any strides (transposes are free).
    out : torch.Tensor, optional
        ``[m, n]``, same dtype, unit inner stride, written in place; must not overlap `a` or `b`.
        Not read when `beta` is 0. Default: a new tensor.
    alpha, beta : float
        `beta` needs `out`.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        `out`.

    Raises
    ------
    InputError
        Wrong dtype, device, shape or layout.

    Notes
    -----
    The result is the same to the bit for any thread count.
    """
    name = "gemm"
    _check_tensor(name, "a", a, (None, None), (torch.float32, torch.float64))
    _check_tensor(name, "b", b, (a.shape[1], None), (a.dtype,))
    m, k, n = *a.shape, b.shape[1]
    if out is None:
        if beta != 0.0:
            raise InputError(f"{name}: beta: {beta} needs `out`")
        out = a.new_empty((m, n))
    _check_tensor(name, "out", out, (m, n), (a.dtype,))
    if out.numel() and _rows(out).data_ptr() != out.data_ptr():
        raise InputError(f"{name}: out: written in place, so rows must have unit stride")
    multiply = _C.gemm_f32 if a.dtype == torch.float32 else _C.gemm_f64
    with _native_errors(name):
        multiply(
            alpha,
            a.data_ptr(),
            m,
            k,
            a.stride(0),
            a.stride(1),
            b.data_ptr(),
            n,
            b.stride(0),
            b.stride(1),
            beta,
            out.data_ptr(),
            _row_stride(out),
            _threads(num_threads),
        )
    return out


_FLOAT_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Storage types of the column-sparse GEMM and their numbers in the extension (``DType``)."""

_FLOATS = tuple(_FLOAT_CODES)


def _mask_bytes(n_atoms: int) -> int:
    return (n_atoms + 7) // 8


def sparse_gemm(
    z: torch.Tensor,
    mask: torch.Tensor,
    coeffs: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    num_threads: int | None = None,
) -> torch.Tensor:
    """Multiply by a column-sparse matrix in its stored form: ``y = z @ S + bias``.

    ``y[r, j] = bias[j] + sum over the atoms a of output j of z[r, a] * S[a, j]``.

    Parameters
    ----------
    z : torch.Tensor
        ``[..., n_atoms]`` float32, bfloat16 or float16 on the CPU, any number of rows. A matrix may
        have any row stride; other views that are not contiguous are copied.
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8: bit ``a & 7`` of byte ``a >> 3`` is set if output j
        uses atom a. Trusted: `validate_mask` is the check to make once, when a matrix is loaded.
        With a wrong mask the result is wrong, but no memory outside the tensors is read.
    coeffs : torch.Tensor
        ``[d_out, sparsity]`` float32, bfloat16 or float16, ascending by atom.
    bias : torch.Tensor, optional
        ``[d_out]`` float32, bfloat16 or float16.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    torch.Tensor
        ``[..., d_out]``, dtype of `z`, contiguous; no autograd (see `cospadi.ops.sparse_gemm`).

    Raises
    ------
    InputError
        Wrong dtype, device or shape, or more coefficients than atoms.

    Notes
    -----
    Sums are in float32 and rounded once; the result is the same to the bit for any thread count.
    Up to about 16 rows the cost is one pass over `mask` and `coeffs`; beyond, a dense product.
    """
    mask_shape, coeffs_shape = mask.shape, coeffs.shape
    is_valid = (
        z.is_cpu
        and mask.is_cpu
        and coeffs.is_cpu
        and z.dim() > 0
        and len(mask_shape) == len(coeffs_shape) == 2
        and z.dtype in _FLOAT_CODES
        and mask.dtype is torch.uint8
        and coeffs.dtype in _FLOAT_CODES
        and mask_shape[0] == coeffs_shape[0]
        and mask_shape[1] == (z.shape[-1] + 7) // 8
        and coeffs_shape[1] <= z.shape[-1]
        and (bias is None or _is_bias(bias, coeffs_shape[0]))
    )
    if not is_valid:
        _raise_sparse_gemm_error(z, mask, coeffs, bias)
    *batch, n_atoms = z.shape
    d_out, sparsity = coeffs_shape
    z_stride = n_atoms
    if not z.is_contiguous():
        if len(batch) == 1 and z.stride(1) == 1 and z.stride(0) >= n_atoms:
            z_stride = z.stride(0)
        else:
            z = z.contiguous()
    y = z.new_empty((*batch, d_out))
    # Copies stay referenced until the call has returned.
    mask, coeffs = mask.contiguous(), coeffs.contiguous()
    bias_address = bias_code = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_address, bias_code = bias.data_ptr(), _FLOAT_CODES[bias.dtype]
    try:
        _C.sparse_gemm(
            z.data_ptr(),
            _FLOAT_CODES[z.dtype],
            math.prod(batch),
            z_stride,
            n_atoms,
            mask.data_ptr(),
            mask_shape[1],
            coeffs.data_ptr(),
            _FLOAT_CODES[coeffs.dtype],
            d_out,
            sparsity,
            bias_address,
            bias_code,
            y.data_ptr(),
            _threads(num_threads),
        )
    except (ValueError, RuntimeError) as error:
        with _native_errors("sparse_gemm"):  # here, since entering it costs a tenth of a small call
            raise error
    return y


def _is_bias(bias: torch.Tensor, d_out: int) -> bool:
    return bias.is_cpu and bias.dtype in _FLOAT_CODES and bias.shape == (d_out,)


def _raise_sparse_gemm_error(
    z: torch.Tensor, mask: torch.Tensor, coeffs: torch.Tensor, bias: torch.Tensor | None
) -> NoReturn:
    """Say what is wrong; apart from the call, so that a correct call pays for one condition."""
    name = "sparse_gemm"
    if z.dim() == 0:
        raise InputError(f"{name}: z: expected shape [..., n_atoms], got a scalar")
    _check_tensor(name, "z", z, (None,) * z.dim(), _FLOATS)
    n_atoms = z.shape[-1]
    _check_tensor(name, "coeffs", coeffs, (None, None), _FLOATS)
    d_out, sparsity = coeffs.shape
    _check_tensor(name, "mask", mask, (d_out, _mask_bytes(n_atoms)), (torch.uint8,))
    if bias is not None:
        _check_tensor(name, "bias", bias, (d_out,), _FLOATS)
    raise InputError(f"{name}: coeffs: s = {sparsity} is more than the {n_atoms} atoms of z")


def pack_mask(indices: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """Write the atoms of each output as bits.

    Parameters
    ----------
    indices : torch.Tensor
        ``[d_out, sparsity]`` int32 on the CPU, strictly ascending per row, in ``0 .. n_atoms - 1``.
    n_atoms : int
        Atoms of the dictionary.

    Returns
    -------
    torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8: bit ``a & 7`` of byte ``a >> 3``; padding bits zero.

    Raises
    ------
    InputError
        Wrong dtype, device or shape; an index out of range or out of order (the row is named).
    """
    name = "pack_mask"
    _check_tensor(name, "indices", indices, (None, None), (torch.int32,))
    _check_atoms(name, n_atoms)
    indices = indices.detach().contiguous()
    mask = torch.empty((indices.shape[0], _mask_bytes(n_atoms)), dtype=torch.uint8)
    with _native_errors(name):
        _C.pack_mask(
            indices.data_ptr(), indices.shape[0], indices.shape[1], n_atoms, mask.data_ptr()
        )
    return mask


def unpack_mask(mask: torch.Tensor, n_atoms: int, sparsity: int) -> torch.Tensor:
    """Read the atoms of each output from its bits; the inverse of `pack_mask`.

    Parameters
    ----------
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8 on the CPU.
    n_atoms, sparsity : int
        Atoms of the dictionary and bits set in every row.

    Returns
    -------
    torch.Tensor
        ``[d_out, sparsity]`` int32, strictly ascending per row.

    Raises
    ------
    InputError
        As `validate_mask`.
    """
    mask = _checked_mask("unpack_mask", mask, n_atoms, sparsity)
    indices = torch.empty((mask.shape[0], sparsity), dtype=torch.int32)
    with _native_errors("unpack_mask"):
        _C.unpack_mask(mask.data_ptr(), mask.shape[0], n_atoms, sparsity, indices.data_ptr())
    return indices


def validate_mask(mask: torch.Tensor, n_atoms: int, sparsity: int) -> None:
    """Check that every row of `mask` has exactly `sparsity` bits and none beyond the last atom.

    `sparse_gemm` trusts its mask; this is the check to make once, when a matrix is loaded or made.

    Parameters
    ----------
    mask : torch.Tensor
        ``[d_out, ceil(n_atoms / 8)]`` uint8 on the CPU.
    n_atoms, sparsity : int
        Atoms of the dictionary and bits expected in every row.

    Raises
    ------
    InputError
        Wrong dtype, device or shape; a row with another number of bits, or with a padding bit set
        (the first such row is named).
    """
    mask = _checked_mask("validate_mask", mask, n_atoms, sparsity)
    with _native_errors("validate_mask"):
        _C.validate_mask(mask.data_ptr(), mask.shape[0], n_atoms, sparsity)


def _check_atoms(function: str, n_atoms: int) -> None:
    if not 0 <= n_atoms < 2**31:
        raise InputError(f"{function}: n_atoms: expected 0 to 2^31 - 1, got {n_atoms}")


def _checked_mask(function: str, mask: torch.Tensor, n_atoms: int, sparsity: int) -> torch.Tensor:
    _check_atoms(function, n_atoms)
    if not 0 <= sparsity <= n_atoms:
        raise InputError(f"{function}: sparsity: expected 0 to n_atoms = {n_atoms}, got {sparsity}")
    _check_tensor(function, "mask", mask, (None, _mask_bytes(n_atoms)), (torch.uint8,))
    return mask.contiguous()
