"""A weight and the metric its error is measured in; the members of a group share one dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from cospadi.learn.output_metric import OutputMetric
from cospadi.learn.refit import refit_coefficients, solve_on_support_jointly
from cospadi.learn.result import FloatFactor
from cospadi.learn.whitening import Whitening

REFIT_STEPS = 8
"""Conjugate gradient steps of `Member.refit` with identity atoms: such codes come almost refitted (25 steps and 12 more
before them lower the error by another 0.1 % and take a seventh of the fit)."""

REFIT_STEPS_LEARNED = 25
"""Of codes over learned atoms alone, which have not been refitted after the last update of the atoms."""


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
    output : OutputMetric or None
        Metric of the outputs; the error is ``trace(F (W - W~)^T G (W - W~))`` per token then. None: the identity.
    """

    weight: torch.Tensor
    whitening: Whitening
    output: OutputMetric | None = None

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

    def weigh_outputs(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows [d_out, n]`` float64 times the square root of the output metric, so that it need not be known."""
        if self.output is None:
            return rows
        return self.output.scale**0.5 * (self.output.factor @ rows)

    def error(self, approximation: torch.Tensor) -> float:
        """``scale ||L (W - W~)||^2`` of ``approximation [d_out, d_in]``, in the output metric if there is one."""
        return self._energy(self.whitening.whiten(self.weight.double() - approximation.double()))

    @cached_property
    def energy(self) -> float:
        """`error` of nothing at all."""
        return self._energy(self.signals)

    def _energy(self, signals: torch.Tensor) -> float:
        if self.output is None:
            return self.whitening.scale * float(signals.square().sum())
        energy = float(((self.output.matrix @ signals) * signals).sum())
        return self.whitening.scale * self.output.scale * energy

    def refit(self, factor: FloatFactor, dictionary: torch.Tensor) -> FloatFactor:
        """``factor`` over another ``dictionary [d_in, K]`` with least-squares coefficients on the same support."""
        atoms = self.atoms(dictionary, factor.n_identity).float()
        signals, index = self.signals.float(), factor.indices.long()
        if self.output is None:
            steps = REFIT_STEPS if factor.n_identity else REFIT_STEPS_LEARNED
            coeffs = refit_coefficients(
                signals, atoms, factor.indices, factor.coeffs.float(), steps=steps
            )
        else:
            start = factor.code().float()
            code = solve_on_support_jointly(
                atoms @ atoms.T,
                self.output.matrix.float(),
                signals @ atoms.T,
                torch.zeros_like(start).scatter_(1, index, 1.0),
                start,
                steps=REFIT_STEPS,
            )
            coeffs = code.gather(1, index)
        return FloatFactor(dictionary, factor.indices, coeffs, factor.n_identity)


def group_error(members: Sequence[Member], approximations: Sequence[torch.Tensor]) -> float:
    """Training objective of a group: the sum of `Member.error`."""
    pairs = zip(members, approximations, strict=True)
    return sum(member.error(approximation) for member, approximation in pairs)
