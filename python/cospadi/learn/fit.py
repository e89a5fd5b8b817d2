"""One weight and its calibration statistics in, one stored factor and its report out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from cospadi.errors import FitError
from cospadi.factor import SparseFactor
from cospadi.learn.init import signal_svd
from cospadi.learn.learner import IterationStats, learn
from cospadi.learn.options import LearnOptions
from cospadi.learn.refit import refit_coefficients
from cospadi.learn.whitening import Whitening, relative_error

Method = Literal["cospadi", "svd", "svd-llm"]
METHODS: tuple[Method, ...] = ("cospadi", "svd-llm", "svd")


@dataclass(frozen=True)
class FitReport:
    """What happened to one weight.

    Attributes
    ----------
    relative_error : float
        ``||X (W - W~)||_F / ||X W||_F`` over the calibration text, of the factor as stored (rounded).
    weight_error : float
        ``||W - W~||_F / ||W||_F``, no calibration in it.
    seconds : float
        Wall time of the fit.
    whitening : tuple of str
        Steps of the whitening ladder.
    history : tuple of IterationStats
        Alternations; empty for the low-rank methods.
    """

    relative_error: float
    weight_error: float
    seconds: float
    whitening: tuple[str, ...]
    history: tuple[IterationStats, ...]


def fit_low_rank(
    weight: torch.Tensor, whitening: Whitening, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best rank-``rank`` factors in the whitened norm (SVD-LLM step 1; with L = I plain truncated SVD).

    The singular values are split evenly between both factors, as in SVD-LLM, so that neither overflows
    a 16-bit type.

    Returns
    -------
    (dictionary, coeffs)
        ``[d_in, rank]`` and ``[d_out, rank]``, float64.
    """
    svd = signal_svd(whitening.whiten(weight))
    roots = svd.values[:rank].sqrt()
    dictionary = whitening.unwhiten_atoms(svd.right[:rank] * roots[:, None])
    return dictionary, svd.left[:, :rank] * roots


def fit_module(
    name: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    gram: torch.Tensor,
    whitening: Whitening,
    *,
    method: Method,
    n_atoms: int,
    sparsity: int,
    options: LearnOptions,
    storage_dtype: torch.dtype = torch.bfloat16,
    num_threads: int | None = None,
    progress: Callable[[IterationStats], None] | None = None,
) -> tuple[SparseFactor, FitReport]:
    """Fit one weight.

    Parameters
    ----------
    name : str
        Module name, for messages.
    weight : torch.Tensor
        ``[d_out, d_in]`` float32.
    bias : torch.Tensor or None
        ``[d_out]``, kept as it is.
    gram : torch.Tensor
        ``[d_in, d_in]`` float64 activation Gram, for the reported error.
    whitening : Whitening
        Factor used by the fit (identity for ``method="svd"``).
    method : {"cospadi", "svd", "svd-llm"}
        See `METHODS`; the low-rank ones ignore ``sparsity`` and ``options``.
    n_atoms, sparsity : int
        K and s (rank and rank for the low-rank methods).
    options : LearnOptions
        Of the dictionary learner.
    storage_dtype : torch.dtype
        Type the factors are rounded to.

    Returns
    -------
    (SparseFactor, FitReport)

    Raises
    ------
    FitError
        The result is not finite, or worse than storing nothing (relative error above one).
    """
    start = time.perf_counter()
    if method == "cospadi":
        stored, history = _fit_sparse(
            weight,
            bias,
            whitening,
            n_atoms,
            sparsity,
            options,
            storage_dtype,
            num_threads,
            progress,
        )
    else:
        dictionary, coeffs = fit_low_rank(weight, whitening, n_atoms)
        stored = SparseFactor(
            dictionary=dictionary.to(storage_dtype).contiguous(),
            mask=None,
            coeffs=coeffs.to(storage_dtype).contiguous(),
            bias=None if bias is None else bias.to(storage_dtype),
        )
        history = ()
    approximation = stored.dense_weight(torch.float64)
    if not bool(torch.isfinite(approximation).all()):
        raise FitError(f"{name}: the fitted factor is not finite in {storage_dtype}")
    norm = float(weight.double().norm())
    report = FitReport(
        relative_error=relative_error(gram, weight, approximation),
        weight_error=float((weight.double() - approximation).norm()) / norm if norm else 0.0,
        seconds=time.perf_counter() - start,
        whitening=whitening.steps,
        history=history,
    )
    if not report.relative_error <= 1.0:
        raise FitError(
            f"{name}: the fitted factor has relative error {report.relative_error:.3f}, worse than zero weights"
        )
    return stored, report


def _fit_sparse(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    whitening: Whitening,
    n_atoms: int,
    sparsity: int,
    options: LearnOptions,
    storage_dtype: torch.dtype,
    num_threads: int | None,
    progress: Callable[[IterationStats], None] | None,
) -> tuple[SparseFactor, tuple[IterationStats, ...]]:
    signals = whitening.whiten(weight).float()
    # Seeding per shape would give all layers the same random start; the seed itself is part of options.
    result = learn(
        signals, n_atoms, sparsity, replace(options), num_threads=num_threads, progress=progress
    )
    dictionary = whitening.unwhiten_atoms(result.atoms)
    # Un-whitened columns differ in norm by the condition of L; unit columns round alike in every dtype
    # and keep float16 in range. The scale moves into the coefficients.
    norms = dictionary.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    dictionary = dictionary / norms
    coeffs = result.coeffs.double() * norms[result.indices.long()]
    # The code is refitted to the dictionary as stored: that compensates its rounding, and the last atom
    # update, which moved atoms after their coefficients.
    rounded = dictionary.to(storage_dtype)
    refitted = refit_coefficients(
        signals, whitening.whiten_atoms(rounded).float(), result.indices, coeffs.float()
    )
    stored = SparseFactor.from_indices(
        rounded.contiguous(),
        result.indices,
        refitted.to(storage_dtype),
        None if bias is None else bias.to(storage_dtype),
    )
    return stored, result.history
