"""Magnitude pruning."""

from __future__ import annotations

import torch

from cospadi.learn.baselines.pruned import pruned_factor
from cospadi.learn.result import FloatFactor, top_support


def magnitude(weight: torch.Tensor, sparsity: int) -> FloatFactor:
    """Keep the ``sparsity`` largest ``|w|`` of every output of ``weight [d_out, d_in]``; no data."""
    return pruned_factor(weight, top_support(weight.abs(), sparsity))
