"""Pruned weights as factors of identity atoms."""

from __future__ import annotations

import torch

from cospadi.learn.result import FloatFactor


def pruned_factor(weight: torch.Tensor, indices: torch.Tensor) -> FloatFactor:
    """Keep the entries ``indices [d_out, s]`` of every row of ``weight [d_out, d_in]``, values unchanged."""
    return FloatFactor(
        dictionary=weight.new_zeros((weight.shape[1], 0), dtype=torch.float64),
        indices=indices,
        coeffs=weight.gather(1, indices.long()),
        n_identity=weight.shape[1],
    )
