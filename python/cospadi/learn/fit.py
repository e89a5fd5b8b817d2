"""Weights with their calibration statistics in; stored factors and reports out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch

from cospadi.errors import FitError, InputError
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.learn.baselines import (
    basis_sharing,
    compot,
    gptq,
    magnitude,
    rocket,
    round_to_nearest,
    sparsegpt,
    wanda,
)
from cospadi.learn.choice import learn_dictionary, shortlist
from cospadi.learn.group import GroupFit, GroupObjective
from cospadi.learn.init import signal_svd
from cospadi.learn.learner import IterationStats
from cospadi.learn.member import Member
from cospadi.learn.methods import METHODS, FactorSize
from cospadi.learn.options import LearnOptions
from cospadi.learn.output_metric import OutputMetric, RowScales
from cospadi.learn.quantize import INTEGER_BITS, QuantisedCoeffs, QuantisedDictionary, StorageTypes
from cospadi.learn.result import FloatFactor
from cospadi.learn.rounding import RoundedFactor, round_factors, rounding_error
from cospadi.learn.whitening import (
    Whitening,
    count_dead_inputs,
    relative_error,
    weight_error,
)

SPECTRUM_POINTS = 64
"""Points of the curves that reports keep of a spectrum."""


@dataclass(frozen=True)
class FitInput:
    """One weight to fit.

    Attributes
    ----------
    name : str
        Module name, for messages.
    weight : torch.Tensor
        ``[d_out, d_in]`` float32, what is measured against.
    bias : torch.Tensor or None
        ``[d_out]``, kept as it is.
    gram : torch.Tensor
        ``[d_in, d_in]`` float64 activation Gram for the reported error.
    whitening : Whitening
        Metric of the fit.
    target : torch.Tensor or None
        ``[d_out, d_in]`` weight to approximate instead (sequential calibration); None: `weight`.
    output : OutputMetric, RowScales or None
        What errors of the output do to the prediction; None: outputs count alike. `RowScales` are for CoSpaDi with
        floating-point coefficients.
    with_spectrum : bool
        Keep the spectrum in the report. It costs a singular value decomposition of the weight, as much as a good part
        of a fit, so it is for the few weights that somebody will look at.
    n_tokens : int or None
        Calibration tokens behind `gram`, for the report; None: no text.
    """

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    gram: torch.Tensor
    whitening: Whitening
    target: torch.Tensor | None = None
    output: OutputMetric | RowScales | None = None
    with_spectrum: bool = False
    n_tokens: int | None = None

    def member(self) -> Member:
        """What the fit approximates, in its metric; its rows scaled where the output has `RowScales`."""
        target = self.weight if self.target is None else self.target
        if isinstance(self.output, RowScales):
            scales = self.output.scales.to(target.dtype)
            return Member(target * scales[:, None], self.whitening)
        return Member(target, self.whitening, self.output)


@dataclass(frozen=True)
class FitSettings:
    """How a weight is fitted and stored.

    Attributes
    ----------
    method : str
        Key of `METHODS`.
    size : FactorSize
        K and s.
    types : StorageTypes
        Of dictionary and coefficients.
    options : LearnOptions
        Of the dictionary learner; the other methods ignore it.
    refit : bool
        Least-squares refit of what is not rounded yet (CoSpaDi only: the others round and stop, as their papers do).
    objective : {"averaged", "exact"}
        Of a shared dictionary.
    bias_dtype : torch.dtype
        Storage type of biases.
    candidates : tuple of FactorSize
        Sizes to choose from (CoSpaDi only; `cospadi.learn.choice`); without them `size` alone.
    """

    method: str
    size: FactorSize
    types: StorageTypes
    options: LearnOptions
    refit: bool = True
    objective: GroupObjective = "exact"
    bias_dtype: torch.dtype = torch.bfloat16
    candidates: tuple[FactorSize, ...] = ()


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
        Wall time of the fit; members of a group share it evenly.
    whitening : tuple of str
        Steps of the whitening ladder.
    history : tuple of IterationStats
        Alternations of the learner; empty for the other methods.
    group_errors : tuple of float
        Relative error of the exact group objective: of the averaged solution, then after every alternation.
    spectrum : dict or None
        ``singular_values`` of the whitened weight, and ``support_use``, the share of outputs that use each atom, both
        in descending order at up to `SPECTRUM_POINTS` points; only where the input asked for it and a dictionary was
        learned.
    n_tokens, n_dead_inputs : int or None
        Calibration tokens that reached the weight, and inputs that they left at zero
        (`cospadi.learn.whitening.count_dead_inputs`); None without a text.
    """

    relative_error: float
    weight_error: float
    seconds: float
    whitening: tuple[str, ...]
    history: tuple[IterationStats, ...] = ()
    group_errors: tuple[float, ...] = ()
    spectrum: dict[str, list[float]] | None = None
    n_tokens: int | None = None
    n_dead_inputs: int | None = None


def fit(
    inputs: Sequence[FitInput],
    settings: FitSettings,
    *,
    joint: Whitening | None = None,
    num_threads: int | None = None,
    progress: Callable[[IterationStats], None] | None = None,
) -> list[tuple[SparseFactor, FitReport]]:
    """Fit one weight, or several with one dictionary.

    Parameters
    ----------
    inputs : sequence of FitInput
        Equal ``d_in``; more than one only for a method that can share. All tensors on one device, where the fit runs.
    settings : FitSettings
        Method, sizes and storage types.
    joint : Whitening, optional
        Of the mean of the inputs' Grams; needed for more than one.
    num_threads : int, optional
        Threads of the native kernels.
    progress : callable, optional
        Receives every alternation of the learner.

    Returns
    -------
    list of (SparseFactor, FitReport)
        In the order of `inputs`; factors lie on the CPU. The first one owns the dictionary that all of them hold.

    Raises
    ------
    InputError
        Several weights for a method that shares nothing, or without `joint`.
    FitError
        A result is not finite, or worse than storing nothing (relative error above one).
    """
    start = time.perf_counter()
    if len(inputs) > 1 and (joint is None or not METHODS[settings.method].can_share):
        raise InputError(
            f"{inputs[0].name}: {settings.method} cannot fit {len(inputs)} weights with one dictionary"
        )
    joint = joint or inputs[0].whitening
    history: tuple[IterationStats, ...] = ()
    group_errors: tuple[float, ...] = ()
    if settings.method == "cospadi":
        fitted, rounded = _learn(inputs, settings, joint, num_threads, progress)
        rounded = [_unscaled(*pair) for pair in zip(inputs, rounded, strict=True)]
        history, group_errors = fitted.history, fitted.exact_errors
    else:
        rounded = _fit_baseline(inputs, settings, joint)
    stored = _store(inputs, rounded, settings)
    seconds = (time.perf_counter() - start) / len(inputs)
    reports = [
        _report(item, factor, seconds, history, group_errors if len(inputs) > 1 else ())
        for item, factor in zip(inputs, stored, strict=True)
    ]
    return list(zip(stored, reports, strict=True))


def _learn(
    inputs: Sequence[FitInput],
    settings: FitSettings,
    joint: Whitening,
    num_threads: int | None,
    progress: Callable[[IterationStats], None] | None,
) -> tuple[GroupFit, list[RoundedFactor]]:
    """Fit and round; of several sizes the one with the least error as stored."""
    members = [item.member() for item in inputs]
    sizes: Sequence[FactorSize] = [settings.size]
    if len(settings.candidates) > 1:
        sizes = shortlist(
            members, joint, settings.candidates, settings.options, num_threads=num_threads
        )
    results = []
    for size in sizes:
        fitted = learn_dictionary(
            members,
            joint,
            size,
            settings.options,
            objective=settings.objective,
            num_threads=num_threads,
            progress=progress,
        )
        rounded = round_factors(
            fitted.members, fitted.factors, settings.types, refit=settings.refit
        )
        results.append((fitted, rounded))
    if len(results) == 1:
        return results[0]
    return min(results, key=lambda result: rounding_error(members, result[1]))


def _unscaled(item: FitInput, factor: RoundedFactor) -> RoundedFactor:
    """The factor of the weight itself where its rows were scaled: other exponents, the same digits."""
    if not isinstance(item.output, RowScales):
        return factor
    coeffs = factor.coeffs
    if coeffs.fields is not None:
        raise InputError(
            f"{item.name}: scaled rows: expected floating-point coefficients, got {coeffs.dtype}"
        )
    values = coeffs.values / item.output.scales.to(coeffs.values.dtype)[:, None]
    return replace(factor, coeffs=replace(coeffs, values=values))


def _fit_baseline(
    inputs: Sequence[FitInput], settings: FitSettings, joint: Whitening
) -> list[RoundedFactor]:
    members = [item.member() for item in inputs]
    weight, whitening, gram = members[0].weight, inputs[0].whitening, inputs[0].gram
    size, types = settings.size, settings.types
    factors: list[FloatFactor]
    if METHODS[settings.method].form == "rounded":
        bits, group = INTEGER_BITS[types.coeffs], types.coeffs_group
        if settings.method == "gptq":
            factor, quantised = gptq(weight, gram, bits, group=group)
        else:
            factor, quantised = round_to_nearest(weight, bits, group=group)
        nothing = QuantisedDictionary("bfloat16", factor.dictionary.float())
        return [RoundedFactor(nothing, factor.indices, quantised, factor.n_identity)]
    if settings.method in ("svd", "svd-llm", "basis-sharing"):
        factors = basis_sharing([m.weight for m in members], joint, size.n_atoms)
    elif settings.method == "compot":
        factors = [compot(weight, whitening, size.n_atoms, size.sparsity)]
    elif settings.method == "rocket":
        factors = [rocket(weight, whitening, size.n_atoms, size.sparsity)]
    elif settings.method == "magnitude":
        factors = [magnitude(weight, size.sparsity)]
    elif settings.method == "wanda":
        factors = [wanda(weight, gram, size.sparsity)]
    elif settings.method == "sparsegpt":
        factors = [sparsegpt(weight, gram, size.sparsity)]
    else:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {settings.method!r}")
    return round_factors(members, factors, types, refit=False)


def _store(
    inputs: Sequence[FitInput], rounded: Sequence[RoundedFactor], settings: FitSettings
) -> list[SparseFactor]:
    dictionary, scale = (_on_cpu(part) for part in _stored_dictionary(rounded[0].dictionary))
    factors = []
    for index, (item, factor) in enumerate(zip(inputs, rounded, strict=True)):
        coeffs: QuantisedCoeffs = factor.coeffs
        is_full = factor.decoded().full_support
        packed = coeffs.fields is not None
        values = coeffs.fields if coeffs.fields is not None else coeffs.values
        factors.append(
            SparseFactor.from_indices(
                dictionary,
                None if is_full else factor.indices.cpu(),
                _on_cpu(values if packed else values.to(STORAGE_DTYPES[coeffs.dtype]).contiguous()),
                None if item.bias is None else item.bias.to("cpu", settings.bias_dtype),
                n_identity=factor.n_identity,
                packed_dtype=coeffs.dtype if packed else None,
                coeffs_scale=_on_cpu(coeffs.scale),
                coeffs_group=coeffs.group,
                dictionary_scale=scale,
                owns_dictionary=index == 0 or dictionary is None,
            )
        )
    return factors


@overload
def _on_cpu(part: torch.Tensor) -> torch.Tensor: ...


@overload
def _on_cpu(part: None) -> None: ...


def _on_cpu(part: torch.Tensor | None) -> torch.Tensor | None:
    return None if part is None else part.cpu()


def _stored_dictionary(
    dictionary: QuantisedDictionary,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if dictionary.values.shape[1] == 0:
        return None, None
    if dictionary.fields is None:
        return dictionary.values.to(STORAGE_DTYPES[dictionary.dtype]).contiguous(), None
    return dictionary.fields.to(torch.int8).contiguous(), dictionary.scale


def _report(
    item: FitInput,
    factor: SparseFactor,
    seconds: float,
    history: tuple[IterationStats, ...],
    group_errors: tuple[float, ...],
) -> FitReport:
    approximation = factor.dense_weight(torch.float64, device=item.weight.device)
    if not bool(torch.isfinite(approximation).all()):
        raise FitError(f"{item.name}: the fitted factor is not finite as stored")
    error = relative_error(item.gram, item.weight, approximation)
    if not error <= 1.0:
        raise FitError(
            f"{item.name}: the fitted factor has relative error {error:.3f}, worse than zero weights"
        )
    return FitReport(
        relative_error=error,
        weight_error=weight_error(item.weight, approximation),
        seconds=seconds,
        whitening=item.whitening.steps,
        history=history,
        group_errors=group_errors,
        spectrum=_spectrum(item, factor) if item.with_spectrum and history else None,
        n_tokens=item.n_tokens,
        n_dead_inputs=None if item.n_tokens is None else count_dead_inputs(item.gram),
    )


def _spectrum(item: FitInput, factor: SparseFactor) -> dict[str, list[float]]:
    values = signal_svd(item.whitening.whiten(item.weight)).values
    use = (factor.dense_code() != 0).double().mean(0).sort(descending=True).values
    return {"singular_values": _sampled(values), "support_use": _sampled(use)}


def _sampled(curve: torch.Tensor) -> list[float]:
    """Evenly spaced points of a curve, both ends among them."""
    count = min(SPECTRUM_POINTS, curve.numel())
    positions = torch.linspace(0, curve.numel() - 1, count).round().long()
    return [float(value) for value in curve.cpu()[positions]]
