"""One weight's codes while supports are sought: a solution over all atoms and a sparse one, drawn together.

The alternating direction method of multipliers of `cospadi.learn.coding.admm`, over the d_in identity atoms and K
learned ones, in the metric of the inputs and, where there is one, of the outputs. In unit-norm atoms Psi (rows,
whitened), signals Y and scaled multipliers, a step solves ``min ||Y - X Psi||^2 + p ||X - V||^2``:

* without an output metric every row of X is a ridge problem with one Gram for all: a Cholesky factorisation;
* with one, B, the rows are coupled: ``B X Psi Psi^T + p X = B Y Psi^T + p V``. In the eigenvectors of B they come
  apart into ridge problems with the penalty ``p / mu``. One factorisation per eigenvalue would be too many: eigenvalues
  within a factor of two are replaced by their mean, which is the same problem for a B as good as the estimated one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cospadi import native
from cospadi.learn.coding import CodingProblem
from cospadi.learn.coding.iterative import ridged_factor
from cospadi.learn.coding.problem import support_mask
from cospadi.learn.deferred import DeferredChecks
from cospadi.learn.member import Member
from cospadi.learn.mod import RELATIVE_RIDGE, relative_ridge
from cospadi.learn.precision import Products, multiply
from cospadi.learn.refit import solve_on_support, solve_on_support_jointly
from cospadi.learn.result import FloatFactor, top_support

CODE_RELAXATION = 1.3
"""Over-relaxation of the solution over all atoms, as is usual in ADMM (Eckstein and Bertsekas 1992)."""

ATOM_RELAXATION = 1.7
"""How far learned atoms move towards, and beyond, their least-squares place. They lag behind the codes during the rise;
with both factors errors are 5 to 8 % lower after as many steps (docs/results.md). Below 2 no move raises the error."""


class Split:
    """Codes of one member in the two forms of the splitting, for the unit-norm atoms of its metric.

    With an output metric everything is scaled to its unit diagonal, which no row's support depends on; `signals`,
    `weight` and the correlations of `problem` are kept rotated into its eigenvectors.

    Parameters
    ----------
    member : Member
        Weight and metrics.
    dictionary : torch.Tensor
        ``[d_in, K]`` learned atoms to start from, K >= 0.
    checks : DeferredChecks, optional
        Receives the factorisations' results, which the caller looks at.
    products : {"float32", "tf32x3", "tf32"}
        Of the product with the inverse, on a CUDA device (`cospadi.learn.precision`).

    Attributes
    ----------
    sparse : torch.Tensor
        ``[d_out, d_in + K]`` float32; dense before the first step.
    dual : torch.Tensor
        Scaled multipliers, same shape.
    indices : torch.Tensor
        Support of `sparse`, int32 ascending.
    """

    def __init__(
        self,
        member: Member,
        dictionary: torch.Tensor,
        checks: DeferredChecks | None = None,
        products: Products = "float32",
    ) -> None:
        self.member = member
        self._checks = DeferredChecks() if checks is None else checks
        self._products = products
        self.d_in = member.weight.shape[1]
        self.outputs = None if member.output is None else member.output.unit
        self.signals = self._rotate(self._weigh(member.signals.float()))
        self.weight = self._rotate(self._weigh(member.weight.float()))
        self.identity = _identity_atoms(member, self.signals)
        self.dictionary = dictionary
        self.problem = self._room()
        self._place_atoms()
        self.sparse = self._start()
        self.dual = torch.zeros_like(self.sparse)
        self.rotated_dual = torch.zeros_like(self.sparse)
        self.rotated_sparse = self._rotate(self.sparse)
        self.indices = self.sparse.new_zeros((0, 0), dtype=torch.int32)
        self._mask: torch.Tensor | None = None

    def step(self, penalty: float, sparsity: int) -> torch.Tensor:
        """One step of the splitting; 0-d, not 0 where a support moved."""
        solution = self._solve(penalty)
        if self.outputs is None and not solution.is_cpu:
            self.indices, is_moved = native.project_rows(
                solution, self.sparse, self.dual, self.indices, sparsity, CODE_RELAXATION
            )
            return is_moved
        before_step = self.sparse if self.outputs is None else self.rotated_sparse
        solution = CODE_RELAXATION * solution + (1.0 - CODE_RELAXATION) * before_step
        self.dual += solution if self.outputs is None else self.outputs.vectors @ solution
        self.indices = top_support(self.dual.abs(), sparsity)
        before, mask = self._mask, support_mask(self.indices, self.problem.n_atoms)
        self._mask = mask
        self.sparse = self.dual * mask
        self.dual -= self.sparse
        if self.outputs is not None:
            # the sum of both is known in rotated form without another product
            both = self.rotated_dual + solution
            self.rotated_sparse = self._rotate(self.sparse)
            self.rotated_dual = both - self.rotated_sparse
        if before is None:
            return mask.new_ones(())
        return (before != mask).any()

    def relax(self, growth: float) -> None:
        """Rescale the multipliers to a penalty that is `growth` times as large."""
        self.dual /= growth
        if self.outputs is not None:
            self.rotated_dual /= growth

    def update_dictionary(self) -> None:
        """Move the learned atoms beyond their least-squares place for the sparse code, to unit norm.

        The normal equations of `cospadi.learn.shared_dictionary` for one member, in float32: the atoms move again in
        the next step. As there, they are solved for the change, with a small ridge.
        """
        code = (self.sparse if self.outputs is None else self.rotated_sparse) / self.problem.lengths
        learned = code[:, self.d_in :]
        present = self.dictionary.T.float()
        weighed = learned if self.outputs is None else self.outputs.values[:, None] * learned
        gram = (weighed.T @ learned).double()
        rest = self.weight - code[:, : self.d_in] - learned @ present
        right = (weighed.T @ rest).double()
        gram.diagonal().add_(relative_ridge(gram, RELATIVE_RIDGE))
        lower, info = torch.linalg.cholesky_ex(gram)
        self._checks.succeeded(info, "the learned atoms have no solution: the code is not finite")
        columns = self.dictionary + ATOM_RELAXATION * torch.cholesky_solve(right, lower).T
        norms = columns.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        before = self.problem.lengths[self.d_in :]
        self.dictionary = columns / norms
        self._place_atoms()
        self._rescale(norms.float() * self.problem.lengths[self.d_in :] / before)

    def _rescale(self, factors: torch.Tensor) -> None:
        """Coefficients of learned atoms whose length changed."""
        self.sparse[:, self.d_in :] *= factors
        if self.outputs is not None:
            self.rotated_sparse[:, self.d_in :] *= factors

    def _weigh(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.outputs is None else rows * self.outputs.weights[:, None]

    def _rotate(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.outputs is None else self.outputs.vectors.T @ rows

    def refit(self, steps: int) -> None:
        """Move the sparse code towards least squares on its support."""
        gram, correlations = self.problem.gram, self.problem.correlations
        mask = support_mask(self.indices, self.problem.n_atoms)
        if self.outputs is None:
            self.sparse = solve_on_support(gram, correlations, mask, self.sparse, steps=steps)
        else:
            correlations = self.outputs.vectors @ correlations
            self.sparse = solve_on_support_jointly(
                gram, self.outputs.matrix, correlations, mask, self.sparse, steps=steps
            )

    def factor(self) -> FloatFactor:
        """The sparse code as a factor of the weight."""
        code = (self.sparse / self.problem.lengths).gather(1, self.indices.long())
        if self.outputs is not None:
            code = code / self.outputs.weights[:, None]
        return FloatFactor(self.dictionary, self.indices, code, self.d_in)

    def take(self, factor: FloatFactor) -> None:
        """Go on with moved atoms and the coefficients that belong to them."""
        self.dictionary = factor.dictionary
        self._place_atoms()
        self.sparse = self._scaled(factor.code().float())
        self.rotated_sparse = self._rotate(self.sparse)

    def _scaled(self, code: torch.Tensor) -> torch.Tensor:
        """Coefficients of the unit-norm atoms and the scaled outputs."""
        return self._weigh(code * self.problem.lengths)

    def _solve(self, penalty: float) -> torch.Tensor:
        """The code over all atoms, rotated where there is an output metric."""
        if self.outputs is None:
            right = self.problem.correlations + penalty * (self.sparse - self.dual)
            return self._ridge_solution(penalty, right)
        right = self.rotated_sparse - self.rotated_dual
        for value, rows in self.outputs.levels:
            ridge = penalty / value
            part = self.problem.correlations[rows] + ridge * right[rows]
            right[rows] = self._ridge_solution(ridge, part)
        return right

    def _ridge_solution(self, ridge: float, right: torch.Tensor) -> torch.Tensor:
        """``right (gram + ridge I)^-1``.

        With as many rows as atoms or more one product with the inverse is as fast as two triangular solves, and at the
        conditions that the ridge leaves as accurate (3e-7 apart). With fewer, solves from the right are faster than
        those of `torch.cholesky_solve` (576 rows and 1632 atoms: 38 ms instead of 51).
        """
        lower = ridged_factor(self.problem.gram, ridge, self._checks)
        if right.shape[0] < lower.shape[0]:
            half = torch.linalg.solve_triangular(lower.mT, right, upper=True, left=False)
            return torch.linalg.solve_triangular(lower, half, upper=False, left=False)
        return multiply(right, torch.cholesky_inverse(lower), self._products)

    def _room(self) -> CodingProblem:
        """Products of the identity atoms, and room for those of the learned ones."""
        fixed, n_atoms = self.identity, self.dictionary.shape[1]
        if not n_atoms:
            return CodingProblem(fixed.gram, fixed.correlations, fixed.lengths)
        size = self.d_in + n_atoms
        gram = fixed.gram.new_empty((size, size))
        gram[: self.d_in, : self.d_in] = fixed.gram
        correlations = fixed.correlations.new_empty((fixed.correlations.shape[0], size))
        correlations[:, : self.d_in] = fixed.correlations
        return CodingProblem(gram, correlations, fixed.lengths)

    def _place_atoms(self) -> None:
        """Products of the unit-norm atoms with one another and with the (rotated) signals."""
        fixed, d_in = self.identity, self.d_in
        if not self.dictionary.shape[1]:
            return
        # float32 as all products here: in float64 this one would cost as much as the step itself
        rows, own_lengths = _unit_rows((fixed.factor @ self.dictionary.float()).T)
        gram, correlations = self.problem.gram, self.problem.correlations
        cross = rows @ fixed.unit.T
        gram[d_in:, :d_in] = cross
        gram[:d_in, d_in:] = cross.T
        gram[d_in:, d_in:] = rows @ rows.T
        gram.diagonal()[d_in:] = 1.0
        correlations[:, d_in:] = self.signals @ rows.T
        lengths = torch.cat([fixed.lengths, own_lengths])
        self.problem = CodingProblem(gram, correlations, lengths)

    def _start(self) -> torch.Tensor:
        """Least squares over the learned atoms, and the exact remainder."""
        remainder = self.member.weight.double()
        if not self.dictionary.shape[1]:
            return self._scaled(remainder.float())
        learned = self.member.whitening.whiten_atoms(self.dictionary)
        part = _least_squares(learned, self.member.signals)
        everything = torch.cat([remainder - part @ self.dictionary.T, part], 1)
        return self._scaled(everything.float())


def _least_squares(atoms: torch.Tensor, signals: torch.Tensor) -> torch.Tensor:
    """``[n, K]`` code of ``signals [n, d]`` over ``atoms [K, d]``, float64.

    torch's solver for CUDA refuses dependent atoms; a small ridge takes them all.
    """
    if atoms.is_cpu:
        return torch.linalg.lstsq(atoms.T, signals.T).solution.T
    gram = atoms @ atoms.T
    gram.diagonal().add_(relative_ridge(gram, RELATIVE_RIDGE))
    return torch.cholesky_solve(atoms @ signals.T, torch.linalg.cholesky_ex(gram)[0]).T


@dataclass
class _Identity:
    """What never changes: the identity atoms of one metric at unit norm, with their products; float32."""

    factor: torch.Tensor
    unit: torch.Tensor
    lengths: torch.Tensor
    gram: torch.Tensor
    correlations: torch.Tensor


def _identity_atoms(member: Member, signals: torch.Tensor) -> _Identity:
    factor = member.whitening.factor.float()
    unit, lengths = _unit_rows(factor.T)
    gram = unit @ unit.T
    gram.diagonal().fill_(1.0)
    return _Identity(factor, unit, lengths, gram, signals @ unit.T)


def _unit_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows at unit norm and their norms; a zero row stays zero with norm one."""
    lengths = rows.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    return rows / lengths[:, None], lengths
