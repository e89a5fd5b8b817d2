"""Compressed layers on a CUDA device: every kernel checked, then timed beside cuBLAS at bfloat16.

For the linear shapes of Llama-3.2-1B and Llama-3-8B at ratios 0.2 and 0.4: the whole layer, the product with S by each
kernel, the product with D, and the dense layer, for 1 to 64 rows (decoding) and 2048 (a prompt). Results are compared
with float64 products of the same random operands, made by torch alone; memory is poisoned with NaN before. Times are
medians over replays of a CUDA graph that walks through copies of the operands larger than the L2 cache; rates stand
next to the copy bandwidth measured in the same run.

Each shape runs in a worker process of its own, so that a kernel that breaks the device costs no other shape.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness
from cospadi import linear_op, native, ops, ops_cuda
from cospadi.learn.budget import sparse_size
from cospadi.native import cuda

SHAPES = {
    "1B q,o": (2048, 2048),
    "1B gate,up": (2048, 8192),
    "1B down": (8192, 2048),
    "8B q,o": (4096, 4096),
    "8B k,v": (4096, 1024),
    "8B gate,up": (4096, 14336),
    "8B down": (14336, 4096),
}
"""Name to d_in, d_out."""

DRY_SHAPES = {"tiny": (96, 80), "tiny, odd": (65, 33)}
RATIOS = (0.2, 0.4)
ROWS = (1, 4, 16, 64, 2048)
PACKED = {"int8": 8, "int4": 4}
TOLERANCE = 1e-2
"""Largest relative Frobenius error: z and y are rounded to bfloat16."""

GRAPH_SECONDS = 0.1
"""Wanted time of all timed replays of one contender."""


@dataclass
class Problem:
    """One layer: its tensors, and float64 twins of the factors for the check."""

    d_in: int
    d_out: int
    n_atoms: int
    sparsity: int
    dictionary: torch.Tensor
    mask: torch.Tensor
    coeffs: torch.Tensor
    weight: torch.Tensor
    exact: torch.Tensor
    packed: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def make_problem(d_in: int, d_out: int, ratio: float, device: torch.device) -> Problem:
    """Draw a layer at random; `exact` is S^T [d_out, n_atoms] in float32, from the indices alone."""
    n_atoms, sparsity = sparse_size(d_in, d_out, ratio)
    indices = torch.rand(d_out, n_atoms, device=device).topk(sparsity, dim=1).indices.sort(1).values
    coeffs = torch.randn(d_out, sparsity, device=device).bfloat16()
    flags = torch.zeros(d_out, -(-n_atoms // 8) * 8, dtype=torch.int32, device=device)
    flags.scatter_(1, indices, 1)
    bit = 2 ** torch.arange(8, dtype=torch.int32, device=device)
    mask = (flags.view(d_out, -1, 8) * bit).sum(2).to(torch.uint8)
    exact = torch.zeros(d_out, n_atoms, device=device).scatter_(1, indices, coeffs.float())
    dictionary = (torch.randn(d_in, n_atoms, device=device) / d_in**0.5).bfloat16()
    weight = torch.randn(d_out, d_in, device=device).bfloat16()
    problem = Problem(d_in, d_out, n_atoms, sparsity, dictionary, mask, coeffs, weight, exact)
    for name, bits in PACKED.items():
        top = 2 ** (bits - 1) - 1
        scale = coeffs.float().abs().amax(1, keepdim=True) / top
        fields = (coeffs.float() / scale).round().int()
        codes = native.pack_fields(fields.cpu(), bits).to(device)
        problem.packed[name] = (codes, scale)
    return problem


class Contender:
    """A way to compute something, over several copies of its operands."""

    def __init__(
        self,
        name: str,
        call: Callable[..., torch.Tensor],
        operands: tuple[torch.Tensor, ...],
        n_bytes: float,
        flops: float,
        expected: Callable[[], torch.Tensor] | None,
    ) -> None:
        self.name, self.call, self.operands = name, call, operands
        self.n_bytes, self.flops, self.expected = n_bytes, flops, expected

    def error(self) -> float | None:
        """Relative error on memory that was NaN before; None where another contender is the same product."""
        if self.expected is None:
            return None
        expected = self.expected()
        poison = [torch.full_like(expected, torch.nan, dtype=torch.bfloat16) for _ in range(4)]
        del poison
        result = self.call(*self.operands)[: expected.shape[0]].double()
        return ((result - expected).norm() / expected.norm()).item()


def contenders(p: Problem, rows: int, on_cuda: bool) -> list[Contender]:
    """Everything to be measured for a number of rows, the dense layer first."""
    device = p.dictionary.device
    x = torch.randn(rows, p.d_in, device=device).bfloat16()
    z = torch.randn(rows, p.n_atoms, device=device).bfloat16()
    checked = min(rows, 64)
    dense_bytes = 2.0 * p.d_in * p.d_out
    d_bytes = 2.0 * p.d_in * p.n_atoms
    s_bytes = p.mask.numel() + 2.0 * p.coeffs.numel()
    d_flops = 2.0 * rows * p.d_in * p.n_atoms
    s_flops = 2.0 * rows * p.n_atoms * p.d_out

    def layer_reference() -> torch.Tensor:
        products = (x[:checked].double() @ p.dictionary.double()).bfloat16().double()
        return products @ p.exact.double().T

    def code_reference() -> torch.Tensor:
        return z[:checked].double() @ p.exact.double().T

    def layer(x: torch.Tensor, d: torch.Tensor, mask: torch.Tensor, c: torch.Tensor) -> Any:
        return linear_op.linear(x, d, None, False, mask, c, p.sparsity)

    def code(way: str) -> Callable[..., torch.Tensor]:
        def call(z: torch.Tensor, mask: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return cuda.code_gemm_cuda(
                "S", z, None, cuda.sparse_code_cuda("S", p.n_atoms, mask, c), None, way=way
            )

        return call

    def expanded(z: torch.Tensor, mask: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        most, ops_cuda.MAX_KERNEL_ROWS = ops_cuda.MAX_KERNEL_ROWS, 0
        try:
            return ops.sparse_gemm(z, mask, c)
        finally:
            ops_cuda.MAX_KERNEL_ROWS = most

    tensors = (p.mask, p.coeffs)
    linear = torch.nn.functional.linear
    flops = 2.0 * rows * p.d_in * p.d_out
    everything = [
        Contender("dense (cuBLAS)", linear, (x, p.weight), dense_bytes, flops, None),
        Contender(
            "layer",
            layer,
            (x, p.dictionary, *tensors),
            d_bytes + s_bytes,
            d_flops + s_flops,
            layer_reference,
        ),
    ]
    if on_cuda and rows <= 64:
        for way in ("few", "tensor") if rows <= 16 else ("tensor",):
            everything.append(
                Contender(f"S {way}", code(way), (z, *tensors), s_bytes, s_flops, code_reference)
            )
    if rows >= 16:
        everything.append(
            Contender("S expanded", expanded, (z, *tensors), s_bytes, s_flops, code_reference)
        )
    if on_cuda and rows <= cuda.MAX_DENSE_ROWS:
        everything.append(
            Contender(
                "D",
                lambda x, d: cuda.dense_gemm_cuda("D", x, d),
                (x, p.dictionary),
                d_bytes,
                d_flops,
                lambda: x.double() @ p.dictionary.double(),
            )
        )
    everything.append(Contender("D (cuBLAS)", torch.mm, (x, p.dictionary), d_bytes, d_flops, None))
    if rows <= 16:
        for name, (codes, scale) in p.packed.items():
            form = native.CODE_FORMATS[name]

            def packed(
                z: torch.Tensor,
                mask: torch.Tensor,
                codes: torch.Tensor,
                scale: torch.Tensor,
                name: str = name,
            ) -> torch.Tensor:
                return ops.packed_gemm(z, mask, codes, p.sparsity, name, scale)

            def packed_reference(
                codes: torch.Tensor = codes, scale: torch.Tensor = scale, bits: int = form.bits
            ) -> torch.Tensor:
                fields = native.unpack_fields(codes.cpu(), p.sparsity, bits, signed=True)
                values = fields.to(device).double() * scale.double()
                dense = torch.zeros_like(p.exact, dtype=torch.float64)
                # the support of every column from the mask's bytes
                bit = torch.arange(8, dtype=torch.uint8, device=device)
                flags = ((p.mask.unsqueeze(-1) >> bit) & 1).flatten(1)[:, : p.n_atoms].bool()
                return z[:checked].double() @ dense.masked_scatter_(flags, values).T

            everything.append(
                Contender(
                    f"S {name}",
                    packed,
                    (z, p.mask, codes, scale),
                    p.mask.numel() + float(codes.numel()) + 4.0 * p.d_out,
                    s_flops,
                    packed_reference,
                )
            )
    return everything


def time_on_cuda(contender: Contender) -> harness.Timing:
    """Seconds per call from replays of a graph over copies of the operands that exceed twice the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = sum(t.numel() * t.element_size() for t in contender.operands[1:])
    n_copies = max(1, min(160, -(-2 * cache // max(size, 1))))
    sets = [contender.operands] + [
        (contender.operands[0], *(t.clone() for t in contender.operands[1:]))
        for _ in range(n_copies - 1)
    ]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for operands in sets[:2]:
            contender.call(*operands)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for operands in sets:
            contender.call(*operands)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(sets)

    replay()
    first = replay() * len(sets)
    n_replays = max(7, min(50, int(GRAPH_SECONDS / max(first, 1e-6))))
    return harness.summarise([replay() for _ in range(n_replays)], "cuda_graph")


def time_on_cpu(contender: Contender) -> harness.Timing:
    """Seconds per call, for the dry run."""
    return harness.measure(lambda: contender.call(*contender.operands), repeats=3)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy that fits in no cache; 0 without CUDA."""
    if device.type != "cuda":
        return 0.0
    source = torch.randn(1 << 29, device=device)  # 2 GiB
    target = torch.empty_like(source)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
    for event in events:
        event.record()
        target.copy_(source)
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events[1:])]
    return 2.0 * source.numel() * 4 / statistics.median(times)


def run_shape(name: str, args: argparse.Namespace, deadline: float) -> None:
    """Check and time everything of one shape; prints one JSON object per line."""
    device = torch.device("cpu" if args.dry_run else "cuda")
    shapes = DRY_SHAPES if args.dry_run else SHAPES
    torch.manual_seed(time.time_ns() % 2**31)  # fresh inputs in every run
    bandwidth = copy_bandwidth(device)
    emit({"bandwidth": bandwidth})
    with torch.no_grad():
        for ratio in RATIOS:
            problem = make_problem(*shapes[name], ratio, device)
            for rows in ROWS if not args.dry_run else (1, 4, 40):
                base: float | None = None
                for contender in contenders(problem, rows, device.type == "cuda"):
                    if time.time() > deadline:
                        emit({"failed": f"{name}, ratio {ratio}, {rows} rows: out of time"})
                        return
                    line = measure_one(contender, device)
                    if contender.name.startswith("dense"):
                        base = line.get("median")
                    line |= {"shape": name, "ratio": ratio, "rows": rows, "dense": base}
                    line |= {"n_atoms": problem.n_atoms, "sparsity": problem.sparsity}
                    emit(line)


def measure_one(contender: Contender, device: torch.device) -> dict[str, Any]:
    """Check and time one contender; a failure becomes a line, unless the device itself is lost."""
    line: dict[str, Any] = {"name": contender.name, "bytes": contender.n_bytes}
    try:
        error = contender.error()
        line |= {"error": error, "flops": contender.flops}
        if error is not None and not error < TOLERANCE:
            line["failed"] = f"relative error {error:.2e}"
        timing = time_on_cuda(contender) if device.type == "cuda" else time_on_cpu(contender)
        line |= {
            "median": timing.median,
            "lower_quartile": timing.lower_quartile,
            "upper_quartile": timing.upper_quartile,
            "n": timing.n,
        }
    except Exception as error:
        line["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if device.type == "cuda":
            torch.cuda.synchronize()  # raises where the device is lost: the worker ends
    return line


def emit(line: dict[str, Any]) -> None:
    """Write one line for the parent process."""
    print(json.dumps(line), flush=True)


def print_line(line: dict[str, Any], bandwidth: float) -> None:
    """Print one measurement as a row of the table."""
    text = f"{line['shape']:10s} {line['ratio']:.1f} {line['rows']:5d}  {line['name']:15s}"
    if "median" in line:
        rate = line["bytes"] / line["median"]
        share = f"{100 * rate / bandwidth:4.0f} %" if bandwidth else "   - "
        text += f" {line['median'] * 1e6:9.2f} us {rate / 1e9:7.0f} GB/s {share}"
        text += f" {line['flops'] / line['median'] / 1e12:7.1f} TF/s"
        if line.get("dense"):
            text += f" {line['dense'] / line['median']:5.2f} x dense"
        if line.get("error") is not None:
            text += f"  error {line['error']:.1e}"
    print(text + (f"  FAILED {line['failed']}" if "failed" in line else ""), flush=True)


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", help="shapes whose name contains this")
    parser.add_argument("--seconds", type=float, default=200.0, help="stop measuring after this")
    parser.add_argument("--json", type=Path, help="write the lines to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    deadline = time.time() + args.seconds
    if args.worker is not None:
        run_shape(args.worker, args, deadline)
        return 0
    shapes = DRY_SHAPES if args.dry_run else SHAPES
    names = [name for name in shapes if not args.only or args.only in name]
    if not args.dry_run and not torch.cuda.is_available():
        print("no CUDA device: --dry-run runs the program on the CPU", file=sys.stderr)
        return 2
    lines: list[dict[str, Any]] = []
    failures: list[str] = []
    for name in names:
        left = deadline - time.time()
        if left < 0:
            failures.append(f"{name}: out of time")
            continue
        command = [sys.executable, __file__, "--worker", name, "--seconds", str(left)]
        worker = subprocess.Popen(
            command + (["--dry-run"] if args.dry_run else []), stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        bandwidth = 0.0
        for text in worker.stdout:
            line = json.loads(text)
            if "bandwidth" in line:
                bandwidth = line["bandwidth"]
                print(f"{name}: copy {bandwidth / 1e9:.0f} GB/s", flush=True)
                continue
            if "failed" in line:
                failures.append(
                    f"{line.get('shape', name)} {line.get('name', '')}: {line['failed']}"
                )
            if "shape" in line:
                print_line(line, bandwidth)
                lines.append(line | {"bandwidth": bandwidth})
        if worker.wait() != 0:
            failures.append(f"{name}: the worker ended with {worker.returncode}")
    if args.json:
        report = {"program": "bench_inference", "fingerprint": harness.fingerprint()}
        if torch.cuda.is_available():
            report["device"] = torch.cuda.get_device_name()
        args.json.write_text(json.dumps(report | {"failures": failures, "lines": lines}, indent=1))
    for failure in failures:
        print("FAILED", failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
