"""The library's own dense product against torch's, at the shapes of the learner.

Flops: ``2 m n k``. The atom update multiplies tall and skinny matrices; `square` gives the peak of both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness
from cospadi import native

SHAPES = {
    "square": (1024, 1024, 1024),
    "residual += X D": (1536, 576, 64),
    "X^T residual": (64, 576, 1536),
    "residual D^T": (1536, 64, 576),
    "Gram of atoms": (488, 488, 576),
    "1B: X^T residual": (64, 2048, 8192),
}
"""Use to m, n, k."""


def main() -> int:
    """Run the program."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    clock = "thread_cpu" if args.threads == 1 else "wall"
    results: list[harness.Result] = []
    failures: list[str] = []
    for use, (m, n, k) in SHAPES.items():
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
        out = torch.empty(m, n, dtype=dtype)
        if args.refcheck:
            expected = a.double() @ b.double()
            error = ((native.gemm(a, b).double() - expected).norm() / expected.norm()).item()
            if error > 100 * torch.finfo(dtype).eps:
                failures.append(f"{use}: relative error {error:.2e}")
        timings = harness.measure_in_turn(
            {
                "cospadi": lambda a=a, b=b, out=out: native.gemm(a, b, out=out),
                "torch": lambda a=a, b=b, out=out: torch.mm(a, b, out=out),
            },
            repeats=4 * args.repeats,
            clock=clock,
        )
        lines = [
            harness.Result(name, {"m": m, "n": n, "k": k}, args.threads, timing, 1, 2.0 * m * n * k)
            for name, timing in timings.items()
        ]
        harness.print_results(f"{use}: [{m}, {k}] x [{k}, {n}] {args.dtype}", lines, "calls")
        results += lines
    harness.write_json(args.json, "bench_gemm", args, results, failures=failures)
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
