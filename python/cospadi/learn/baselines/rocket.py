"""ROCKET-style one-shot factors: eigen basis, saliency threshold, least-squares dictionary (arXiv 2602.11008)."""

from __future__ import annotations

import torch

from cospadi.learn.init import principal_directions
from cospadi.learn.mod import least_squares_dictionary
from cospadi.learn.result import FloatFactor, dense_code, top_support
from cospadi.learn.whitening import Whitening


def rocket(
    weight: torch.Tensor,
    whitening: Whitening,
    n_atoms: int,
    sparsity: int,
    *,
    exponent: float = 0.5,
) -> FloatFactor:
    """Threshold the code of the whitened weight over its eigen basis once, then solve for the dictionary.

    ``B`` holds the K leading eigenvectors of ``(L W)(L W)^T`` and ``C = B^T L W``; entry (i, j) is worth
    ``|c_ij| ||L^-1 b_i||^exponent``, which adds some of the original space to the whitened one (section 3.2 of the
    paper, exponent 1/2). The s most worthy entries of each column stay, and a ridge least squares for D replaces B.

    The paper first keeps a share ``beta = 0.005`` fewer entries per column and gives the difference back to the best
    entries of the whole matrix, so its s is only nearly fixed. Stored factors here have exactly s per column: beta is
    zero. Budget allocation over layers and the Adam refinement of the released code are not part of this baseline.

    Parameters
    ----------
    weight : torch.Tensor
        ``[d_out, d_in]``.
    whitening : Whitening
        Of the activation Gram.
    n_atoms, sparsity : int
        K and s; a K above ``d_in`` is more than the eigen basis has and refused.
    exponent : float
        Lambda of the paper.

    Returns
    -------
    FloatFactor
        K atoms, s coefficients per output.

    Raises
    ------
    InputError
        More atoms than inputs.
    """
    signals = whitening.whiten(weight)
    basis = principal_directions(signals, n_atoms)
    lengths = whitening.unwhiten_atoms(basis).norm(dim=0)
    code = signals @ basis.T
    indices = top_support(code.abs() * lengths**exponent, sparsity)
    coeffs = code.gather(1, indices.long())
    atoms = least_squares_dictionary(signals, dense_code(indices, coeffs, n_atoms), basis)
    return FloatFactor(whitening.unwhiten_atoms(atoms), indices, coeffs)
