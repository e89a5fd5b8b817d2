"""The largest scores of every row, at the sizes of sparse codes, against torch.

``topk`` and sort is what one would write in torch; it breaks ties anyhow. A stable ``argsort`` breaks them by the
lowest index as the kernel does. Rows per second of coefficients' magnitudes; --refcheck compares the indices with the
stable sort's, on tied scores too.

Bytes: one read of the scores; the passes over a row that follow are served by the cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness
from cospadi import native
from cospadi.reference import select_largest_reference

SHAPES = [(1536, 488, 244), (1536, 640, 288), (2048, 2048, 1024), (2048, 2048, 512)]
"""Rows, atoms, atoms kept."""


def with_topk(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Torch's selection, indices ascending."""
    return scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values.int()


def check(scores: torch.Tensor, count: int) -> list[str]:
    """Compare with the stable sort; returns the failures."""
    failures = []
    for name, values in (("plain", scores), ("tied", (scores * 20).round())):
        same = native.select_largest(values, count) == select_largest_reference(values, count)
        if not bool(same.all()):
            failures.append(f"{tuple(scores.shape)}, {name}: {int((~same).sum())} indices differ")
    return failures


def main() -> int:
    """Run the program; 1 if a check failed."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = "thread_cpu" if args.threads == 1 else "wall"
    results: list[harness.Result] = []
    failures: list[str] = []
    for n_rows, n_atoms, count in SHAPES:
        scores = torch.randn(n_rows, n_atoms, dtype=getattr(torch, args.dtype)).abs()
        if args.refcheck:
            failures += check(scores, count)
        timings = harness.measure_in_turn(
            {
                "cospadi": lambda scores=scores, count=count: native.select_largest(scores, count),
                "torch topk, sort": lambda scores=scores, count=count: with_topk(scores, count),
                "torch stable argsort": lambda scores=scores, count=count: select_largest_reference(
                    scores, count
                ),
            },
            repeats=args.repeats,
            clock=clock,
        )
        sizes = {"n": n_rows, "k": n_atoms, "s": count}
        lines = [
            harness.Result(
                name,
                sizes,
                args.threads,
                timing,
                n_rows,
                0.0,
                scores.nbytes,
                {"us_per_row": round(timing.median / n_rows * 1e6, 2)},
            )
            for name, timing in timings.items()
        ]
        harness.print_results(f"n={n_rows} k={n_atoms} s={count} {args.dtype}", lines, "rows")
        results += lines
    harness.write_json(args.json, "bench_select", args, results, failures=failures)
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
