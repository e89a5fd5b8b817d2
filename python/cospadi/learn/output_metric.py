"""Metric of the outputs: an error counts by what it does to the model's prediction, not by its length.

With the Fisher matrix F of a layer's output (`cospadi.calibration.fisher`) the objective of a fit becomes
``trace(F dW G dW^T)`` instead of ``trace(dW G dW^T)``: errors of single outputs get weights, and errors of different
outputs may cancel where later layers only see their sum (the inputs of a softmax, of a gate, of a projection).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from cospadi.errors import FitError, InputError

SHRINKAGE = 0.1
"""Share of the identity in the metric: F comes from some ten thousand tokens with one drawn label each."""


@dataclass(frozen=True)
class OutputMetric:
    """Shrunk Fisher matrix of an output.

    Attributes
    ----------
    matrix : torch.Tensor
        ``[d_out, d_out]`` float64, symmetric positive definite, mean diagonal one.
    scale : float
        Mean diagonal that was divided out: nats per token and squared unit of the output.
    """

    matrix: torch.Tensor
    scale: float

    @cached_property
    def factor(self) -> torch.Tensor:
        """Upper triangular ``[d_out, d_out]`` float64 R with ``R^T R = matrix``."""
        upper, info = torch.linalg.cholesky_ex(self.matrix, upper=True)
        if int(info) != 0:
            raise FitError("the output metric is not positive definite")
        return upper


def output_metric(
    fisher: torch.Tensor, name: str, *, shrinkage: float = SHRINKAGE
) -> OutputMetric | None:
    """Metric from a Fisher matrix.

    Parameters
    ----------
    fisher : torch.Tensor
        ``[d_out, d_out]``, symmetric positive semidefinite.
    name : str
        Module name, for messages.
    shrinkage : float
        In (0, 1]; one leaves the outputs' lengths alone.

    Returns
    -------
    OutputMetric or None
        None where no gradient ever reached the output.

    Raises
    ------
    InputError
        Not square or not finite; shrinkage out of range.
    """
    if fisher.ndim != 2 or fisher.shape[0] != fisher.shape[1]:
        raise InputError(f"{name}: Fisher matrix has shape {tuple(fisher.shape)}, expected square")
    if not bool(torch.isfinite(fisher).all()):
        raise InputError(f"{name}: the Fisher matrix holds non-finite values")
    if not 0.0 < shrinkage <= 1.0:
        raise InputError(f"shrinkage: expected a share above 0 and up to 1, got {shrinkage!r}")
    fisher = fisher.double()
    scale = float(fisher.diagonal().mean())
    if scale <= 0.0:
        return None
    matrix = (fisher + fisher.T) * (0.5 * (1.0 - shrinkage) / scale)
    matrix.diagonal().add_(shrinkage)
    return OutputMetric(matrix, scale)
