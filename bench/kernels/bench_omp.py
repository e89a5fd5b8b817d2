"""Exact OMP and ORMP at the sizes of language models, against SPAMS and scikit-learn.

Signals per second at k atoms and s = k / 2, on a dictionary learned from signals with a decaying spectrum. SPAMS'
``omp`` is ORMP and forms the Gram itself, so its time for one atom is subtracted; scikit-learn gets the Gram. With
--refcheck the supports (ORMP against SPAMS, float64) and the residuals (all) have to agree.

Flops: ``k s^2 - 2/3 s^3`` per signal, the history without the chosen atoms (2 flops per multiply-add). Bytes: one read
of that history per pass over it.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness
from cospadi.native import OmpResult, omp_encode, update_atoms


@dataclass(frozen=True)
class Shape:
    """One problem size and how many signals each contender codes per call."""

    dim: int
    n_atoms: int
    sparsity: int
    n_signals: int
    n_native: int
    n_peer: int


SHAPES = {
    "488": Shape(576, 488, 244, 1536, 1536, 128),
    "1048": Shape(2048, 1048, 524, 2048, 128, 8),
    "2016": Shape(2048, 2016, 1008, 2400, 48, 6),
}


@dataclass(frozen=True)
class Problem:
    """Unit-norm atoms as rows, signals as rows, and their products, all float64."""

    atoms: torch.Tensor
    signals: torch.Tensor
    gram: torch.Tensor
    correlations: torch.Tensor


def make_problem(shape: Shape, seed: int = 0) -> Problem:
    """Two alternations of thresholding and atom update from the principal directions."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, shape.dim + 1) ** -0.5
    mixing = torch.linalg.qr(torch.randn(shape.dim, shape.dim, generator=generator)).Q
    signals = (torch.randn(shape.n_signals, shape.dim, generator=generator) * spectrum) @ mixing
    values, vectors = torch.linalg.eigh(signals.T @ signals)
    order = values.argsort(descending=True)[: shape.n_atoms]
    atoms = vectors[:, order].T.contiguous()
    for _ in range(2):
        least_squares = torch.linalg.solve(atoms @ atoms.T, atoms @ signals.T).T
        indices = least_squares.abs().topk(shape.sparsity, dim=1).indices.sort(1).values
        update_atoms(atoms, signals, indices.int(), least_squares.gather(1, indices))
    exact = torch.nn.functional.normalize(atoms.double(), dim=1)
    signals = signals.double()
    return Problem(exact, signals, exact @ exact.T, signals @ exact.T)


def work(shape: Shape, n_signals: int, n_passes: int, item_bytes: int) -> tuple[float, float]:
    """Flops and history bytes of coding `n_signals`; the average history is half full and 3/4 live."""
    k, s = shape.n_atoms, shape.sparsity
    flops = n_signals * (k * s**2 - 2 / 3 * s**3)
    per_pass = item_bytes * (k * s / 2 - s**2 / 3)
    return flops, n_passes * per_pass


def bench_native(
    shape: Shape, problem: Problem, selection: str, dtype: torch.dtype, threads: int, repeats: int
) -> tuple[harness.Result, OmpResult]:
    """Time the library's kernel."""
    gram = problem.gram.to(dtype)
    correlations = problem.correlations[: shape.n_native].to(dtype)
    coded: list[OmpResult] = []

    def call() -> None:
        coded[:] = [
            omp_encode(gram, correlations, shape.sparsity, selection=selection, num_threads=threads)
        ]

    harness.reset_peak_memory()
    clock = "thread_cpu" if threads == 1 else "wall"
    timing = harness.measure(call, repeats=repeats, clock=clock)
    result = coded[0]
    name = f"cospadi {selection} {str(dtype).removeprefix('torch.')}"
    flops, n_bytes = work(shape, shape.n_native, result.n_passes, gram.element_size())
    extra = {
        "rows_per_step": round(result.n_rows / (shape.n_native * (shape.sparsity - 1)), 3),
        "workspace_mb": round(result.workspace_bytes / 1e6, 1),
        "peak_rss_mb": round(harness.peak_memory_bytes() / 1e6),
    }
    sizes = {"k": shape.n_atoms, "s": shape.sparsity, "n": shape.n_native, "d": shape.dim}
    line = harness.Result(name, sizes, threads, timing, shape.n_native, flops, n_bytes, extra)
    return line, result


def bench_spams(
    shape: Shape, problem: Problem, dtype: torch.dtype, repeats: int
) -> tuple[harness.Result, torch.Tensor] | None:
    """Time SPAMS' omp; returns its codes too. None if it is not installed."""
    try:
        import spams
    except ImportError:
        print("  spams is not installed: skipped")
        return None
    # SPAMS forms the Gram once only for more than k / 5 signals, else row by row and signal by signal;
    # zero signals, which cost nothing, bring it there.
    padded = torch.zeros(max(shape.n_peer, shape.n_atoms // 4), shape.dim, dtype=dtype)
    padded[: shape.n_peer] = problem.signals[: shape.n_peer]
    signals = padded.T.numpy().copy(order="F")
    atoms = problem.atoms.to(dtype).T.numpy().copy(order="F")

    def code(n_chosen: int) -> object:
        return spams.omp(signals, atoms, L=n_chosen, eps=0.0, numThreads=1)

    timings = harness.measure_in_turn(
        {"all": lambda: code(shape.sparsity), "one": lambda: code(1)}, repeats=repeats
    )
    # What SPAMS does once per call (Gram, correlations) is not part of the comparison.
    fixed = timings["one"].median
    timing = harness.Timing(
        *(
            getattr(timings["all"], name) - fixed
            for name in ("median", "lower_quartile", "upper_quartile", "best")
        ),
        repeats,
        "thread_cpu",
    )
    codes = torch.from_numpy(code(shape.sparsity).T.toarray()[: shape.n_peer]).double()
    name = f"spams ormp {str(dtype).removeprefix('torch.')}"
    sizes = {"k": shape.n_atoms, "s": shape.sparsity, "n": shape.n_peer, "d": shape.dim}
    extra = {"gram_s": round(fixed, 3)}
    return harness.Result(name, sizes, 1, timing, shape.n_peer, extra=extra), codes


def bench_sklearn(
    shape: Shape, problem: Problem, repeats: int
) -> tuple[harness.Result, torch.Tensor] | None:
    """Time scikit-learn's Gram OMP in float64; returns its codes too. None if it is not installed."""
    try:
        from sklearn.linear_model import orthogonal_mp_gram
    except ImportError:
        print("  scikit-learn is not installed: skipped")
        return None
    gram = problem.gram.numpy()
    correlations = problem.correlations[: shape.n_peer].T.numpy().copy()
    coded = []

    def call() -> None:
        coded[:] = [orthogonal_mp_gram(gram, correlations, n_nonzero_coefs=shape.sparsity)]

    timing = harness.measure(call, repeats=repeats)
    sizes = {"k": shape.n_atoms, "s": shape.sparsity, "n": shape.n_peer, "d": shape.dim}
    codes = torch.from_numpy(coded[0].T.copy())
    return harness.Result("scikit-learn omp float64", sizes, 1, timing, shape.n_peer), codes


def dense_code(result: OmpResult, n_atoms: int, n_signals: int) -> torch.Tensor:
    """Expand the first codes to ``[n_signals, n_atoms]`` float64."""
    code = torch.zeros(n_signals, n_atoms, dtype=torch.float64)
    return code.scatter_(1, result.indices[:n_signals].long(), result.coeffs[:n_signals].double())


def relative_error(problem: Problem, code: torch.Tensor) -> float:
    """Frobenius norm of the residual over that of the signals."""
    signals = problem.signals[: code.shape[0]]
    return float((signals - code @ problem.atoms).norm() / signals.norm())


def check(problem: Problem, shape: Shape, codes: dict[str, torch.Tensor]) -> list[str]:
    """Compare errors within each selection, and the ORMP supports with SPAMS'; returns the failures."""
    failures = []
    for selection in ("omp", "ormp"):
        errors = {
            name: relative_error(problem, code[: shape.n_peer])
            for name, code in codes.items()
            if f" {selection} " in name
        }
        low, high = min(errors.values()), max(errors.values())
        print(
            f"  check {selection}: relative errors {low:.6f} .. {high:.6f} over {len(errors)} variants"
        )
        if high > low * (1 + 1e-4):
            failures.append(f"{selection}: errors differ: {errors}")
    ours, theirs = codes["cospadi ormp float64"], codes.get("spams ormp float64")
    if theirs is not None:
        n = theirs.shape[0]
        same = ((ours[:n] != 0) == (theirs != 0)).all(1).double().mean().item()
        print(f"  check ormp: {same:.0%} of the supports equal SPAMS', float64")
        if same < 1:
            failures.append(f"ormp: only {same:.0%} of the supports equal SPAMS'")
    return failures


def print_ratios(results: list[harness.Result]) -> None:
    """Print our single-thread ORMP against SPAMS at the same precision."""
    per_signal = {
        line.name: line.timing.median / line.items for line in results if line.threads == 1
    }
    for dtype in ("float32", "float64"):
        theirs = per_signal.get(f"spams ormp {dtype}")
        if theirs is not None:
            ratio = theirs / per_signal[f"cospadi ormp {dtype}"]
            print(f"  per core, {dtype}: {ratio:.1f} x SPAMS")


def run_shape(
    shape: Shape, arguments: argparse.Namespace
) -> tuple[list[harness.Result], list[str]]:
    """Bench one size."""
    problem = make_problem(shape)
    results, codes = [], {}
    thread_counts = sorted({1, torch.get_num_threads()})
    for dtype in (torch.float32, torch.float64):
        for selection in ("omp", "ormp"):
            for threads in thread_counts:
                line, coded = bench_native(
                    shape, problem, selection, dtype, threads, arguments.repeats
                )
                results.append(line)
                codes[line.name] = dense_code(coded, shape.n_atoms, shape.n_peer)
    if arguments.peers:
        repeats = arguments.repeats if shape.n_atoms < 1000 else 1
        with harness.single_threaded_blas():
            peers = [
                bench_spams(shape, problem, torch.float32, repeats),
                bench_spams(shape, problem, torch.float64, repeats),
                bench_sklearn(shape, problem, 1),
            ]
        for peer in peers:
            if peer is not None:
                results.append(peer[0])
                codes[peer[0].name] = peer[1]
    title = f"k={shape.n_atoms} s={shape.sparsity} d={shape.dim}"
    harness.print_results(title, results, "signals")
    print_ratios(results)
    return results, check(problem, shape, codes) if arguments.refcheck else []


def main() -> int:
    """Run the program; 1 if a check failed."""
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    peaks = {
        f"{str(dtype).removeprefix('torch.')}_1": harness.gemm_peak(dtype, 1)
        for dtype in (torch.float32, torch.float64)
    }
    peaks["copy_bytes_per_s_1"] = harness.copy_peak(1)
    print("measured peaks:", {name: f"{value / 1e9:.1f} G" for name, value in peaks.items()})
    results: list[harness.Result] = []
    failures: list[str] = []
    for name in arguments.shapes:
        lines, failed = run_shape(SHAPES[name], arguments)
        results += lines
        failures += failed
    harness.write_json(
        arguments.json, "bench_omp", arguments, results, peaks=peaks, failures=failures
    )
    for failure in failures:
        print("FAILED:", failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
