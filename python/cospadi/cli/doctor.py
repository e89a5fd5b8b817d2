"""``cospadi doctor``."""

from __future__ import annotations

import os
from pathlib import Path

import typer

from cospadi.cli.common import write_json


def doctor_command(
    json_out: Path | None = typer.Option(None, "--json", help="Write as JSON; - for stdout."),
) -> None:
    """Print versions, instruction set, CUDA and memory, to paste into a bug report."""
    import numpy
    import safetensors
    import torch

    from cospadi import native
    from cospadi.versions import versions

    info: dict[str, object] = {
        **versions(),
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        **native.runtime_info(),
        "cuda_kernels": "none in this version",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "COSPADI_ISA": os.environ.get("COSPADI_ISA", ""),
    }
    write_json(json_out, info)
    if str(json_out) != "-":
        for key, value in info.items():
            typer.echo(f"{key:>24}  {value}")
