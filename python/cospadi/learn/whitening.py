"""Whitening: from an activation Gram to a factor L with ``||X W|| = ||L W||`` up to scale.

The ladder, from exact to last resort; every step that was tried is recorded:

1. finite check (a non-finite Gram is an error of the caller, not something to repair);
2. Cholesky in fp64, ``G = L^T L`` with L upper triangular (CoSpaDi, arXiv 2509.22075, appendix A.1);
3. Cholesky of ``G + t * mean(diag G) * I`` with t = 1e-10 ... 1e-5. Relative to the trace, because an
   absolute shift is lost against large activations (the known failure of public SVD-LLM code);
4. eigendecomposition with the eigenvalues floored at 1e-7 of the largest (SVD-LLM V2, arXiv
   2503.12340, uses the eigen form for the same reason): works for any symmetric matrix;
5. nothing works: `WhiteningError`; the caller keeps the layer dense and reports it.

The Gram is scaled to a mean diagonal of one first, which changes no minimiser and keeps the fp32 signals of
layers with huge or tiny activations in range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from cospadi.errors import CospadiError, InputError

RELATIVE_SHIFTS = (1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
EIGEN_FLOOR = 1e-7
# A Cholesky factor that exists only by rounding luck amplifies noise; its diagonal tells.
MIN_PIVOT_RATIO = 1e-7
# An input whose energy is at most this share of the mean one is dead: in fp64 sums of fp32 products that is noise.
DEAD_SHARE = 1e-12


class WhiteningError(CospadiError):
    """No step of the ladder gave a usable factor."""


@dataclass(frozen=True)
class Whitening:
    """Square-root factor of a scaled activation Gram.

    Attributes
    ----------
    factor : torch.Tensor
        ``[d, d]`` float64 with ``factor.T @ factor = gram / scale`` (plus the recorded regularisation).
    inverse : torch.Tensor or None
        ``[d, d]`` float64 inverse of ``factor`` for the eigen form; None for a triangular factor, which is
        solved against instead.
    kind : {"identity", "cholesky", "eigen"}
        Form of the factor.
    scale : float
        Mean diagonal of the Gram that was divided out.
    shift : float
        Ridge added to the scaled Gram, relative to its mean diagonal.
    steps : tuple of str
        What was tried, in order.
    """

    factor: torch.Tensor
    inverse: torch.Tensor | None
    kind: Literal["identity", "cholesky", "eigen"]
    scale: float
    shift: float
    steps: tuple[str, ...] = field(default=())

    def whiten(self, weight: torch.Tensor) -> torch.Tensor:
        """Signals ``[d_out, d_in]`` (rows) of ``weight [d_out, d_in]``: ``(L W)^T = weight L^T``, fp64."""
        return weight.double() @ self.factor.T

    def whiten_atoms(self, dictionary: torch.Tensor) -> torch.Tensor:
        """Atoms ``[K, d_in]`` (rows) of a stored ``dictionary [d_in, K]``: ``(L D)^T``, fp64."""
        return (self.factor @ dictionary.double()).T

    def unwhiten_atoms(self, atoms: torch.Tensor) -> torch.Tensor:
        """Stored dictionary ``[d_in, K]`` fp64 of whitened ``atoms [K, d_in]``: solves ``L D = atoms^T``."""
        columns = atoms.double().T
        if self.inverse is not None:
            return self.inverse @ columns
        return torch.linalg.solve_triangular(self.factor, columns, upper=True)


def identity_whitening(d: int, device: torch.device | None = None) -> Whitening:
    """Whitening of the data-free mode: L = I."""
    eye = torch.eye(d, dtype=torch.float64, device=device)
    return Whitening(eye, eye, "identity", 1.0, 0.0, ("identity: no calibration",))


def count_dead_inputs(gram: torch.Tensor) -> int:
    """Inputs that the calibration text leaves at zero.

    Parameters
    ----------
    gram : torch.Tensor
        ``[d_in, d_in]`` activation Gram; only its diagonal is read. NaN counts as alive.

    Returns
    -------
    int
        Entries of the diagonal that are at most ``DEAD_SHARE`` of its mean.
    """
    energy = gram.diagonal()
    return int((energy <= DEAD_SHARE * energy.mean()).sum())


def whiten_gram(gram: torch.Tensor, name: str) -> Whitening:
    """Walk the ladder for one activation Gram.

    Parameters
    ----------
    gram : torch.Tensor
        ``[d, d]`` float64, symmetric, ``X^T X / n_tokens`` (any positive scale).
    name : str
        Module or input name, for messages.

    Returns
    -------
    Whitening
        Factor with ``factor.T @ factor = gram / scale`` plus the recorded regularisation.

    Raises
    ------
    InputError
        The Gram is not square or not finite.
    WhiteningError
        The Gram is zero, or even its eigendecomposition failed.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise InputError(f"{name}: activation Gram has shape {tuple(gram.shape)}, expected square")
    gram = gram.double()
    if not torch.isfinite(gram).all():
        raise InputError(f"{name}: activation Gram holds non-finite values; check the calibration")
    d = gram.shape[0]
    scale = float(gram.diagonal().mean())
    if scale <= 0.0:
        raise WhiteningError(f"{name}: every calibration activation is zero")
    scaled = (gram + gram.T) * (0.5 / scale)

    steps: list[str] = []
    n_dead = int((scaled.diagonal() <= 0).sum())
    if n_dead:
        steps.append(f"{n_dead} of {d} input channels are always zero")
    for shift in (0.0, *RELATIVE_SHIFTS):
        factor = _cholesky(scaled, shift)
        if factor is not None:
            steps.append(
                "cholesky" if shift == 0.0 else f"cholesky with relative shift {shift:.0e}"
            )
            return Whitening(factor, None, "cholesky", scale, shift, tuple(steps))
    steps.append(f"cholesky failed up to relative shift {RELATIVE_SHIFTS[-1]:.0e}")
    return _eigen(scaled, scale, steps, name)


def _cholesky(scaled: torch.Tensor, shift: float) -> torch.Tensor | None:
    shifted = scaled
    if shift:
        shifted = scaled.clone()
        shifted.diagonal().add_(shift)
    factor, info = torch.linalg.cholesky_ex(shifted, upper=True)
    if int(info) != 0:
        return None
    pivots = factor.diagonal()
    # A pivot at rounding level means the matrix is singular in fp64 whatever LAPACK says.
    if float(pivots.min()) < MIN_PIVOT_RATIO * float(pivots.max()):
        return None
    return factor


def _eigen(scaled: torch.Tensor, scale: float, steps: list[str], name: str) -> Whitening:
    try:
        values, vectors = torch.linalg.eigh(scaled)
    except RuntimeError as error:
        raise WhiteningError(f"{name}: eigendecomposition of the Gram failed: {error}") from error
    top = float(values[-1])
    if not top > 0.0:
        raise WhiteningError(f"{name}: the Gram has no positive eigenvalue")
    floor = EIGEN_FLOOR * top
    n_floored = int((values < floor).sum())
    roots = values.clamp_min(floor).sqrt()
    steps.append(
        f"eigen form, {n_floored} of {values.numel()} eigenvalues floored at {EIGEN_FLOOR:.0e}"
    )
    factor = roots[:, None] * vectors.T
    inverse = vectors / roots
    return Whitening(factor, inverse, "eigen", scale, EIGEN_FLOOR, tuple(steps))


def weighted_energy(gram: torch.Tensor, matrix: torch.Tensor) -> float:
    """``||X M^T||^2 = trace(M G M^T)`` for ``matrix [d_out, d_in]`` in fp64, from the Gram itself.

    The reported errors use this and not the regularised factor, so that they are what the calibration
    text saw.
    """
    m = matrix.double()
    return float(((m @ gram.double()) * m).sum().clamp_min(0.0))


def relative_error(gram: torch.Tensor, weight: torch.Tensor, approximation: torch.Tensor) -> float:
    """``||X (W - W~)||_F / ||X W||_F`` over the calibration tokens, from the Gram; not squared.

    Parameters
    ----------
    gram : torch.Tensor
        ``[d_in, d_in]`` activation Gram.
    weight, approximation : torch.Tensor
        ``[d_out, d_in]``.
    """
    total = weighted_energy(gram, weight)
    lost = weighted_energy(gram, weight.double() - approximation.double())
    if total == 0.0:
        return 0.0 if lost == 0.0 else float("inf")
    return (lost / total) ** 0.5


def weight_error(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    """``||W - W~||_F / ||W||_F``, no calibration in it; zero for a zero weight."""
    norm = float(weight.double().norm())
    return float((weight.double() - approximation.double()).norm()) / norm if norm else 0.0
