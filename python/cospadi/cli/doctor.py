"""``cospadi doctor``."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from cospadi.cli.common import write_json


def _cuda_kernels(runtime: dict[str, object], torch_has_cuda: bool) -> str:
    """Say what CUDA tensors can be used for here, and what is missing for more."""
    if not runtime["cuda_built"]:
        return "none: this build has no CUDA (build where nvcc is on PATH)"
    if not runtime["cuda_devices"]:
        return "built, not usable: no CUDA device or driver"
    if not torch_has_cuda:
        return "built, not usable: torch sees no CUDA device (a CPU build of torch?)"
    return "inference"


def doctor_command(
    json_out: Path | None = typer.Option(None, "--json", help="Write as JSON; - for stdout."),
) -> None:
    """Print versions, instruction set, CUDA and memory, to paste into a bug report."""
    import numpy
    import safetensors
    import torch

    from cospadi import native
    from cospadi.versions import versions

    runtime = native.runtime_info()
    info: dict[str, object] = {
        **versions(),
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        **runtime,
        "cuda_kernels": _cuda_kernels(runtime, torch.cuda.is_available()),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "COSPADI_ISA": os.environ.get("COSPADI_ISA", ""),
    }
    write_json(json_out, info)
    if str(json_out) != "-":
        for key, value in info.items():
            typer.echo(f"{key:>24}  {value}")
