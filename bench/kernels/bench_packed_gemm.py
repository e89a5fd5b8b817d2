"""Column-sparse product with packed coefficients against bfloat16 ones and against torch's dense bfloat16 linear.

Two matrices: ``sparse`` (K = 2048, s = 1024, 8192 outputs) with a mask, and ``full`` (2048 inputs, 2048 outputs, every
input used), the product of an int8 dictionary or of a quantised dense weight. z is bfloat16. The operands are copies
taken in turn, larger together than the caches, so that they come from memory.

Bytes: what a call must read of the matrix, mask and scales included. ``x_bf16`` relates the time to that of the same
matrix with bfloat16 coefficients, ``bytes_x_bf16`` the bytes: the ratio to expect if memory were all that counts.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness
from cospadi import native

SHAPES = {"sparse": (2048, 1024, 8192), "full": (2048, 2048, 2048)}
"""Name to atoms, coefficients per output, outputs."""

FORMS = {
    "sparse": [("bfloat14", 0), ("int8", 0), ("int8", 128), ("int4", 0), ("int4", 128)],
    "full": [("int8", 0), ("int8", 128), ("int4", 0), ("int4", 128)],
}
"""Format and group of the packed contenders."""

TOLERANCE = 5e-3
"""Largest relative error (Frobenius): y is rounded to bfloat16 once."""


@dataclass(frozen=True)
class Contender:
    """One stored form of a matrix.

    Attributes
    ----------
    name : str
        As printed.
    call : callable
        The product as a function of z and `tensors`.
    tensors : tuple of torch.Tensor
        What the call reads besides z.
    dense : torch.Tensor
        ``[d_out, K]`` the matrix that `tensors` stands for.
    """

    name: str
    call: Callable[..., torch.Tensor]
    tensors: tuple[torch.Tensor, ...]
    dense: torch.Tensor

    @property
    def n_bytes(self) -> int:
        """Bytes of `tensors`."""
        return sum(tensor.nbytes for tensor in self.tensors)


def packed_contender(
    name: str, group: int, mask: torch.Tensor | None, indices: torch.Tensor, n_atoms: int
) -> Contender:
    """Random fields in the format `name` on the support `indices` [d_out, s]."""
    form = native.CODE_FORMATS[name]
    d_out, sparsity = indices.shape
    if form.has_scale:
        largest = 2 ** (form.bits - 1) - 1
        fields = torch.randint(-largest, largest + 1, (d_out, sparsity)).int()
        n_groups = 1 if group == 0 else -(-sparsity // group)
        scale = (0.5 + torch.rand(d_out, n_groups)).bfloat16() / largest
    else:
        bits = torch.randn(d_out, sparsity).bfloat16().view(torch.int16).int() & 0xFFFF
        fields, scale = bits >> (16 - form.bits), None
    codes = native.pack_fields(fields, form.bits)
    coeffs = native.decode_coeffs(codes, sparsity, name, scale, group)
    dense = torch.zeros(d_out, n_atoms).scatter_(1, indices.long(), coeffs)
    tensors = tuple(tensor for tensor in (codes, mask, scale) if tensor is not None)

    def call(z: torch.Tensor, codes: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        rest = list(others)
        mask_copy = None if mask is None else rest.pop(0)
        scale_copy = rest.pop(0) if form.has_scale else None
        return native.packed_gemm(z, mask_copy, codes, sparsity, name, scale_copy, group, None)

    label = f"{name}, groups of {group}" if group else name
    return Contender(label, call, tensors, dense)


def make_contenders(shape: str) -> list[Contender]:
    """All stored forms of one random matrix shape; the first is the bfloat16 one."""
    n_atoms, sparsity, d_out = SHAPES[shape]
    indices = torch.rand(d_out, n_atoms).argsort(1)[:, :sparsity].sort(1).values.int()
    mask = native.pack_mask(indices, n_atoms)
    coeffs = torch.randn(d_out, sparsity).bfloat16()
    dense = torch.zeros(d_out, n_atoms).scatter_(1, indices.long(), coeffs.float())
    stored = [
        Contender("cospadi bf16", native.sparse_gemm, (mask, coeffs), dense),
        Contender("torch bf16", linear, (dense.bfloat16(),), dense),
    ]
    packed_mask = None if sparsity == n_atoms else mask
    return stored + [
        packed_contender(name, group, packed_mask, indices, n_atoms) for name, group in FORMS[shape]
    ]


def in_turn(contender: Contender, z: torch.Tensor, total: int) -> Callable[[], torch.Tensor]:
    """Return a call that uses the next copy of the operands each time, `total` bytes in all."""
    n_copies = max(1, -(-total // contender.n_bytes))
    copies = [contender.tensors] + [
        tuple(tensor.clone() for tensor in contender.tensors) for _ in range(n_copies - 1)
    ]
    turns = itertools.cycle(copies)
    return lambda: contender.call(z, *next(turns))


def check(contenders: list[Contender], z: torch.Tensor) -> list[str]:
    """Compare every contender with float32 torch; returns the failures."""
    failures = []
    for contender in contenders:
        expected = linear(z.float(), contender.dense)
        y = contender.call(z, *contender.tensors).float()
        error = ((y - expected).norm() / expected.norm()).item()
        if not error <= TOLERANCE:
            failures.append(f"{contender.name}, {len(z)} rows: relative error {error:.2e}")
    return failures


def bench_rows(
    contenders: list[Contender], rows: int, shape: str, args: argparse.Namespace
) -> list[harness.Result]:
    """Time all contenders at one batch size."""
    n_atoms, sparsity, d_out = SHAPES[shape]
    z = torch.randn(rows, n_atoms).bfloat16()
    total = args.memory_mb << 20 if rows <= 32 else 0
    repeats = args.repeats * (5 if rows <= 32 else 1)
    clock = "thread_cpu" if args.threads == 1 else "wall"
    calls = {contender.name: in_turn(contender, z, total) for contender in contenders}
    timings = harness.measure_in_turn(calls, repeats=repeats, clock=clock)
    base, base_bytes = timings[contenders[0].name].median, contenders[0].n_bytes
    sizes = {"rows": rows, "k": n_atoms, "s": sparsity, "d_out": d_out}
    return [
        harness.Result(
            contender.name,
            sizes,
            args.threads,
            timings[contender.name],
            rows,
            2.0 * rows * n_atoms * d_out,
            contender.n_bytes,
            {
                "x_bf16": round(base / timings[contender.name].median, 2),
                "bytes_x_bf16": round(base_bytes / contender.n_bytes, 2),
            },
        )
        for contender in contenders
    ]


def main() -> int:
    """Run the program."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128, 1024])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-mb", type=int, default=96, help="size of the copies in turn")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    results: list[harness.Result] = []
    failures: list[str] = []
    with torch.inference_mode():
        for shape in args.shapes:
            contenders = make_contenders(shape)
            if args.refcheck:
                for rows in (1, 40):  # both ways of multiplying
                    failures += check(contenders, torch.randn(rows, SHAPES[shape][0]).bfloat16())
            for rows in args.rows:
                lines = bench_rows(contenders, rows, shape, args)
                harness.print_results(f"{shape}, {rows} rows", lines, "rows")
                results += lines
    harness.write_json(args.json, "bench_packed_gemm", args, results, failures=failures)
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
