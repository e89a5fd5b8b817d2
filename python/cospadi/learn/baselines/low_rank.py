"""Truncated SVD: plain, and whitened as in SVD-LLM (Wang et al., arXiv 2403.07378, step 1)."""

from __future__ import annotations

import torch

from cospadi.learn.init import signal_svd
from cospadi.learn.member import Member
from cospadi.learn.result import FloatFactor, full_indices
from cospadi.learn.whitening import Whitening


def low_rank(weight: torch.Tensor, whitening: Whitening, rank: int) -> FloatFactor:
    """Best rank-``rank`` factors in the whitened norm (SVD-LLM step 1; with L = I plain truncated SVD).

    The singular values are split evenly between both factors, as in SVD-LLM, so that neither overflows
    a 16-bit type.

    Parameters
    ----------
    weight : torch.Tensor
        ``[d_out, d_in]``.
    whitening : Whitening
        Of the activation Gram; the identity for the plain SVD.
    rank : int
        ``1 <= rank <= min(d_in, d_out)``.

    Returns
    -------
    FloatFactor
        ``rank`` atoms, full support.
    """
    svd = signal_svd(whitening.whiten(weight))
    roots = svd.values[:rank].sqrt()
    dictionary = whitening.unwhiten_atoms(svd.right[:rank] * roots[:, None])
    coeffs = svd.left[:, :rank] * roots
    return FloatFactor(
        dictionary, full_indices(weight.shape[0], coeffs.shape[1], coeffs.device), coeffs
    )


def truncated(member: Member, rank: int) -> FloatFactor:
    """Best rank-``rank`` factors in a member's metric, that of its outputs included.

    Parameters
    ----------
    member : Member
        Weight and metric.
    rank : int
        ``1 <= rank <= min(d_in, d_out)``.

    Returns
    -------
    FloatFactor
        As `low_rank`.
    """
    if member.output is None:
        return low_rank(member.weight, member.whitening, rank)
    factor = low_rank(member.output.factor @ member.weight.double(), member.whitening, rank)
    coeffs = torch.linalg.solve_triangular(member.output.factor, factor.coeffs, upper=True)
    return FloatFactor(factor.dictionary, factor.indices, coeffs)
