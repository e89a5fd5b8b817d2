"""A stored factor in a form whose values gradients can move, on the support that it has."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from cospadi.errors import InputError
from cospadi.factor.sparse_factor import SparseFactor


def is_tunable(factor: SparseFactor) -> bool:
    """Whether all numbers of the factor are floating-point: integers and 14-bit fields have no gradients."""
    return factor.packing is None and factor.dictionary_scale is None


class TunableLinear(nn.Module):
    """The projection of a factor, computed through its dense weight ``S_I + S_L D^T`` in float32.

    For thousands of tokens per step multiplying the factor out costs next to nothing and makes both directions dense
    products; a compressed layer's own kernels are made for inference.

    Parameters
    ----------
    factor : SparseFactor
        See `is_tunable`. Not changed.
    tunes_dictionary : bool
        False where other layers use the dictionary too.

    Raises
    ------
    InputError
        The factor holds packed numbers.

    Attributes
    ----------
    code : torch.nn.Parameter
        ``[d_out, total_atoms]``; only values on the support count.
    dictionary : torch.nn.Parameter or None
        ``[d_in, n_atoms]``.
    """

    support: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, factor: SparseFactor, *, tunes_dictionary: bool = True) -> None:
        super().__init__()
        if not is_tunable(factor):
            raise InputError("a factor in integers or 14-bit fields cannot be tuned by gradients")
        self._factor = factor
        self.code = nn.Parameter(factor.dense_code())
        index = factor.indices().long()
        self._index = index
        self.register_buffer("support", torch.zeros_like(self.code).scatter_(1, index, 1.0))
        dictionary = factor.float_dictionary()
        self.dictionary = (
            None
            if dictionary is None
            else nn.Parameter(dictionary.clone(), requires_grad=tunes_dictionary)
        )
        bias = factor.bias
        self.register_buffer("bias", None if bias is None else bias.float())

    def weight(self) -> torch.Tensor:
        """The dense weight ``[d_out, d_in]``."""
        code = self.code * self.support
        if self.dictionary is None:
            return code
        n_identity = self._factor.n_identity
        weight = code[:, n_identity:] @ self.dictionary.T
        return weight + code[:, :n_identity] if n_identity else weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x [..., d_in]`` to ``[..., d_out]``."""
        return F.linear(x, self.weight(), self.bias)

    def step_sizes(self) -> list[tuple[nn.Parameter, float]]:
        """The parameters to tune, each with the root mean square of its stored values: the scale of a step."""
        sizes = [(self.code, self._factor.coeffs)]
        if self.dictionary is not None and self.dictionary.requires_grad:
            sizes.append((self.dictionary, self.dictionary))
        return [
            (parameter, float(values.detach().float().square().mean().sqrt()))
            for parameter, values in sizes
            if values.numel()
        ]

    def rounded(self) -> SparseFactor:
        """The factor with the values as they are now, in its storage types."""
        old = self._factor
        dictionary = old.dictionary
        if dictionary is not None and self.dictionary is not None:
            dictionary = self.dictionary.detach().to(dictionary.device, dictionary.dtype)
        code = self.code.detach().to(self._index.device)
        coeffs = code.gather(1, self._index).to(old.coeffs.dtype)
        return replace(old, coeffs=coeffs.contiguous(), dictionary=dictionary)
