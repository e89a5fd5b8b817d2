"""Speed of single compressed projections against dense ones of the same shape, from memory, in one run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cospadi import native
from cospadi.errors import CospadiError
from cospadi.evaluation.timing import Timing, clock_of, measure_in_turn
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import FactorSpec
from cospadi.learn.budget import StorageWidths
from cospadi.learn.methods import factor_size
from cospadi.model.huge_pages import use_huge_pages
from cospadi.model.layers import CospadiLinear
from cospadi.native import CODE_FORMATS
from cospadi.native.support import torch_threads

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "smollm2-135m": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "qwen2.5-0.5b": ((896, 896), (896, 128), (896, 4864), (4864, 896)),
    "llama-3.2-1b": ((2048, 2048), (2048, 512), (2048, 8192), (8192, 2048)),
    "llama-3-8b": ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)),
}
"""Inputs and outputs of q and o, k and v, gate and up, down."""

ROWS = (1, 4, 16, 128, 1024)

TORCH_BF16, TORCH_FP32, OWN_DENSE = "torch bf16", "torch fp32", "dense bf16, our kernel"

_LEARNED_SHARE = 0.2  # of the default preset
_SUPPORTS = 256  # different ones, each given to many outputs: drawing one per output takes minutes
_BURST = 8  # calls of a contender together, as a decoded token makes them
_BURST_ROWS = 32  # up to so many: calls with more take long enough alone
_TOLERANCE = 2e-2  # of the Frobenius norm: x D and y are rounded to bfloat16


@dataclass(frozen=True)
class LinearSpeed:
    """One contender at one shape and number of rows.

    Attributes
    ----------
    d_in, d_out, rows, threads : int
        Of the call.
    variant : str
        Contender; compressed ones are named by the type of their coefficients.
    n_atoms, sparsity : int
        Learned atoms beside the d_in inputs, and coefficients per output; 0 and d_in where dense.
    timing : Timing
        Seconds per call.
    bytes : int
        Of the matrix, all of which a call reads.
    flops : float
        Executed: a dense product's, ``2 rows (d_in K + (d_in + K) d_out)`` for a compressed one, whose zeros are
        multiplied too where there are many rows.
    error : float
        Against the same weight in float32 (Frobenius, relative).
    """

    d_in: int
    d_out: int
    rows: int
    threads: int
    variant: str
    n_atoms: int
    sparsity: int
    timing: Timing
    bytes: int
    flops: float
    error: float

    @property
    def byte_rate(self) -> float:
        """Bytes of the matrix per second."""
        return self.bytes / self.timing.median

    @property
    def flop_rate(self) -> float:
        """Executed operations per second."""
        return self.flops / self.timing.median

    def as_json(self) -> dict[str, Any]:
        """Return the fields and the rates."""
        rates = {"bytes_per_s": self.byte_rate, "flops_per_s": self.flop_rate}
        return asdict(self) | rates


def measure_linears(
    d_in: int,
    d_out: int,
    *,
    ratio: float,
    rows: int,
    coeffs: tuple[str, ...] = ("bfloat16", "int8"),
    threads: int = 1,
    repeats: int = 9,
    megabytes: int = 256,
) -> list[LinearSpeed]:
    """Time compressed projections of random values and dense ones in turn.

    Parameters
    ----------
    d_in, d_out : int
        Shape of the weight.
    ratio : float
        Removed share of the bytes; the same K and s for every type of coefficients, those of bfloat16, so that a
        narrower type shows what its bytes are worth.
    rows : int
        Rows of the input, which is bfloat16 (float32 for torch's float32 contender).
    coeffs : tuple of str
        "bfloat16" or names of `cospadi.native.CODE_FORMATS`.
    threads, repeats : int
        Threads of every contender, and rounds.
    megabytes : int
        Copies of every matrix are used in turn, so many megabytes together, that no cache holds them. Those for our
        kernels lie in huge pages (`cospadi.model.huge_pages`), torch's where torch puts them.

    Returns
    -------
    list of LinearSpeed
        Compressed ones first, then torch in bfloat16 and float32, then a dense bfloat16 product by our own kernel.

    Raises
    ------
    InputError
        `ratio` leaves nothing to store, or is out of range.
    CospadiError
        A result differs from the reference by more than rounding: no time is worth anything then.
    """
    size = factor_size(
        "cospadi",
        d_in,
        d_out,
        ratio,
        widths=StorageWidths(),
        dictionary="augmented",
        learned_share=_LEARNED_SHARE,
    )
    x = torch.randn(rows, d_in).bfloat16()
    contenders: dict[str, _Contender] = {}
    dense = torch.empty(0)
    for name in coeffs:
        factor = _random_factor(d_in, d_out, size.n_atoms, size.sparsity, name)
        layer = CospadiLinear.from_factor(factor, dtype=torch.bfloat16)
        dense = factor.dense_weight()
        contenders[name] = _Contender(
            _layers_in_turn(layer, megabytes, x),
            size.n_atoms,
            size.sparsity,
            factor.spec.stored_bytes,
            2.0 * rows * (d_in * size.n_atoms + (d_in + size.n_atoms) * d_out),
            _relative_error(layer(x), x, dense),
        )
    weight = dense.bfloat16()
    for name, inputs, matrix, product in (
        (TORCH_BF16, x, weight, F.linear),
        (TORCH_FP32, x.float(), dense, F.linear),
        (OWN_DENSE, x, weight, _own_dense),
    ):
        contenders[name] = _Contender(
            _products_in_turn(product, inputs, matrix, megabytes),
            0,
            d_in,
            matrix.nbytes,
            2.0 * rows * d_in * d_out,
            _relative_error(product(inputs, matrix), x, dense),
        )
    calls = {name: contender.call for name, contender in contenders.items()}
    with torch.inference_mode(), torch_threads(threads):
        timings = measure_in_turn(
            calls,
            repeats=repeats,
            clock=clock_of(threads),
            burst=_BURST if rows <= _BURST_ROWS else 1,
        )
    return [
        LinearSpeed(
            d_in,
            d_out,
            rows,
            threads,
            name,
            one.n_atoms,
            one.sparsity,
            timings[name],
            one.bytes,
            one.flops,
            one.error,
        )
        for name, one in contenders.items()
    ]


@dataclass(frozen=True)
class _Contender:
    call: Callable[[], torch.Tensor]
    n_atoms: int
    sparsity: int
    bytes: int
    flops: float
    error: float


def _random_factor(
    d_in: int, d_out: int, n_atoms: int, sparsity: int, coeffs_dtype: str
) -> SparseFactor:
    spec = FactorSpec(
        d_in=d_in,
        d_out=d_out,
        n_atoms=n_atoms,
        sparsity=sparsity,
        support="mask" if sparsity < n_atoms + d_in else "full",
        bias=False,
        n_identity=d_in,
        coeffs_dtype=coeffs_dtype,
    )
    total = spec.total_atoms
    tensors = {"dictionary": (torch.randn(d_in, n_atoms) / d_in**0.5).bfloat16()}
    if spec.support == "mask":
        supports = torch.rand(min(_SUPPORTS, d_out), total).argsort(1)[:, :sparsity].sort(1).values
        masks = native.pack_mask(supports.int(), total)
        tensors["mask"] = masks[torch.randint(len(masks), (d_out,))]
    if coeffs_dtype == "bfloat16":
        tensors["coeffs"] = torch.randn(d_out, sparsity).bfloat16()
    else:
        form = CODE_FORMATS[coeffs_dtype]
        if form.has_scale:
            largest = 2 ** (form.bits - 1) - 1
            fields = torch.randint(-largest, largest + 1, (d_out, sparsity)).int()
            tensors["coeffs_scale"] = torch.full((d_out, 1), 1.0 / largest).bfloat16()
        else:
            values = torch.randn(d_out, sparsity).bfloat16().view(torch.int16)
            fields = (values.int() & 0xFFFF) >> (16 - form.bits)
        tensors["coeffs"] = native.pack_fields(fields, form.bits)
    return SparseFactor.from_tensors(spec, tensors)


def _own_dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    d_in = weight.shape[1]
    return native.linear(x, None, None, True, None, weight, d_in, None, None, 0, None)


def _relative_error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    expected = x.float() @ weight.T
    error = float((y.detach().float() - expected).norm() / expected.norm())
    if not error <= _TOLERANCE:
        raise CospadiError(
            f"a product {weight.shape[1]} x {weight.shape[0]} differs from its reference by {error:.2e}"
        )
    return error


def _n_copies(n_bytes: int, megabytes: int) -> int:
    return max(1, -(-(megabytes << 20) // n_bytes))


def _layers_in_turn(
    layer: CospadiLinear, megabytes: int, x: torch.Tensor
) -> Callable[[], torch.Tensor]:
    n_copies = _n_copies(layer.spec.stored_bytes, megabytes)
    copies = [layer] + [copy.deepcopy(layer) for _ in range(n_copies - 1)]
    use_huge_pages(copies)  # as loading a checkpoint does
    turn = itertools.cycle(copies)
    return lambda: next(turn)(x)


def _products_in_turn(
    product: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, megabytes: int
) -> Callable[[], torch.Tensor]:
    copies = [weight]
    copies += [weight.clone() for _ in range(_n_copies(weight.nbytes, megabytes) - 1)]
    # our kernels shall differ in the format alone; torch's memory is what its users have
    if product is _own_dense:
        holder = nn.ParameterList(nn.Parameter(one, requires_grad=False) for one in copies)
        use_huge_pages([holder])
        copies = list(holder)
    turn = itertools.cycle(copies)
    return lambda: product(x, next(turn))
