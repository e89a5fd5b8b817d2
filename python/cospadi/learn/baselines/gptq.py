"""GPTQ-style quantisation of the dense weight (Frantar et al., arXiv 2210.17323)."""

from __future__ import annotations

import dataclasses

import torch

from cospadi import native
from cospadi.learn.quantize import QuantisedCoeffs, quantise_integers
from cospadi.learn.result import FloatFactor, full_identity

DAMPING = 0.01
"""Ridge relative to the mean diagonal of the Gram, as in the paper's code."""


def gptq(
    weight: torch.Tensor, gram: torch.Tensor, bits: int, *, group: int = 0
) -> tuple[FloatFactor, QuantisedCoeffs]:
    """Symmetric integers, every rounding error passed on to the inputs that are not rounded yet.

    Inputs with the largest activations first (the paper's ``act-order``), scales fixed before, those of the smallest
    squared error. No coordinate descent afterwards: that is not part of the method.

    Parameters
    ----------
    weight : torch.Tensor
        ``[d_out, d_in]``.
    gram : torch.Tensor
        ``[d_in, d_in]`` activation Gram.
    bits : int
        3, 4, 5, 6 or 8.
    group : int
        Inputs that share a scale; 0: one scale per output.

    Returns
    -------
    (FloatFactor, QuantisedCoeffs)
        Identity atoms with full support whose coefficients are the decoded values, and the integers.
    """
    d_in = weight.shape[1]
    scaled = (gram / gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)).float()
    chosen = quantise_integers(weight, bits, group=group)
    assert chosen.scale is not None
    steps = chosen.scale.float()
    fields = native.round_code(  # on the CPU, as `cospadi.learn.feedback`
        scaled.contiguous().cpu(),
        None,
        weight.float().contiguous().cpu(),
        steps.cpu(),
        2 ** (bits - 1) - 1,
        group=group,
        damping=DAMPING,
        sweeps=0,
    ).fields.to(weight.device)
    per_value = steps.repeat_interleave(group or d_in, dim=1)[:, :d_in]
    quantised = dataclasses.replace(chosen, fields=fields, values=fields * per_value)
    return full_identity(quantised.values), quantised
