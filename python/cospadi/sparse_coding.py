"""Sparse coding and dictionary learning on their own: the native kernels for arrays that belong to no model.

Signals and atoms are rows, as in scikit-learn. Arrays of NumPy give arrays, tensors of torch give tensors.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar, get_args

import numpy as np
import torch

from cospadi.errors import InputError
from cospadi.native import omp_encode, update_atoms

Array = TypeVar("Array", np.ndarray, torch.Tensor)

Selection = Literal["omp", "ormp"]

BATCH = 8192
"""Signals coded at a time: their correlations with all atoms are held in memory."""


@dataclass(frozen=True)
class SparseCode(Generic[Array]):
    """Codes of a batch of signals, ``signals = code @ atoms`` as far as so few atoms can.

    Attributes
    ----------
    indices : array or tensor
        ``[n_signals, sparsity]`` int32, strictly ascending per row: the atoms that a signal uses.
    coeffs : array or tensor
        ``[n_signals, sparsity]`` float32 or float64, in the order of `indices`.
    n_atoms : int
        Atoms of the dictionary.
    """

    indices: Array
    coeffs: Array
    n_atoms: int

    def dense(self) -> Array:
        """``[n_signals, n_atoms]`` with zeros off the supports."""
        indices, coeffs = torch.as_tensor(self.indices), torch.as_tensor(self.coeffs)
        code = coeffs.new_zeros((coeffs.shape[0], self.n_atoms))
        code.scatter_(1, indices.long(), coeffs)
        return _like(self.coeffs, code)


@dataclass(frozen=True)
class LearnedDictionary(Generic[Array]):
    """What `ksvd` found.

    Attributes
    ----------
    atoms : array or tensor
        ``[n_atoms, n_features]``, unit-norm rows.
    code : SparseCode
        Of the training signals; its coefficients belong to these atoms.
    errors : tuple of float
        Relative error ``|signals - code @ atoms| / |signals|`` (Frobenius) after every iteration.
    """

    atoms: Array
    code: SparseCode[Array]
    errors: tuple[float, ...]


def omp(
    atoms: Array,
    signals: Array,
    sparsity: int,
    *,
    selection: Selection = "omp",
    num_threads: int | None = None,
) -> SparseCode[Array]:
    """Code every signal with exactly `sparsity` atoms by orthogonal matching pursuit.

    Parameters
    ----------
    atoms : array or tensor
        ``[n_atoms, n_features]`` on the CPU; norms may differ. float32 or float64 of torch; other real types of NumPy
        are taken as float64.
    signals : array or tensor
        ``[n_signals, n_features]``, same type; not an array of NumPy beside a tensor of torch.
    sparsity : int
        Atoms per signal, ``1 <= sparsity <= n_atoms``.
    selection : {"omp", "ormp"}
        The atom with the largest correlation with the residual per unit of its norm, or that which lowers the error
        most (orthogonal least squares, as SPAMS does).
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Returns
    -------
    SparseCode

    Raises
    ------
    InputError
        A ValueError: wrong type, device, shape or sparsity, or values that are not finite or too large to multiply.

    Examples
    --------
    >>> code = cospadi.omp(atoms, signals, 5)
    >>> approximation = code.dense() @ atoms
    """
    dictionary, rows = _matrix("atoms", atoms), _matrix("signals", signals)
    _check_kind(atoms, signals)
    _check_pair(dictionary, rows)
    sparsity = _checked_coding(sparsity, dictionary.shape[0], selection, num_threads)
    indices, coeffs = _encode(dictionary, rows, sparsity, selection, num_threads)
    return SparseCode(_like(signals, indices), _like(signals, coeffs), dictionary.shape[0])


def ksvd(
    signals: Array,
    n_atoms: int,
    sparsity: int,
    *,
    iterations: int = 10,
    atoms: Array | None = None,
    selection: Selection = "omp",
    sweeps: int = 1,
    power_iterations: int = 1,
    block_size: int = 64,
    tolerance: float = 0.0,
    seed: int = 0,
    num_threads: int | None = None,
) -> LearnedDictionary[Array]:
    """Learn a dictionary in which every signal is a sum of few atoms (K-SVD).

    Every iteration codes all signals anew (`omp`), then updates the atoms with the supports kept. An atom that no
    signal uses becomes the residual of the worst coded signal. The result is a local minimum: try several seeds.

    Parameters
    ----------
    signals : array or tensor
        ``[n_signals, n_features]``, at least one, types as for `omp`.
    n_atoms, sparsity : int
        Atoms to learn, and atoms per signal.
    iterations : int
        At least 1.
    atoms : array or tensor, optional
        ``[n_atoms, n_features]`` to start from; by default signals picked at random, and Gaussian rows where there are
        too few of them.
    selection, num_threads
        See `omp`.
    sweeps, power_iterations, block_size : int
        Of the atom update, see `cospadi.native.update_atoms`.
    tolerance : float
        Stop when the relative error falls by less than this share in one iteration; 0 runs all.
    seed : int
        Of the start, in ``[0, 2^63)``.

    Returns
    -------
    LearnedDictionary

    Raises
    ------
    InputError
        As for `omp`; a count out of range.

    References
    ----------
    Aharon, Elad, Bruckstein: K-SVD (2006); Rubinstein et al. (2008).
    """
    rows = _matrix("signals", signals)
    if not rows.numel():
        raise InputError(f"signals: expected at least one value, got shape {tuple(rows.shape)}")
    n_atoms = _integer("n_atoms", n_atoms, 1)
    iterations = _integer("iterations", iterations, 1)
    sweeps = _integer("sweeps", sweeps, 1)
    power_iterations = _integer("power_iterations", power_iterations, 0)
    block_size = _integer("block_size", block_size, 1)
    seed = _integer("seed", seed, 0)
    if seed >= 2**63:
        raise InputError(f"seed: expected an integer in [0, 2^63), got {seed}")
    sparsity = _checked_coding(sparsity, n_atoms, selection, num_threads)
    energy = float(rows.double().square().sum())
    if energy > torch.finfo(rows.dtype).max:
        raise InputError("signals: too large, their squares overflow; scale them down")
    if atoms is None:
        dictionary = _first_atoms(rows, n_atoms, seed)
    else:
        dictionary = _matrix("atoms", atoms).clone()
        _check_kind(atoms, signals)
        if dictionary.shape[0] != n_atoms:
            raise InputError(f"atoms: expected n_atoms = {n_atoms} rows, got {dictionary.shape[0]}")
    _check_pair(dictionary, rows)
    errors: list[float] = []
    for _ in range(iterations):
        indices, coeffs = _encode(dictionary, rows, sparsity, selection, num_threads)
        stats = update_atoms(
            dictionary,
            rows,
            indices,
            coeffs,
            sweeps=sweeps,
            power_iterations=power_iterations,
            block_size=block_size,
            unused="reseed",
            num_threads=num_threads,
        )
        errors.append((max(stats.objective_after, 0.0) / energy) ** 0.5 if energy else 0.0)
        if len(errors) > 1 and errors[-2] - errors[-1] < tolerance * errors[-2]:
            break
    code = SparseCode(_like(signals, indices), _like(signals, coeffs), n_atoms)
    return LearnedDictionary(_like(signals, dictionary), code, tuple(errors))


def _encode(
    atoms: torch.Tensor,
    signals: torch.Tensor,
    sparsity: int,
    selection: Selection,
    num_threads: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    gram = atoms @ atoms.T
    # values are finite, so that only a product that overflows can be otherwise
    if not torch.isfinite(gram).all():
        raise InputError("atoms: too large, their products overflow; scale them down")
    parts = []
    for rows in signals.split(BATCH) if len(signals) else (signals,):
        correlations = rows @ atoms.T
        if not torch.isfinite(correlations).all():
            raise InputError(
                "signals: too large, products with the atoms overflow; scale them down"
            )
        parts.append(
            omp_encode(gram, correlations, sparsity, selection=selection, num_threads=num_threads)
        )
    return torch.cat([p.indices for p in parts]), torch.cat([p.coeffs for p in parts])


def _first_atoms(signals: torch.Tensor, n_atoms: int, seed: int) -> torch.Tensor:
    """Signals at random, those that are zero left out; the rest Gaussian; unit norms."""
    generator = torch.Generator().manual_seed(seed)
    usable = torch.nonzero(signals.norm(dim=1) > 0).flatten()
    chosen = usable[torch.randperm(len(usable), generator=generator)[:n_atoms]]
    missing = (n_atoms - len(chosen), signals.shape[1])
    rest = torch.randn(missing, generator=generator, dtype=signals.dtype)
    return torch.nn.functional.normalize(torch.cat([signals[chosen], rest]), dim=1)


def _matrix(name: str, value: Any) -> torch.Tensor:  # noqa: ANN401
    """A contiguous real matrix on the CPU that shares memory where it can."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in (torch.float32, torch.float64) or value.device.type != "cpu":
            raise InputError(
                f"{name}: expected float32 or float64 on the CPU, got {value.dtype} on {value.device}"
            )
        matrix = value.detach()
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise InputError(f"{name}: expected real numbers, got {array.dtype}")
        dtype = np.float32 if array.dtype == np.float32 else np.float64
        # torch takes neither foreign byte orders nor negative strides, and warns of what it may not write to
        matrix = torch.from_numpy(np.require(array, dtype, ["C", "W"]))
    if matrix.ndim != 2:
        raise InputError(f"{name}: expected a matrix, got shape {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise InputError(f"{name}: hold values that are not finite")
    return matrix.contiguous()


def _integer(name: str, value: Any, lowest: int) -> int:  # noqa: ANN401
    """An integer of Python or NumPy, at least `lowest`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = lowest - 1
    if isinstance(value, (bool, np.bool_)) or number < lowest:
        raise InputError(f"{name}: expected an integer of at least {lowest}, got {value!r}")
    return number


def _checked_coding(
    sparsity: Any,  # noqa: ANN401
    n_atoms: int,
    selection: str,
    num_threads: Any,  # noqa: ANN401
) -> int:
    """The sparsity, once it and what else `omp` is told are found good."""
    if selection not in get_args(Selection):
        raise InputError(f"selection: expected 'omp' or 'ormp', got {selection!r}")
    if num_threads is not None:
        _integer("num_threads", num_threads, 1)
    try:
        number = _integer("sparsity", sparsity, 1)
    except InputError:
        number = 0
    if not 1 <= number <= n_atoms:
        raise InputError(
            f"sparsity: expected an integer, 1 to n_atoms = {n_atoms}, got {sparsity!r}"
        )
    return number


def _check_kind(atoms: object, signals: object) -> None:
    if isinstance(atoms, torch.Tensor) != isinstance(signals, torch.Tensor):
        raise InputError(
            f"atoms: expected the type of the signals, {type(signals).__name__}, got {type(atoms).__name__}"
        )


def _check_pair(atoms: torch.Tensor, signals: torch.Tensor) -> None:
    if atoms.dtype != signals.dtype:
        raise InputError(
            f"atoms: expected the type of the signals, {_type_name(signals)}, got {_type_name(atoms)}"
            "; convert one of the two"
        )
    if atoms.shape[1] != signals.shape[1]:
        raise InputError(
            f"atoms: expected {signals.shape[1]} features as in the signals, got {atoms.shape[1]}"
        )


def _type_name(tensor: torch.Tensor) -> str:
    """The name that NumPy and torch share."""
    return str(tensor.dtype).removeprefix("torch.")


def _like(example: Array, tensor: torch.Tensor) -> Array:
    """The tensor in the kind of the example."""
    result: Any = tensor if isinstance(example, torch.Tensor) else tensor.numpy()
    return result
