"""What every method returns: a factor in floating point, before storage types are chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cospadi.errors import InputError
from cospadi.native import select_largest


@dataclass(frozen=True)
class FloatFactor:
    """One fitted weight: ``W = [I | D] S`` with identity atoms, ``W = D S`` without.

    Attributes
    ----------
    dictionary : torch.Tensor
        ``[d_in, K]`` float64, one learned atom per column; K may be 0 if there are identity atoms.
    indices : torch.Tensor
        ``[d_out, s]`` int32, strictly ascending per row. Identity atom i is i, learned atom a is ``n_identity + a``.
    coeffs : torch.Tensor
        ``[d_out, s]`` float32 or float64, in the order of `indices`.
    n_identity : int
        ``d_in`` or 0.
    """

    dictionary: torch.Tensor
    indices: torch.Tensor
    coeffs: torch.Tensor
    n_identity: int = 0

    def __post_init__(self) -> None:
        if self.n_identity not in (0, self.d_in):
            raise InputError(f"n_identity: expected 0 or d_in = {self.d_in}, got {self.n_identity}")
        if self.indices.shape != self.coeffs.shape:
            raise InputError(
                f"coeffs: expected the shape of indices, {tuple(self.indices.shape)}, got {tuple(self.coeffs.shape)}"
            )

    @property
    def d_in(self) -> int:
        """Features read."""
        return self.dictionary.shape[0]

    @property
    def d_out(self) -> int:
        """Features written."""
        return self.indices.shape[0]

    @property
    def n_atoms(self) -> int:
        """Learned atoms K."""
        return self.dictionary.shape[1]

    @property
    def sparsity(self) -> int:
        """Coefficients per output, of both kinds of atoms."""
        return self.indices.shape[1]

    @property
    def full_support(self) -> bool:
        """Whether every output uses every atom."""
        return self.sparsity == self.n_identity + self.n_atoms

    def code(self) -> torch.Tensor:
        """Dense ``[d_out, n_identity + K]`` float64 code, zeros off the support."""
        return dense_code(self.indices, self.coeffs.double(), self.n_identity + self.n_atoms)

    def dense_weight(self) -> torch.Tensor:
        """``[d_out, d_in]`` float64 weight that the factor stands for."""
        code = self.code()
        weight = code[:, self.n_identity :] @ self.dictionary.double().T
        return weight + code[:, : self.n_identity] if self.n_identity else weight


def dense_code(indices: torch.Tensor, coeffs: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """``[n, n_atoms]`` matrix with ``coeffs [n, s]`` at ``indices [n, s]`` and zeros elsewhere."""
    return coeffs.new_zeros((coeffs.shape[0], n_atoms)).scatter_(1, indices.long(), coeffs)


def full_indices(d_out: int, n_atoms: int, device: torch.device | None = None) -> torch.Tensor:
    """``[d_out, n_atoms]`` int32 indices of full support (one row in memory)."""
    return torch.arange(n_atoms, dtype=torch.int32, device=device).expand(d_out, n_atoms)


def full_identity(weight: torch.Tensor) -> FloatFactor:
    """``weight [d_out, d_in]`` itself as a factor: identity atoms with full support, no learned ones."""
    d_out, d_in = weight.shape
    return FloatFactor(
        dictionary=weight.new_zeros((d_in, 0), dtype=torch.float64),
        indices=full_indices(d_out, d_in, weight.device),
        coeffs=weight,
        n_identity=d_in,
    )


def top_support(scores: torch.Tensor, sparsity: int) -> torch.Tensor:
    """Indices of the ``sparsity`` largest scores of every row, ascending.

    Parameters
    ----------
    scores : torch.Tensor
        ``[n, A]`` non-negative and not NaN (checked on the CPU; see `cospadi.native.select_largest`).
    sparsity : int
        ``1 <= sparsity <= A``.

    Returns
    -------
    torch.Tensor
        ``[n, sparsity]`` int32; equal scores are broken by the lowest index.

    Raises
    ------
    InputError
        Sparsity out of range; a score that is negative or NaN.
    """
    if not 1 <= sparsity <= scores.shape[1]:
        raise InputError(f"sparsity: expected 1 to {scores.shape[1]} atoms, got {sparsity}")
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.float()  # exact for the narrower types
    return select_largest(scores, sparsity)
