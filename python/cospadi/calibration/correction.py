"""The weight to fit in sequential calibration: corrected for the compressed model's inputs, shrunk to the original.

X is an input in the original model, X' the same input in the compressed one. The unshrunk correction over-fits the
calibration tokens; how much of it carries over to other tokens can be measured on windows that were held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.errors import InputError

#: Shrinkages that `choose_shrinkage` tries: 1 keeps the original weight.
SHRINKAGES = (1.0, 0.9, 0.75, 0.5, 0.25, 0.0)
# Ridge on the compressed stream's Gram, relative to its mean diagonal: makes the solve well posed where inputs span
# less than all features, and is invisible where they do not.
RIDGE = 1e-4


@dataclass(eq=False)
class Moments:
    """Second moments of one input in both streams over the same tokens, fp64 [d_in, d_in] on the model's device.

    Attributes
    ----------
    gram
        G' = X'^T X' / n of the compressed stream.
    cross
        C = X'^T X / n.
    original_gram
        G = X^T X / n of the original stream.
    n_tokens
        n, rows of X and X'.
    """

    gram: Tensor
    cross: Tensor
    original_gram: Tensor
    n_tokens: int

    def joined(self, other: Moments) -> Moments:
        """Return the moments over the tokens of both."""
        total = self.n_tokens + other.n_tokens
        own, others = self.n_tokens / total, other.n_tokens / total
        return Moments(
            own * self.gram + others * other.gram,
            own * self.cross + others * other.cross,
            own * self.original_gram + others * other.original_gram,
            total,
        )


@dataclass(frozen=True)
class ShrinkageChoice:
    """Result of `choose_shrinkage`.

    Attributes
    ----------
    shrinkage
        Shrinkage with the least held-back error; of equal ones the largest.
    errors
        Held-back error by shrinkage: ||X' W - X W_0||^2 / ||X W_0||^2, averaged over the weights.
    """

    shrinkage: float
    errors: dict[float, float]


def sequential_target(
    weight: Tensor, gram: Tensor, cross: Tensor, shrinkage: float, *, ridge: float = RIDGE
) -> Tensor:
    """Correct a weight for the inputs that the compressed model gives it.

    With W in the order of formulas ([d_in, d_out], the transpose of `weight`), a the shrinkage, r = `ridge` times the
    mean diagonal of G', the minimiser of::

        (1 - a) ||X' W - X W_0||^2 / n + a ||X' (W - W_0)||^2 / n + r ||W - W_0||^2

    which is ``W = W_0 + (1 - a) (G' + r I)^-1 (C - G') W_0``. So a = 1 gives the original weight, a = 0 the full
    correction, and values between lie on the line between them. Without ridge and shrinkage W is ``G'^-1 C W_0``.

    Parameters
    ----------
    weight
        W_0, [d_out, d_in], torch order.
    gram, cross
        G' and C of `Moments`, [d_in, d_in] fp64.
    shrinkage
        0 to 1.
    ridge
        Relative to the mean diagonal of G', at least 0.

    Returns
    -------
    Tensor
        [d_out, d_in] fp64; to be fitted in the metric G'.

    Raises
    ------
    InputError
        A number is out of range, shapes do not fit, or G' + r I is not positive definite.

    Notes
    -----
    d_in^3 / 3 + 3 d_in^2 d_out multiply-adds in fp64.

    References
    ----------
    Original outputs as targets on the compressed model's inputs: AA-SVD (arXiv 2604.02119). The shrinkage is ours.
    """
    _check_shrinkage(shrinkage)
    weight = weight.double()
    return weight + (1 - shrinkage) * _correction(weight, gram, cross, ridge)


def regression_error(weight: Tensor, original: Tensor, moments: Moments) -> float:
    """Return ||X' W - X W_0||^2 / ||X W_0||^2 over the tokens of `moments`.

    Parameters
    ----------
    weight
        W, [d_out, d_in], what runs on the compressed stream.
    original
        W_0, [d_out, d_in], what runs on the original one.
    moments
        Moments of the input.
    """
    weight, original = weight.double(), original.double()
    output = ((original @ moments.original_gram) * original).sum()
    mixed = ((weight @ moments.cross) * original).sum()
    own = ((weight @ moments.gram) * weight).sum()
    return float((own - 2 * mixed + output) / output)


def choose_shrinkage(
    weights: Sequence[Tensor],
    fit: Moments,
    held_back: Moments,
    *,
    grid: Sequence[float] = SHRINKAGES,
    ridge: float = RIDGE,
) -> ShrinkageChoice:
    """Choose the shrinkage of one input by the error on windows that its correction has not seen.

    Parameters
    ----------
    weights
        Original weights of the input's members, each [d_out, d_in].
    fit, held_back
        Moments that give the corrections, and those that judge them.
    grid
        Shrinkages to try.
    ridge
        As for `sequential_target`.

    Returns
    -------
    ShrinkageChoice
        Use it with ``fit.joined(held_back)``: once chosen, no window need be left out.

    Raises
    ------
    InputError
        `weights` or `grid` is empty, a shrinkage lies outside 0 to 1, or as `sequential_target`.
    """
    if not weights or not grid:
        raise InputError("choose_shrinkage needs at least one weight and one shrinkage to try")
    for shrinkage in grid:
        _check_shrinkage(shrinkage)
    errors = dict.fromkeys(sorted(grid, reverse=True), 0.0)
    for original in weights:
        original = original.double()
        correction = _correction(original, fit.gram, fit.cross, ridge)
        for shrinkage in errors:
            weight = original + (1 - shrinkage) * correction
            errors[shrinkage] += regression_error(weight, original, held_back) / len(weights)
    return ShrinkageChoice(min(errors, key=lambda shrinkage: errors[shrinkage]), errors)


def _check_shrinkage(shrinkage: float) -> None:
    if not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage must lie between 0 and 1, got {shrinkage}")


def _correction(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return ``((G' + r I)^-1 (C - G') W_0)^T``, [d_out, d_in] fp64."""
    d_in = weight.shape[1]
    if gram.shape != (d_in, d_in) or cross.shape != (d_in, d_in):
        raise InputError(
            f"moments of a weight with {d_in} inputs: expected [{d_in}, {d_in}], "
            f"got gram {list(gram.shape)} and cross {list(cross.shape)}"
        )
    if ridge < 0:
        raise InputError(f"ridge must be at least 0, got {ridge}")
    shifted = gram.double().clone()
    shifted.diagonal().add_(ridge * float(gram.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info) or not torch.isfinite(factor).all():
        raise InputError(
            f"the Gram of the compressed stream is not positive definite with ridge {ridge}: use a larger ridge"
        )
    right = (cross.double() - gram.double()) @ weight.T  # [d_in, d_out]
    return torch.cholesky_solve(right, factor).T
