"""A weight and the metric its error is measured in; the members of a group share one dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from cospadi.learn.refit import refit_coefficients
from cospadi.learn.result import FloatFactor
from cospadi.learn.whitening import Whitening


@dataclass(frozen=True)
class Member:
    """One weight of a group (a single weight is a group of one).

    Attributes
    ----------
    weight : torch.Tensor
        ``[d_out, d_in]``.
    whitening : Whitening
        Metric: the error of ``W~`` is ``scale ||L (W - W~)||^2``, which is ``||X (W - W~)||^2`` per token if the
        whitening is that of the member's own activation Gram.
    """

    weight: torch.Tensor
    whitening: Whitening

    @cached_property
    def signals(self) -> torch.Tensor:
        """Whitened weight, ``[d_out, d_in]`` float64."""
        return self.whitening.whiten(self.weight)

    @cached_property
    def metric(self) -> torch.Tensor:
        """``scale L^T L``, ``[d_in, d_in]`` float64: the activation Gram with the whitening's regularisation."""
        factor = self.whitening.factor
        return self.whitening.scale * (factor.T @ factor)

    def atoms(self, dictionary: torch.Tensor, n_identity: int = 0) -> torch.Tensor:
        """All whitened atoms as rows, identity atoms first: ``[n_identity + K, d_in]`` float64."""
        learned = self.whitening.whiten_atoms(dictionary)
        return torch.cat([self.whitening.factor.T, learned]) if n_identity else learned

    def error(self, approximation: torch.Tensor) -> float:
        """``scale ||L (W - W~)||^2`` of ``approximation [d_out, d_in]``."""
        lost = self.whitening.whiten(self.weight.double() - approximation.double())
        return self.whitening.scale * float(lost.square().sum())

    def refit(self, factor: FloatFactor, dictionary: torch.Tensor) -> FloatFactor:
        """``factor`` over another ``dictionary [d_in, K]`` with least-squares coefficients on the same support."""
        coeffs = refit_coefficients(
            self.signals.float(),
            self.atoms(dictionary, factor.n_identity).float(),
            factor.indices,
            factor.coeffs.float(),
        )
        return FloatFactor(dictionary, factor.indices, coeffs, factor.n_identity)


def group_error(members: Sequence[Member], approximations: Sequence[torch.Tensor]) -> float:
    """Training objective of a group: the sum of `Member.error`."""
    pairs = zip(members, approximations, strict=True)
    return sum(member.error(approximation) for member, approximation in pairs)
