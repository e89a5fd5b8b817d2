"""COMPOT-style factors: an orthonormal dictionary in whitened space (arXiv 2602.15200)."""

from __future__ import annotations

import torch

from cospadi.learn.init import principal_directions
from cospadi.learn.result import FloatFactor, dense_code, top_support
from cospadi.learn.whitening import Whitening


def compot(
    weight: torch.Tensor,
    whitening: Whitening,
    n_atoms: int,
    sparsity: int,
    *,
    iterations: int = 20,
) -> FloatFactor:
    """Alternate exact coding over an orthonormal dictionary and its Procrustes update.

    With ``D^T D = I`` the best s-sparse code of a column y keeps the s largest ``|D^T y|``, and the best dictionary for
    a code is the orthogonal factor of ``Y S^T``: both half-steps are exact, so the whitened error never rises. Starts
    from the leading left singular vectors of ``L W``, as the paper recommends, with 20 alternations.

    Parameters
    ----------
    weight : torch.Tensor
        ``[d_out, d_in]``.
    whitening : Whitening
        Cholesky form in the paper; any works.
    n_atoms, sparsity : int
        K and s; ``K <= d_in``.
    iterations : int
        Alternations.

    Returns
    -------
    FloatFactor
        Columns of ``L^-1 D``, not orthonormal any more.

    Raises
    ------
    InputError
        More atoms than inputs, for which there is no orthonormal dictionary.
    """
    signals = whitening.whiten(weight)
    atoms = principal_directions(signals, n_atoms)
    for _ in range(iterations):
        indices, coeffs = _threshold(signals, atoms, sparsity)
        product = dense_code(indices, coeffs, n_atoms).T @ signals
        left, _, right = torch.linalg.svd(product, full_matrices=False)
        atoms = left @ right
    indices, coeffs = _threshold(signals, atoms, sparsity)
    return FloatFactor(whitening.unwhiten_atoms(atoms), indices, coeffs)


def _threshold(
    signals: torch.Tensor, atoms: torch.Tensor, sparsity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    correlations = signals @ atoms.T
    indices = top_support(correlations.abs(), sparsity)
    return indices, correlations.gather(1, indices.long())
