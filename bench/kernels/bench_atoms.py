"""Atom update: sequential K-SVD against the blocked variant, and both against the machine's GEMM peak.

One sweep over a dictionary of k atoms with s = k / 2 atoms per signal. Flops: sequential ``(2 p + 1) 2 n s d``, the
non-zeros only; blocked ``(4 p + 4) n k d``, dense products including the zeros. Both add one residual, ``2 n s d``.
Bytes: passes over the residual. With --refcheck the smallest shape is compared with the float64 reference, and every
reported objective with one computed by torch.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness
from cospadi.native import update_atoms
from cospadi.reference import update_atoms_reference


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem."""

    n_signals: int
    dim: int
    n_atoms: int
    sparsity: int


SHAPES = {
    "check": Shape(192, 96, 64, 32),
    "488": Shape(1536, 576, 488, 244),
    "1048": Shape(2048, 2048, 1048, 524),
    "2016": Shape(8192, 2048, 2016, 1008),
}
VARIANTS = {  # name: (block size, power iterations)
    "sequential": (1, 1),
    "sequential p=8": (1, 8),
    "blocked 32": (32, 1),
    "blocked 64": (64, 1),
    "blocked 128": (128, 1),
    "blocked 64 p=4": (64, 4),
}


@dataclass(frozen=True)
class Problem:
    """Atoms, signals and codes, float32."""

    atoms: torch.Tensor
    signals: torch.Tensor
    indices: torch.Tensor
    coeffs: torch.Tensor


def make_problem(shape: Shape, seed: int = 0) -> Problem:
    """Principal directions as atoms; the largest coefficients kept."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, shape.dim + 1) ** -0.5
    mixing = torch.linalg.qr(torch.randn(shape.dim, shape.dim, generator=generator)).Q
    signals = (torch.randn(shape.n_signals, shape.dim, generator=generator) * spectrum) @ mixing
    vectors = torch.linalg.eigh(signals.T @ signals).eigenvectors
    atoms = vectors[:, -shape.n_atoms :].T.contiguous()
    code = signals @ atoms.T
    indices = code.abs().topk(shape.sparsity, dim=1).indices.sort(1).values
    return Problem(atoms, signals, indices.int(), code.gather(1, indices))


def objective(problem: Problem, atoms: torch.Tensor, coeffs: torch.Tensor) -> float:
    """``|Y - X D|^2`` by a dense product in float64."""
    code = torch.zeros(coeffs.shape[0], atoms.shape[0], dtype=torch.float64)
    code.scatter_(1, problem.indices.long(), coeffs.double())
    return float((problem.signals.double() - code @ atoms.double()).square().sum())


def work(shape: Shape, block_size: int, power_iterations: int) -> tuple[float, float]:
    """Flops and bytes of one call with one sweep."""
    n, d, k, s = shape.n_signals, shape.dim, shape.n_atoms, shape.sparsity
    residual = 2.0 * n * s * d
    if block_size == 1:
        rows = n * s * d * 4.0  # each atom touches the rows that use it
        return residual + (2 * power_iterations + 1) * 2.0 * n * s * d, (
            2 * power_iterations + 1
        ) * rows
    passes = (2 * power_iterations + 2) * k / block_size
    return residual + (4 * power_iterations + 4) * 1.0 * n * k * d, passes * n * d * 4.0


def bench_variant(
    name: str, shape: Shape, problem: Problem, threads: int, arguments: argparse.Namespace
) -> tuple[harness.Result, list[str]]:
    """Time one variant and check its objective."""
    block_size, power_iterations = VARIANTS[name]
    state: dict[str, object] = {}

    def call() -> None:
        atoms, coeffs = problem.atoms.clone(), problem.coeffs.clone()
        stats = update_atoms(
            atoms,
            problem.signals,
            problem.indices,
            coeffs,
            block_size=block_size,
            power_iterations=power_iterations,
            num_threads=threads,
        )
        state.update(atoms=atoms, coeffs=coeffs, stats=stats)

    clock = "thread_cpu" if threads == 1 else "wall"
    timing = harness.measure(call, repeats=arguments.repeats, clock=clock)
    stats, atoms, coeffs = state["stats"], state["atoms"], state["coeffs"]
    flops, n_bytes = work(shape, block_size, power_iterations)
    gain = 1 - stats.objective_after / stats.objective_before
    extra = {
        "objective_gain": f"{gain:.4%}",
        "halved": stats.n_halved,
        "workspace_mb": round(stats.workspace_bytes / 1e6, 1),
    }
    sizes = {"n": shape.n_signals, "d": shape.dim, "k": shape.n_atoms, "s": shape.sparsity}
    line = harness.Result(name, sizes, threads, timing, 1.0, flops, n_bytes, extra)
    failures = []
    if arguments.refcheck:
        exact = objective(problem, atoms, coeffs)
        if abs(stats.objective_after - exact) > 1e-4 * exact:
            failures.append(f"{name}: objective {stats.objective_after}, torch finds {exact}")
    return line, failures


def check_reference(problem: Problem) -> list[str]:
    """Compare every variant with the float64 reference; returns the failures."""
    failures = []
    for name, (block_size, power_iterations) in VARIANTS.items():
        options = {"block_size": block_size, "power_iterations": power_iterations}
        arrays = (problem.atoms, problem.signals, problem.indices, problem.coeffs)
        expected, _ = update_atoms_reference(*arrays, **options)
        atoms, coeffs = problem.atoms.clone(), problem.coeffs.clone()
        update_atoms(atoms, problem.signals, problem.indices, coeffs, **options)
        error = float((atoms.double() - expected).abs().max())
        if error > 1e-4:
            failures.append(f"{name}: atoms differ from the reference by {error:.1e}")
    print(
        f"  check: {len(VARIANTS) - len(failures)} of {len(VARIANTS)} variants equal the reference"
    )
    return failures


def main() -> int:
    """Run the program; 1 if a check failed."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["488", "1048"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    thread_counts = sorted({1, torch.get_num_threads()})
    peaks = {
        f"gemm_float32_{threads}": harness.gemm_peak(torch.float32, threads)
        for threads in thread_counts
    }
    print("measured peaks:", {name: f"{value / 1e9:.1f} GFLOP/s" for name, value in peaks.items()})
    results: list[harness.Result] = []
    failures = check_reference(make_problem(SHAPES["check"])) if arguments.refcheck else []
    for shape_name in arguments.shapes:
        shape = SHAPES[shape_name]
        problem = make_problem(shape)
        lines = []
        for threads in thread_counts:
            for name in arguments.variants:
                line, failed = bench_variant(name, shape, problem, threads, arguments)
                line.extra["of_gemm_peak"] = (
                    f"{line.flops / line.timing.median / peaks[f'gemm_float32_{threads}']:.0%}"
                )
                lines.append(line)
                failures += failed
        title = f"n={shape.n_signals} d={shape.dim} k={shape.n_atoms} s={shape.sparsity}"
        harness.print_results(title, lines, "sweeps")
        results += lines
    harness.write_json(
        arguments.json, "bench_atoms", arguments, results, peaks=peaks, failures=failures
    )
    for failure in failures:
        print("FAILED:", failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
