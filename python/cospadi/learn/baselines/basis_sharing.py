"""Basis Sharing (Wang et al., arXiv 2410.03765): one low-rank basis for the same projection of several layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cospadi.learn.baselines.low_rank import low_rank
from cospadi.learn.result import FloatFactor
from cospadi.learn.whitening import Whitening


def basis_sharing(
    weights: Sequence[torch.Tensor], whitening: Whitening, rank: int
) -> list[FloatFactor]:
    """Truncated SVD of ``L [W_1 ... W_n]``; the basis is shared, the coefficients are dense.

    With one weight it is SVD-LLM. The paper keeps the singular values in the basis; here they are split evenly, which
    leaves the product and suits 16-bit types.

    Parameters
    ----------
    weights : sequence of torch.Tensor
        ``[d_out_l, d_in]`` each.
    whitening : Whitening
        Of the sum (or mean: the scale does not matter) of the members' activation Grams.
    rank : int
        Atoms of the shared basis; `cospadi.learn.budget.low_rank_size` with the summed ``d_out``.

    Returns
    -------
    list of FloatFactor
        One per weight, all with the same dictionary tensor, full support.
    """
    joint = low_rank(torch.cat(list(weights)), whitening, rank)
    sizes = [weight.shape[0] for weight in weights]
    return [
        FloatFactor(joint.dictionary, indices, coeffs)
        for indices, coeffs in zip(
            joint.indices.split(sizes), joint.coeffs.split(sizes), strict=True
        )
    ]
