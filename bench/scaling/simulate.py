"""When compressions of large models end: matrices of their shapes, measured rates, the queue with failing workers.

    python bench/scaling/simulate.py costs.json [--out simulation.json]

Prints the tables of docs/scaling.md. Cores are those that `measure.py` measured. GPUs are an assumption, `GPU_SHARE` of
the peak of an H200 in float32: nothing has run on one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from queue_model import Block, Setting, Task, simulate

from cospadi.learn.methods import factor_size
from cospadi.pipeline import costs
from cospadi.pipeline.plan import storage_widths
from cospadi.pipeline.recipe import Recipe

GPU_PEAK = 67e12
GPU_SHARE = 0.25
GPU_OVERHEAD_S = 1.0
"""Launches, and moving a task there and back: assumed."""


@dataclass(frozen=True)
class Model:
    """Shapes of a block's linears (d_in, d_out, how many), blocks, experts that a token meets of how many."""

    layers: int
    linears: tuple[tuple[int, int, int], ...]
    active: float = 1.0

    def n_matrices(self) -> int:
        """Of the whole model."""
        return self.layers * sum(count for _, _, count in self.linears)


MODELS = {
    "Llama-3-8B": Model(32, ((4096, 4096, 2), (4096, 1024, 2), (4096, 14336, 2), (14336, 4096, 1))),
    "Llama-3-70B": Model(
        80, ((8192, 8192, 2), (8192, 1024, 2), (8192, 28672, 2), (28672, 8192, 1))
    ),
    "Llama-3-405B": Model(
        126, ((16384, 16384, 2), (16384, 1024, 2), (16384, 53248, 2), (53248, 16384, 1))
    ),
    "MoE, 61 x 256 experts": Model(61, ((7168, 2048, 512), (2048, 7168, 256)), active=8 / 256),
}


@dataclass(frozen=True)
class Machine:
    """Seconds of a worker: ``overhead + operations / rate`` by stage."""

    name: str
    rates: dict[str, float]
    overheads: dict[str, float]

    def seconds(self, stage: str, flops: float) -> float:
        """Of one stage."""
        return self.overheads[stage] + flops / self.rates[stage]


def measured_core(data: dict[str, Any]) -> Machine:
    """One core, from the JSON of `measure.py`."""
    fits = {name: stage["fit"] for name, stage in data["stages"].items()}
    return Machine(
        "core, measured",
        {name: fit["flops_per_s"] for name, fit in fits.items()},
        {name: fit["overhead_s"] for name, fit in fits.items()},
    )


def assumed_gpu(stages: Sequence[str]) -> Machine:
    """A GPU that nobody measured."""
    return Machine(
        "GPU, assumed",
        dict.fromkeys(stages, GPU_SHARE * GPU_PEAK),
        dict.fromkeys(stages, GPU_OVERHEAD_S),
    )


def n_atoms(d_in: int, d_out: int, ratio: float) -> int:
    """Learned atoms of the default method."""
    recipe = Recipe(ratio=ratio)
    size = factor_size(
        recipe.method, d_in, d_out, ratio, k_over_s=recipe.rho, convention=recipe.ratio_convention,
        widths=storage_widths(recipe.types_at(ratio, d_in)), dictionary=recipe.atoms,
        learned_share=recipe.learned_share,
    )  # fmt: skip
    return size.n_atoms


def blocks_of(
    model: Model, worker: Machine, coordinator: Machine, tokens: int, ratio: float = 0.2
) -> list[Block]:
    """The run of a model: calibration of a block by the coordinator, then the fits of its matrices."""
    kinds, forward, gram = [], 0.0, 0.0
    n_steps = costs.rise_steps(Recipe().first_penalty, Recipe().penalty_growth)
    for position, (d_in, d_out, count) in enumerate(model.linears, 1):
        flops = costs.augmented_flops(d_in, d_out, n_atoms(d_in, d_out, ratio), n_steps)
        seconds = worker.seconds("augmented", flops) + worker.seconds(
            "whitening", costs.whitening_flops(d_in)
        )
        # as ModulePlan.cost of a dictionary with identity atoms
        cost = 2.0 * d_in * d_out * min(d_in, d_out)
        # the plain Gram and, for all but the last product of the block, the one with weighted tokens
        n_grams = 1 if position == len(model.linears) else 2
        kinds.append((cost, seconds, n_grams * 8 * d_in**2 + 4 * d_in * d_out, count))
        forward += 2.0 * tokens * d_in * d_out * count * model.active
    # distinct inputs: of attention, of its output, of the two halves of the MLP; experts have their own
    inputs = (
        [d for d, _, count in model.linears[:1] for _ in range(2)] if model.active == 1.0 else []
    )
    inputs += [model.linears[-2][0], model.linears[-1][0]]
    experts = 1 if model.active == 1.0 else model.linears[-1][2]
    seen = int(tokens * model.active)
    gram = sum(costs.gram_flops(seen, d) for d in inputs) * experts
    calibration = coordinator.seconds("gram", forward + gram)
    blocks = []
    for layer in range(model.layers):
        tasks = [
            Task(f"{layer:04}.{kind}.{index:04}", cost, seconds, n_bytes)
            for kind, (cost, seconds, n_bytes, count) in enumerate(kinds)
            for index in range(count)
        ]
        blocks.append(Block(tasks, calibration))
    return blocks


def duration(seconds: float) -> str:
    """For people."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def time_and_disk(found: dict[str, Any]) -> str:
    """Duration and largest queue of a run."""
    return f"{duration(found['seconds'])}, {found['most_queued'] / 1e9:,.0f} GB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("costs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=64 * 1024)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    core = measured_core(json.loads(args.costs.read_text()))
    gpu = assumed_gpu(list(core.rates))
    results: list[dict[str, Any]] = []

    def run(name: str, machine: Machine, **given: Any) -> dict[str, Any]:
        blocks = blocks_of(MODELS[name], machine, machine, args.tokens)
        outcomes = [simulate(blocks, replace(Setting(1), **given, seed=seed)) for seed in range(
            args.seeds if given.get("failures_per_hour") else 1
        )]  # fmt: skip
        mean = {
            key: sum(getattr(o, key) for o in outcomes) / len(outcomes)
            for key in (
                "seconds",
                "lost_s",
                "useful_s",
                "calibration_s",
                "n_failures",
                "most_queued",
            )
        }
        mean["dense"] = sum(len(o.dense) for o in outcomes) / len(outcomes)
        results.append({"model": name, "machine": machine.name, **given, **mean})
        return results[-1]

    rows = []
    for name in args.models:
        model = MODELS[name]
        on_core, on_gpu = (run(name, m, n_workers=1) for m in (core, gpu))
        longest = max(t.seconds for t in blocks_of(model, core, core, args.tokens)[0].tasks)
        rows.append([
            name, f"{model.n_matrices():,}", f"{on_core['useful_s'] / 3600:,.0f} h", duration(longest),
            f"{on_core['calibration_s'] / 3600:,.1f} h", f"{on_gpu['useful_s'] / 3600:,.1f} h",
            duration(on_gpu["calibration_s"]),
        ])  # fmt: skip
    print(table(
        ["model", "matrices", "fits, one core", "longest fit", "calibration, one core", "fits, one GPU (assumed)",
         "calibration, one GPU (assumed)"], rows,
    ), end="\n\n", flush=True)  # fmt: skip
    for label, machine, counts in (
        ("cores (measured rate)", core, (16, 64, 256)),
        ("GPUs (assumed)", gpu, (1, 4, 16, 64)),
    ):
        rows = [
            [name, *(time_and_disk(run(name, machine, n_workers=n)) for n in counts)]
            for name in args.models
        ]
        print(table([label, *map(str, counts)], rows), end="\n\n", flush=True)
    rows = []
    large = [name for name in args.models if name in ("Llama-3-70B", "Llama-3-405B")]
    cases = [(name, gpu, 16, (0.0, 0.1, 1.0)) for name in large]
    cases += [(name, core, 256, (0.0, 0.01)) for name in large[:1]]
    for name, machine, n, rates in cases:
        for rate in rates:
            found = run(name, machine, n_workers=n, failures_per_hour=rate)
            rows.append([
                name, f"{n} x {machine.name}", str(rate), duration(found["seconds"]), f"{found['n_failures']:.0f}",
                f"{found['lost_s'] / max(found['useful_s'], 1e-9):.2%}", f"{found['dense']:.1f}",
            ])  # fmt: skip
    head = [
        "model",
        "workers",
        "failures per worker and hour",
        "done after",
        "failures",
        "work lost",
    ]
    print(table([*head, "left dense"], rows))
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
