"""Fits on a CUDA device at real sizes: kernels, exact OMP, every linear of Llama-3.2-1B and 3-8B, and the main job.

Parts run in processes of their own, so that one that breaks the device costs no other. Every result is checked: kernels
against the CPU, fits by the error of what would be stored (in float64) and, for the smallest linear, against the CPU's
fit. The three arithmetics of large products stand side by side; stages are shares of a second run with a wait at both
ends of each, peaks are measured in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import models

import harness
from cospadi import native
from cospadi.learn import augmented, splitting
from cospadi.learn import fit as fitting
from cospadi.learn.methods import factor_size
from cospadi.learn.precision import PRODUCTS, tf32_products
from cospadi.learn.whitening import whiten_gram
from cospadi.pipeline.plan import storage_widths
from cospadi.pipeline.recipe import Recipe

RATIO = 0.2
PARTS = {
    "kernels": 40,
    "omp": 60,
    **{f"1b {name}": 60 for name in models.SIZES["1b"].linears()},
    **{f"8b {name}": 90 for name in models.SIZES["8b"].linears()},
    "job": 150,
}
"""Name to the most seconds it may take."""

Line = dict[str, Any]


class CheckError(Exception):
    """A result is wrong."""


def require(condition: bool, message: str) -> None:
    """Raise `CheckError` unless the condition holds."""
    if not condition:
        raise CheckError(message)


def wait(device: torch.device) -> None:
    """Let queued work end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median wall seconds of a call, work on the device included; one call before warms up."""
    call()
    taken = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken)[len(taken) // 2]


def peaks(device: torch.device, size: int) -> Line:
    """Measured rates: products by type in flop/s, a copy in bytes/s (read and written)."""
    found = {}
    for name, dtype in (
        ("float32", torch.float32),
        ("tf32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float64", torch.float64),
    ):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with tf32_products() if name == "tf32" else contextlib.nullcontext():
            found[name] = 2.0 * size**3 / seconds_of(lambda a=a, b=b: a @ b, device)
    source = torch.randn(size * size * 4, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2.0 * source.nbytes / seconds_of(lambda: target.copy_(source), device)
    return found


# ---- parts --------------------------------------------------------------------------------------


def kernels(device: torch.device, dry: bool) -> list[Line]:
    """Selection, projection and gradient step at the size of a 1B gate projection."""
    rows, columns, count = (64, 90, 40) if dry else (8192, 2704, 1180)
    found = peaks(device, 256 if dry else 8192)
    lines: list[Line] = [{"name": "peaks", **{k: f"{v / 1e12:.3g} T/s" for k, v in found.items()}}]
    scores = torch.randn(rows, columns, device=device).abs()
    scores[:, ::7] = scores[:, 1:2]  # ties
    indices = torch.ops.cospadi.select_largest(scores, count)
    require(
        torch.equal(indices.cpu(), native.select_largest(scores.cpu(), count)),
        "selection differs from the CPU's",
    )
    taken = seconds_of(lambda: torch.ops.cospadi.select_largest(scores, count), device)
    moved = scores.nbytes + indices.nbytes
    lines.append({"name": "select", "seconds": taken, "of_copy": moved / taken / found["copy"]})
    solution, sparse, dual = (torch.randn(rows, columns, device=device) for _ in range(3))
    here = [t.cpu().clone() for t in (solution, sparse, dual)]
    chosen, _ = native.project_rows(solution, sparse, dual, indices[:0], count, 1.3)
    wanted, _ = native.project_rows(*here, indices[:0].cpu(), count, 1.3)
    require(torch.equal(chosen.cpu(), wanted), "supports of the projection differ from the CPU's")
    for name, value, expected in (("sparse", sparse, here[1]), ("dual", dual, here[2])):
        require(torch.equal(value.cpu(), expected), f"{name} of the projection differs")
    taken = seconds_of(
        lambda: native.project_rows(solution, sparse, dual, chosen, count, 1.3), device
    )
    moved = 5 * solution.nbytes + 2 * chosen.nbytes
    lines.append({"name": "project", "seconds": taken, "of_copy": moved / taken / found["copy"]})
    lines.append(gradient_line(device, rows, columns, found["copy"]))
    return lines


def gradient_line(device: torch.device, rows: int, columns: int, copy: float) -> Line:
    """One conjugate gradient step, checked in float64."""
    mask = (torch.rand(rows, columns, device=device) < 0.4).float()
    product, x, residual, direction = (torch.randn(rows, columns, device=device) for _ in range(4))
    inverse = mask * torch.rand(rows, columns, device=device)
    energy, enough = torch.ones(rows, device=device), torch.zeros(rows, device=device)
    exact = [t.double() for t in (product, mask, inverse, enough, x, residual, direction, energy)]
    step = (exact[6] * exact[0] * exact[1]).sum(1)
    step = torch.where(step > 0, exact[7] / step, torch.zeros_like(step))
    wanted = exact[5] - step[:, None] * exact[0] * exact[1]
    native.gradient_step(product, mask, inverse, enough, x, residual, direction, energy)
    # rows whose curvature nearly vanishes have steps of any length
    error = ((residual - wanted).norm(dim=1) / wanted.norm(dim=1)).median()
    require(float(error) < 1e-4, f"residuals of the gradient step are off by {float(error):.2g}")
    taken = seconds_of(
        lambda: native.gradient_step(
            product, mask, inverse, enough, x, residual, direction, energy
        ),
        device,
    )
    return {
        "name": "gradient step",
        "seconds": taken,
        "of_copy": 9 * product.nbytes / taken / copy,
    }


def omp(device: torch.device, dry: bool) -> list[Line]:
    """Exact OMP and ORMP at k = 2016, s = 1008: columns per second, supports against the CPU's."""
    k, s, d_in, n = (48, 20, 64, 12) if dry else (2016, 1008, 2048, 528)
    n_checked = 4
    generator = torch.Generator(device).manual_seed(0)
    atoms = torch.randn(k, d_in, generator=generator, device=device)
    atoms = torch.nn.functional.normalize(
        atoms + 0.5 * torch.randn(1, d_in, generator=generator, device=device), dim=1
    )
    signals = torch.randn(n, d_in, generator=generator, device=device)
    gram, correlations = atoms @ atoms.T, signals @ atoms.T
    lines = []
    for selection in ("omp", "ormp"):

        def call(selection: str = selection):
            return torch.ops.cospadi.omp_encode(gram, correlations, s, selection == "ormp")

        indices, coeffs, n_padded = call()
        require(int(n_padded) == 0, f"{int(n_padded)} entries are padding")
        expected = native.omp_encode(
            gram.cpu(), correlations[:n_checked].cpu(), s, selection=selection
        )
        mine = torch.zeros(n_checked, k).scatter_(1, indices[:n_checked].cpu().long(), 1.0)
        theirs = torch.zeros(n_checked, k).scatter_(1, expected.indices.long(), 1.0)
        common = float((mine * theirs).sum() / theirs.sum())
        # rounding decides between neighbours now and then; the errors must be equal all the same
        require(common > 0.9, f"{selection}: only {common:.3f} of the supports are the CPU's")
        dense = torch.zeros(n, k, device=device).scatter_(1, indices.long(), coeffs)
        lost = ((signals - dense @ atoms)[:n_checked].norm(dim=1)).cpu()
        theirs.scatter_(1, expected.indices.long(), expected.coeffs)
        reference = (signals[:n_checked].cpu() - theirs @ atoms.cpu()).norm(dim=1)
        require(bool((lost <= 1.001 * reference).all()), f"{selection}: errors above the CPU's")
        taken = seconds_of(call, device, repeats=1 if not dry else 2)
        lines.append(
            {
                "name": f"{selection} k={k} s={s}",
                "seconds": taken,
                "columns_per_s": n / taken,
                "support": common,
            }
        )
    return lines


def fit_linear(device: torch.device, model: str, name: str) -> list[Line]:
    """One linear, from weight and Gram to stored factors."""
    size = models.SIZES[model]
    d_in, d_out, per_block = size.linears()[name]
    weight, gram = models.make_problem(d_in, d_out, device)
    recipe = Recipe(ratio=RATIO)
    types = recipe.types_at(RATIO, d_in)
    factor = factor_size(
        recipe.method,
        d_in,
        d_out,
        RATIO,
        widths=storage_widths(types),
        dictionary=recipe.atoms,
        learned_share=recipe.learned_share,
    )
    lines, errors = [], {}
    fit_once(device, recipe, factor, types, *models.make_problem(96, 64, device), "float32")
    for products in PRODUCTS:
        start = time.perf_counter()
        report = fit_once(device, recipe, factor, types, weight, gram, products)
        taken = time.perf_counter() - start
        errors[products] = report.relative_error
        with stage_seconds(device) as stages:
            fit_once(device, recipe, factor, types, weight, gram, products)
        atoms = factor.n_identity + factor.n_atoms
        steps, rise = stages.pop("rise steps"), stages["rise"]
        # a Cholesky factor, an inverse from it, the product with it
        flops = steps * (atoms**3 / 3 + 2 * atoms**3 + 2 * d_out * atoms**2)
        rate = peaks_cached(device)["float32" if products == "float32" else "tf32"]
        lines.append(
            {
                "name": f"{model} {name} {products}",
                "shape": [d_in, d_out],
                "atoms": [factor.n_identity, factor.n_atoms],
                "sparsity": factor.sparsity,
                "seconds": taken,
                "seconds_of_model": taken * per_block * size.layers,
                "error": report.relative_error,
                "rise_steps": int(steps),
                "rise_of_peak": flops / rise / rate if rise else 0.0,
                "stages": {key: round(value, 4) for key, value in stages.items()},
            }
        )
    for products, most in (("tf32x3", 0.01), ("tf32", 0.1)):
        require(
            abs(errors[products] / errors["float32"] - 1) < most,
            f"errors with {products} and float32: {errors[products]:.4f}, {errors['float32']:.4f}",
        )
    if device.type == "cuda" and name == "k,v" and model == "1b":
        report = fit_once(
            torch.device("cpu"), recipe, factor, types, weight.cpu(), gram.cpu(), "float32"
        )
        lines[0]["error_on_cpu"] = report.relative_error
        require(
            abs(report.relative_error / errors["float32"] - 1) < 0.02,
            f"error on the CPU {report.relative_error:.4f}, on the GPU {errors['float32']:.4f}",
        )
    return lines


def fit_once(device, recipe, factor, types, weight, gram, products):
    """One fit; its report."""
    import dataclasses

    from cospadi.learn.methods import FactorSize

    d_in = weight.shape[1]
    if factor.n_identity != d_in:  # a small one that warms up
        factor = FactorSize(d_in, 8, d_in // 2)
    options = dataclasses.replace(recipe.learn_options(), products=products)
    settings = fitting.FitSettings(recipe.method, factor, types, options)
    given = fitting.FitInput("linear", weight, None, gram, whiten_gram(gram, "linear"))
    ((_, report),) = fitting.fit([given], settings)
    wait(device)
    return report


_PEAKS: dict[str, float] = {}


def peaks_cached(device: torch.device) -> dict[str, float]:
    """Peaks, measured once per process."""
    if not _PEAKS:
        _PEAKS.update(peaks(device, 4096 if device.type == "cuda" else 128))
    return _PEAKS


@contextlib.contextmanager
def stage_seconds(device: torch.device) -> Iterator[dict[str, float]]:
    """Collect the seconds of the parts of a fit, each waited for."""
    found: dict[str, float] = defaultdict(float)

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait(device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait(device)
            found[stage] += time.perf_counter() - start
            if stage == "rise":
                found["rise steps"] += 1
            return result

        return call

    places = (
        ("start", augmented, "_leading_atoms"),
        ("rise", splitting.Split, "step"),
        ("atoms", splitting.Split, "update_dictionary"),
        ("refit", splitting.Split, "refit"),
        ("solve", augmented, "_update"),
        ("round", fitting, "round_factors"),
        ("store", fitting, "_store"),
        ("report", fitting, "_report"),
    )
    with contextlib.ExitStack() as stack:
        for stage, owner, name in places:
            original = getattr(owner, name)
            setattr(owner, name, timed(stage, original))
            stack.callback(setattr, owner, name, original)
        yield found


def job(device: torch.device, dry: bool) -> list[Line]:
    """The main job on an untrained model with the shapes of the 1B, four of its blocks."""
    from cospadi.pipeline.compress import compress

    size = models.SIZES["toy" if dry else "1b"]
    layers = 2 if dry else 4
    length, samples = (32, 4) if dry else (1024, 64)
    with tempfile.TemporaryDirectory() as folder:
        source = models.make_model(size, Path(folder) / "model", layers=layers)
        start = time.perf_counter()
        result = compress(
            source,
            Path(folder) / "out",
            device=device.type,
            ratio=RATIO,
            samples=samples,
            sequence_length=length,
        )
        taken = time.perf_counter() - start
    require(not result.failed, f"layers stayed dense: {result.failed}")
    errors = [report["relative_error"] for report in result.reports.values()]
    require(max(errors) < 1.0, f"the largest relative error is {max(errors):.3f}")
    return [
        {
            "name": f"job, {layers} of {size.layers} blocks, {samples} x {length} tokens",
            "seconds": taken,
            "stages": {key: round(value, 2) for key, value in result.stages.items()},
            "calibration": round(result.calibration_seconds, 2),
            "mean_error": sum(errors) / len(errors),
        }
    ]


def run_part(part: str, device: torch.device, dry: bool) -> list[Line]:
    """Lines of one part."""
    if part == "kernels":
        return kernels(device, dry)
    if part == "omp":
        return omp(device, dry)
    if part == "job":
        return job(device, dry)
    model, name = part.split(" ", 1)
    return fit_linear(device, model, name)


# ---- the program --------------------------------------------------------------------------------


def describe(line: Line) -> str:
    """One line of text."""
    parts = [f"{line['name']:34s}"]
    for key, value in line.items():
        if key in ("name", "stages", "shape"):
            continue
        parts.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    if "stages" in line:
        parts.append("| " + " ".join(f"{k} {v:.3g}" for k, v in line["stages"].items()))
    return "  ".join(parts)


def write_report(path: Path | None, lines: list[Line], failures: list[str]) -> None:
    """Write what has been measured so far."""
    if path is None:
        return
    report = {"program": "bench_fit", "fingerprint": harness.fingerprint()}
    report |= {"lines": lines, "failures": failures}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Run the program; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--only", default="", help="parts whose name contains this")
    parser.add_argument("--seconds", type=float, default=400.0, help="start no part after this")
    parser.add_argument("--json", type=Path, help="write the lines to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        device = torch.device("cpu" if args.dry_run else "cuda")
        for line in run_part(args.worker, device, args.dry_run):
            print("LINE " + json.dumps(line), flush=True)
        return 0
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device: --dry-run runs the program on the CPU", file=sys.stderr)
        return 1
    names = ["kernels", "omp", "toy q,o", "toy down", "job"] if args.dry_run else list(PARTS)
    lines: list[Line] = []
    failures: list[str] = []
    start = time.perf_counter()
    for part in names:
        if args.only not in part:
            continue
        left = args.seconds - (time.perf_counter() - start)
        if left <= 5:
            failures.append(f"{part}: not started, the time is up")
            continue
        command = [sys.executable, __file__, "--worker", part]
        command += ["--dry-run"] * args.dry_run
        try:
            limit = min(left, PARTS.get(part, 120))
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            output, problem = done.stdout, done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace")
            problem = f"took more than {error.timeout:.0f} s"
        for text in output.splitlines():
            if text.startswith("LINE "):
                lines.append(json.loads(text[5:]))
                print(describe(lines[-1]), flush=True)
        if problem:
            failures.append(f"{part}: {' | '.join(problem.strip().splitlines()[-3:])}")
            print("FAILED", failures[-1], flush=True)
        write_report(args.json, lines, failures)  # what is there when somebody stops the program
    for model in ("1b", "8b"):
        for products in PRODUCTS:
            chosen = [
                line["seconds_of_model"]
                for line in lines
                if line["name"].startswith(f"{model} ") and line["name"].split()[-1] == products
            ]
            if len(chosen) == len(models.SIZES[model].linears()):
                summary = {"name": f"{model}: all fits, {products}", "seconds": sum(chosen)}
                lines.append(summary)
                print(describe(summary), flush=True)
    write_report(args.json, lines, failures)
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
