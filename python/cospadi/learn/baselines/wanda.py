"""Wanda pruning (Sun et al., arXiv 2306.11695)."""

from __future__ import annotations

import torch

from cospadi.learn.baselines.pruned import pruned_factor
from cospadi.learn.result import FloatFactor, top_support


def wanda(weight: torch.Tensor, gram: torch.Tensor, sparsity: int) -> FloatFactor:
    """Keep the ``sparsity`` largest ``|w_ij| ||x_j||`` of every output, weights unchanged.

    Parameters
    ----------
    weight : torch.Tensor
        ``[d_out, d_in]``.
    gram : torch.Tensor
        ``[d_in, d_in]`` activation Gram; its diagonal holds the squared norms of the input channels.
    sparsity : int
        Weights kept per output.
    """
    norms = gram.diagonal().double().clamp_min(0.0).sqrt()
    return pruned_factor(weight, top_support(weight.double().abs() * norms, sparsity))
