"""Metric of the outputs: an error counts by what it does to the model's prediction, not by its length.

With the Fisher matrix F of a layer's output (`cospadi.calibration.fisher`) the objective of a fit becomes
``trace(F dW G dW^T)`` instead of ``trace(dW G dW^T)``: errors of single outputs get weights, and errors of different
outputs may cancel where later layers only see their sum (the inputs of a softmax, of a gate, of a projection).

F's diagonal alone (`RowScales`) leaves the outputs independent: a fit of the weight with its rows scaled is all there
is to it. Where a layer has more outputs than inputs F is hardly told from noise but for its diagonal (docs/results.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from cospadi.errors import FitError, InputError

SHRINKAGE = 0.1
"""Share of the identity in the metric: F comes from some ten thousand tokens with one drawn label each."""


DIAGONAL_SHRINKAGE = 0.02
"""The same where the diagonal alone is used, of which as many tokens know more."""

DAMPED = 0.5
"""Power of the diagonal for gates and the like, whose rows matter for tokens of their own: on text of another kind all
of it lost more than nothing of it (docs/results.md)."""

LEVEL_RATIO = 2.0
"""Eigenvalues within this factor count as one: the same problem for a metric as good as an estimated one."""


@dataclass(frozen=True, eq=False)
class UnitOutputs:
    """An output metric at unit diagonal, in its eigenvectors; float32.

    Attributes
    ----------
    weights : torch.Tensor
        ``[d_out]``; the metric is ``matrix`` times these from both sides.
    matrix, vectors : torch.Tensor
        ``[d_out, d_out]``.
    values : torch.Tensor
        ``[d_out]`` eigenvalues, ascending, those within a factor of `LEVEL_RATIO` replaced by their mean.
    levels : list of (float, slice)
        The distinct ones with the columns of `vectors` that they belong to.
    """

    weights: torch.Tensor
    matrix: torch.Tensor
    vectors: torch.Tensor
    values: torch.Tensor
    levels: list[tuple[float, slice]]


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

    @cached_property
    def unit(self) -> UnitOutputs:
        """The metric in its eigenvectors; kept, because several fits of one weight need it."""
        return _unit_outputs(self.matrix)

    @cached_property
    def feedback(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Order of rounding the outputs, ``[d_out]``, and float32 U with ``matrix^-1 = U^T U`` in it, upper triangular.

        The outputs whose errors cost most come first, so that all others can answer to them.
        """
        order = self.matrix.diagonal().argsort(descending=True, stable=True)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.matrix[order][:, order]))
        return order, torch.linalg.cholesky(inverse, upper=True).float()


@dataclass(frozen=True, eq=False)
class RowScales:
    """The diagonal of a Fisher matrix, as what the rows of a weight are multiplied by before they are fitted.

    Attributes
    ----------
    scales : torch.Tensor
        ``[d_out]`` float64 powers of two, at least one, so that coefficients divided by them are the same numbers but
        for their exponents.
    """

    scales: torch.Tensor


def row_scales(diagonal: torch.Tensor, name: str, *, power: float = 1.0) -> RowScales | None:
    """Scales of rows: roots of a Fisher matrix's diagonal, to the next powers of two.

    Parameters
    ----------
    diagonal : torch.Tensor
        ``[d_out]``, not negative; a share of `DIAGONAL_SHRINKAGE` of it counts alike for all outputs.
    name : str
        Module name, for messages.
    power : float
        Of the weights: one uses all of the diagonal, zero nothing.

    Returns
    -------
    RowScales or None
        None where no gradient ever reached the output.

    Raises
    ------
    InputError
        Not a vector, or not finite.
    """
    if diagonal.ndim != 1:
        raise InputError(
            f"{name}: diagonal of a Fisher matrix has shape {tuple(diagonal.shape)}, expected one dimension"
        )
    _check_finite(diagonal, name)
    diagonal = diagonal.double()
    mean = float(diagonal.mean())
    if mean <= 0.0:
        return None
    weights = (1.0 - DIAGONAL_SHRINKAGE) * diagonal / mean + DIAGONAL_SHRINKAGE
    scales = 2.0 ** (0.5 * power * weights.log2()).round()
    return RowScales(scales / scales.min())


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
    _check_finite(fisher, name)
    fisher = fisher.double()
    if not 0.0 < shrinkage <= 1.0:
        raise InputError(f"shrinkage: expected a share above 0 and up to 1, got {shrinkage!r}")
    scale = float(fisher.diagonal().mean())
    if scale <= 0.0:
        return None
    matrix = (fisher + fisher.T) * (0.5 * (1.0 - shrinkage) / scale)
    matrix.diagonal().add_(shrinkage)
    return OutputMetric(matrix, scale)


def _check_finite(fisher: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(fisher).all()):
        raise InputError(f"{name}: the Fisher matrix holds non-finite values")


def _unit_outputs(metric: torch.Tensor) -> UnitOutputs:
    weights = metric.diagonal().sqrt()
    matrix = metric / weights[:, None] / weights
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError as error:
        raise FitError(f"the eigendecomposition of an output metric failed: {error}") from error
    levels = _levels(values.cpu())
    for value, rows in levels:
        values[rows] = value
    return UnitOutputs(weights.float(), matrix.float(), vectors.float(), values.float(), levels)


def _levels(values: torch.Tensor) -> list[tuple[float, slice]]:
    """Ascending positive eigenvalues in runs of a factor `LEVEL_RATIO`, each with its mean."""
    levels, start = [], 0
    while start < values.numel():
        reach = float(values[start]) * LEVEL_RATIO
        stop = int(torch.searchsorted(values, reach, right=True))
        levels.append((float(values[start:stop].mean()), slice(start, stop)))
        start = stop
    return levels
