"""Column-sparse product y = z S against dense torch linear layers.

For each batch: our kernel with bfloat16 coefficients (z bfloat16 and float32), torch's linear of the same shape in
bfloat16 and float32, and torch's bfloat16 linear with as many bytes as S (fewer outputs: what the saved memory would
buy as a dense layer). ``cache``: one matrix, called again and again (llama1b-up's 19 to 67 MB fit in few L3 caches,
smollm-up's do). ``memory``: copies taken in turn, larger than the caches together.

Bytes: what a call must read of the matrix. Flops: ``2 rows K d_out`` of the dense product for all, so that rates
compare; the sparse product needs a fraction s / K of them. ``of_read_peak`` and ``of_gemm_peak`` relate them to a
plain read of memory and to torch's square product of the same dtype in the same run.
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

SHAPES = {
    "llama1b-up": (2048, 8192, 1024),
    "smollm-up": (488, 1536, 244),
    "smollm-down": (592, 576, 296),
}
"""Name to atoms, outputs and coefficients per output."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest relative error (Frobenius) of the check: torch's bfloat16 product rounds its inputs' sums once."""


@dataclass(frozen=True)
class Matrix:
    """S in its stored form and as dense weights [d_out, K]."""

    mask: torch.Tensor
    coeffs: torch.Tensor
    dense_bf16: torch.Tensor
    dense_f32: torch.Tensor

    @property
    def stored_bytes(self) -> int:
        """Bytes of mask and coefficients."""
        return self.mask.nbytes + self.coeffs.nbytes


def make_matrix(n_atoms: int, d_out: int, sparsity: int, seed: int = 0) -> Matrix:
    """Random supports, normal coefficients."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(d_out, n_atoms, generator=generator).argsort(1)[:, :sparsity]
    indices = order.sort(1).values.int()
    coeffs = torch.randn(d_out, sparsity, generator=generator).bfloat16()
    dense = torch.zeros(d_out, n_atoms).scatter_(1, indices.long(), coeffs.float())
    return Matrix(native.pack_mask(indices, n_atoms), coeffs, dense.bfloat16(), dense)


def clones(tensors: tuple[torch.Tensor, ...], total_bytes: int) -> list[tuple[torch.Tensor, ...]]:
    """Copies of the operands of one variant, at least `total_bytes` together."""
    size = sum(tensor.nbytes for tensor in tensors)
    copies = max(1, -(-total_bytes // size))
    return [tensors] + [tuple(t.clone() for t in tensors) for _ in range(copies - 1)]


def in_turn(
    function: Callable[..., torch.Tensor],
    z: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    total: int,
) -> Callable[[], torch.Tensor]:
    """Return a call that uses the next copy of the matrix each time."""
    copies = itertools.cycle(clones(tensors, total))
    return lambda: function(z, *next(copies))


def variants(
    matrix: Matrix, rows: int, total: int
) -> dict[str, tuple[Callable[[], torch.Tensor], int, int, torch.dtype]]:
    """Name to call, bytes of its matrix, outputs, and dtype of z."""
    d_out, n_atoms = matrix.dense_f32.shape
    z = torch.randn(rows, n_atoms)
    equal = max(1, round(d_out * matrix.stored_bytes / matrix.dense_bf16.nbytes))
    small = matrix.dense_bf16[:equal].clone()
    bf16, f32 = torch.bfloat16, torch.float32
    stored = (matrix.mask, matrix.coeffs)
    calls = {
        "cospadi bf16": (native.sparse_gemm, bf16, stored, d_out),
        "cospadi z fp32": (native.sparse_gemm, f32, stored, d_out),
        "torch bf16": (linear, bf16, (matrix.dense_bf16,), d_out),
        "torch fp32": (linear, f32, (matrix.dense_f32,), d_out),
        "torch bf16, equal bytes": (linear, bf16, (small,), equal),
    }
    return {
        name: (
            in_turn(call, z.to(dtype), tensors, total),
            sum(t.nbytes for t in tensors),
            outputs,
            dtype,
        )
        for name, (call, dtype, tensors, outputs) in calls.items()
    }


def check(matrix: Matrix, rows: int) -> list[str]:
    """Compare our results with torch's; returns the failures."""
    failures = []
    for dtype, tolerance in TOLERANCE.items():
        z = torch.randn(rows, matrix.dense_f32.shape[1]).to(dtype)
        expected = z.double() @ matrix.dense_f32.double().T
        y = native.sparse_gemm(z, matrix.mask, matrix.coeffs)
        error = ((y.double() - expected).norm() / expected.norm()).item()
        if error > tolerance:
            failures.append(f"{rows} rows, {dtype}: relative error {error:.2e}")
    return failures


def bench_batch(
    matrix: Matrix,
    rows: int,
    args: argparse.Namespace,
    setting: str,
    peaks: dict[str, float],
) -> list[harness.Result]:
    """Time all variants at one batch size."""
    total = args.memory_mb << 20 if setting == "memory" else 0
    chosen = variants(matrix, rows, total)
    clock = "thread_cpu" if args.threads == 1 else "wall"
    repeats = args.repeats if rows > 64 else 5 * args.repeats
    calls = {name: call for name, (call, *_) in chosen.items()}
    if setting == "memory":
        timings = harness.measure_in_turn(calls, repeats=repeats, clock=clock)
    else:  # one after the other: in turn they would push each other out of the cache
        timings = {
            name: harness.measure(call, repeats=repeats, clock=clock)
            for name, call in calls.items()
        }
    n_atoms = matrix.dense_f32.shape[1]
    results = []
    for name, (_, n_bytes, outputs, dtype) in chosen.items():
        timing = timings[name]
        flops = 2.0 * rows * n_atoms * outputs
        gemm_peak = peaks["gemm_bf16" if dtype == torch.bfloat16 else "gemm_fp32"]
        extra = {
            "setting": setting,
            "x_torch_bf16": round(timings["torch bf16"].median / timing.median, 2),
            "of_read_peak": round(n_bytes / timing.median / peaks["read"], 2),
            "of_gemm_peak": round(flops / timing.median / gemm_peak, 2),
        }
        sizes = {"rows": rows, "k": n_atoms, "s": matrix.coeffs.shape[1], "d_out": outputs}
        results.append(
            harness.Result(name, sizes, args.threads, timing, rows, flops, n_bytes, extra)
        )
    return results


def main() -> int:
    """Run the program."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama1b-up"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128, 1024])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--settings", nargs="+", default=["cache", "memory"])
    parser.add_argument("--memory-mb", type=int, default=256, help="size of the copies in turn")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    peaks = {
        "read": harness.read_peak(args.threads),
        "gemm_bf16": harness.gemm_peak(torch.bfloat16, args.threads),
        "gemm_fp32": harness.gemm_peak(torch.float32, args.threads),
    }
    print("peaks:", ", ".join(f"{name} {value / 1e9:.1f} G/s" for name, value in peaks.items()))
    results: list[harness.Result] = []
    failures: list[str] = []
    with torch.inference_mode():
        for shape in args.shapes:
            matrix = make_matrix(*SHAPES[shape])
            ratio = matrix.dense_bf16.nbytes / matrix.stored_bytes
            for rows in args.rows:
                if args.refcheck:
                    failures += [f"{shape}: {failure}" for failure in check(matrix, rows)]
                for setting in args.settings:
                    lines = bench_batch(matrix, rows, args, setting, peaks)
                    title = (
                        f"{shape}, {rows} rows, {setting}; dense bf16 is {ratio:.2f} x our bytes"
                    )
                    harness.print_results(title, lines, "rows")
                    results += lines
    harness.write_json(
        args.json, "bench_sparse_gemm", args, results, peaks=peaks, failures=failures
    )
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
