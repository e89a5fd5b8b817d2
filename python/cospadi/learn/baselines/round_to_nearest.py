"""Round-to-nearest quantisation of the dense weight, what people do today."""

from __future__ import annotations

import torch

from cospadi.learn.quantize import QuantisedCoeffs, quantise_integers
from cospadi.learn.result import FloatFactor, full_identity


def round_to_nearest(
    weight: torch.Tensor, bits: int, *, group: int = 0
) -> tuple[FloatFactor, QuantisedCoeffs]:
    """Symmetric integers of ``bits`` bits with a scale per output or per ``group`` consecutive inputs.

    The scale is the largest magnitude over ``2^(bits-1) - 1``, nothing is clipped.

    Parameters
    ----------
    weight : torch.Tensor
        ``[d_out, d_in]``.
    bits : int
        3, 4, 5, 6 or 8.
    group : int
        Inputs that share a scale; 0: one scale per output.

    Returns
    -------
    (FloatFactor, QuantisedCoeffs)
        Identity atoms with full support whose coefficients are the decoded values, and the integers.
    """
    quantised = quantise_integers(weight, bits, group=group, clip_factors=(1.0,))
    return full_identity(quantised.values), quantised
