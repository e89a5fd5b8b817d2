"""The problem every coder solves, in Gram form, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from cospadi.learn.result import dense_code


class Code(NamedTuple):
    """Support ``indices [n, s]`` (int32, ascending) with ``coeffs [n, s]``; ``n_padded`` entries only fill it up."""

    indices: torch.Tensor
    coeffs: torch.Tensor
    n_padded: int = 0

    def dense(self, n_atoms: int) -> torch.Tensor:
        """``[n, n_atoms]`` with zeros off the support."""
        return dense_code(self.indices, self.coeffs, n_atoms)


@dataclass(frozen=True)
class CodingProblem:
    """``min ||Y - X A||^2`` over rows of X with s non-zeros, for unit-norm atoms A: only products of A are needed.

    Attributes
    ----------
    gram : torch.Tensor
        ``[A, A]`` float32 Gram of the unit-norm atoms; its diagonal is one, also for a zero atom.
    correlations : torch.Tensor
        ``[n, A]`` float32 products of the signals with the unit-norm atoms.
    lengths : torch.Tensor
        ``[A]`` float32 norms of the atoms as they came, one for a zero atom. Coefficients of the unit-norm atoms are
        divided by them in the end.
    """

    gram: torch.Tensor
    correlations: torch.Tensor
    lengths: torch.Tensor

    @property
    def n_atoms(self) -> int:
        """Columns of the dense code."""
        return self.gram.shape[0]


def coding_problem(signals: torch.Tensor, atoms: torch.Tensor) -> CodingProblem:
    """Gram form of coding ``signals [n, d]`` over ``atoms [A, d]`` (rows, any norms).

    The products run in float32 whatever comes in: fp64 signals are rounded first, which is far below any coding error.
    """
    rows, data = atoms.float(), signals.float()
    lengths = rows.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    unit = rows / lengths[:, None]
    gram = unit @ unit.T
    gram.diagonal().fill_(1.0)
    return CodingProblem(gram, data @ unit.T, lengths)


def support_mask(indices: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """``[n, n_atoms]`` float32 with ones at ``indices [n, s]``."""
    mask = torch.zeros((indices.shape[0], n_atoms), dtype=torch.float32, device=indices.device)
    return mask.scatter_(1, indices.long(), 1.0)
