"""Rounding with error feedback: time per row, share of the GEMM peak, and what it gains over plain rounding.

Supports and coefficients are those of the largest correlations over atoms of a decaying spectrum, solved for on the
support; steps clip a row at 0.65 of its largest coefficient, 4 bits. ``s=288`` and ``s=768`` factor one Gram per row,
``full`` one for all rows. --refcheck compares the smallest shape with the float64 reference and every reported error
with one computed by torch.

Flops: ``s^3 / 3`` per row for the factor, ``s^2`` for the feedback; with full support the factor counts once. Sweeps
and errors are not counted. ``error`` is relative to that of plain rounding.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness
from cospadi import native
from cospadi.reference import round_code_reference

LIMIT = 7


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem."""

    n_atoms: int
    sparsity: int
    n_rows: int


SHAPES = {
    "check": Shape(80, 40, 40),
    "s=288": Shape(640, 288, 1536),
    "full": Shape(576, 576, 1536),
    "s=768": Shape(1632, 768, 96),
}

VARIANTS = {
    "feedback": {"sweeps": 0},
    "feedback, index order": {"sweeps": 0, "order": "index"},
    "feedback, 1 sweep": {"sweeps": 1},
    "feedback, 4 sweeps": {"sweeps": 4},
}


@dataclass(frozen=True)
class Problem:
    """Float32 operands; `indices` is None with full support."""

    gram: torch.Tensor
    indices: torch.Tensor | None
    coeffs: torch.Tensor
    steps: torch.Tensor


def make_problem(shape: Shape, seed: int = 0) -> Problem:
    """Coherent atoms of several lengths; coefficients are the least-squares solution on their support."""
    generator = torch.Generator().manual_seed(seed)
    dim = shape.n_atoms * 9 // 10
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.4

    def random(n: int) -> torch.Tensor:
        return torch.randn(n, dim, generator=generator, dtype=torch.float64) * scale

    atoms = random(shape.n_atoms)
    lengths = 0.5 + torch.rand(shape.n_atoms, 1, generator=generator, dtype=torch.float64)
    atoms *= lengths / atoms.norm(dim=1, keepdim=True)
    gram, correlations = atoms @ atoms.T, random(shape.n_rows) @ atoms.T
    ridge = 1e-6 * gram.diagonal().mean()
    if shape.sparsity == shape.n_atoms:
        indices = None
        gram.diagonal().add_(ridge)
        coeffs = torch.linalg.solve(gram, correlations.T).T
    else:
        scores = correlations.abs() / lengths.T
        indices = native.select_largest(scores, shape.sparsity)
        coeffs = torch.empty(indices.shape, dtype=torch.float64)
        for row, support, out in zip(correlations, indices.long(), coeffs, strict=True):
            own = gram[support][:, support]
            own.diagonal().add_(ridge)
            out.copy_(torch.linalg.solve(own, row[support]))
    steps = 0.65 * coeffs.abs().amax(1, keepdim=True) / LIMIT
    return Problem(gram.float(), indices, coeffs.float(), steps.float())


def objectives(problem: Problem, fields: torch.Tensor) -> torch.Tensor:
    """``(x - step q)^T G_II (x - step q)`` of every row by a dense product in float64."""
    errors = problem.coeffs.double() - problem.steps.double() * fields
    if problem.indices is not None:
        dense = torch.zeros(errors.shape[0], problem.gram.shape[0], dtype=torch.float64)
        errors = dense.scatter_(1, problem.indices.long(), errors)
    return ((errors @ problem.gram.double()) * errors).sum(1)


def plain_fields(problem: Problem) -> torch.Tensor:
    """Every coefficient rounded on its own."""
    return (problem.coeffs / problem.steps).round().clamp(-LIMIT, LIMIT).int()


def round_rows(problem: Problem, **options: object) -> native.RoundCodeResult:
    """One call of the kernel."""
    return native.round_code(
        problem.gram, problem.indices, problem.coeffs, problem.steps, LIMIT, **options
    )


def work(shape: Shape) -> float:
    """Flops of one call."""
    factor = shape.sparsity**3 / 3
    n_factors = 1 if shape.sparsity == shape.n_atoms else shape.n_rows
    return n_factors * factor + shape.n_rows * float(shape.sparsity) ** 2


def check_reference() -> list[str]:
    """Compare every variant with the float64 reference; returns the failures."""
    problem = make_problem(SHAPES["check"])
    failures = []
    for name, options in VARIANTS.items():
        result = round_rows(problem, with_errors=True, **options)
        fields, errors = round_code_reference(
            problem.gram, problem.indices, problem.coeffs, problem.steps, LIMIT, **options
        )
        same = float((result.fields == fields).all(1).double().mean())
        ratio = float(result.errors.double().mean() / errors.mean())
        if same < 0.8 or abs(ratio - 1) > 0.02:
            failures.append(f"{name}: {same:.0%} of the rows equal, errors {ratio:.4f} of theirs")
    return failures


def bench_shape(
    shape_name: str, peak: float, args: argparse.Namespace
) -> tuple[list[harness.Result], list[str]]:
    """Time all variants of one shape and check their errors."""
    shape = SHAPES[shape_name]
    problem = make_problem(shape)
    clock = "thread_cpu" if args.threads == 1 else "wall"
    calls = {
        name: lambda options=options: round_rows(problem, **options)
        for name, options in VARIANTS.items()
    }
    calls["with errors"] = lambda: round_rows(problem, sweeps=0, with_errors=True)
    calls["plain, torch"] = lambda: plain_fields(problem)
    timings = harness.measure_in_turn(calls, repeats=args.repeats, clock=clock)
    plain = float(objectives(problem, plain_fields(problem)).mean())
    sizes = {"k": shape.n_atoms, "s": shape.sparsity, "n": shape.n_rows}
    results, failures = [], []
    for name, timing in timings.items():
        extra: dict[str, object] = {"us_per_row": round(timing.median / shape.n_rows * 1e6, 1)}
        if name != "plain, torch":
            options = VARIANTS.get(name, {"sweeps": 0})
            result = round_rows(problem, with_errors=True, **options)
            exact = objectives(problem, result.fields)
            difference = float(((result.errors - exact).abs() / exact.mean()).max())
            if args.refcheck and not (difference < 1e-3 and float(exact.mean()) < plain):
                failures.append(f"{shape_name}, {name}: errors differ by {difference:.1e}")
            extra |= {
                "of_gemm_peak": f"{work(shape) / timing.median / peak:.0%}",
                "error": round(float(exact.mean()) / plain, 3),
                "raised": result.n_raised,
                "workspace_mb": round(result.workspace_bytes / 1e6, 2),
            }
        flops = 0.0 if name == "plain, torch" else work(shape)
        results.append(
            harness.Result(name, sizes, args.threads, timing, shape.n_rows, flops, 0.0, extra)
        )
    return results, failures


def main() -> int:
    """Run the program; 1 if a check failed."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["s=288", "full", "s=768"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    peak = harness.gemm_peak(torch.float32, args.threads)
    print(f"measured peak: {peak / 1e9:.1f} GFLOP/s")
    results: list[harness.Result] = []
    failures = check_reference() if args.refcheck else []
    for name in args.shapes:
        lines, failed = bench_shape(name, peak, args)
        shape = SHAPES[name]
        title = f"{name}: k={shape.n_atoms} s={shape.sparsity} n={shape.n_rows}"
        harness.print_results(title, lines, "rows")
        results += lines
        failures += failed
    harness.write_json(
        args.json,
        "bench_round_code",
        args,
        results,
        peaks={f"gemm_float32_{args.threads}": peak},
        failures=failures,
    )
    for failure in failures:
        print("FAILED:", failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
