"""What is in a compressed directory."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from cospadi.checkpoint.reader import CompressedCheckpoint, read_checkpoint
from cospadi.factor.spec import removed_shares
from cospadi.pipeline.report import BF16_BYTES, REPORT_FILE


def read_report(directory: Path) -> dict[str, Any]:
    """The report written beside a checkpoint; empty if it is missing or not readable.

    It is informative only: nothing that decides how tensors are read comes from it.
    """
    try:
        data = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def inspect_checkpoint(directory: str | Path) -> dict[str, Any]:
    """Modules, errors, bytes and ratios.

    Returns
    -------
    dict
        ``modules``: per module sizes and storage types, ``dictionary`` (name of the module whose
        dictionary it uses, None for its own: the bytes below then leave the dictionary to that
        module), stored_bytes, file_bytes, bits_per_weight, relative_error (None if not reported), weight_error,
        seconds; where the budget was divided by loss, ``loss`` that the module was predicted to cost (nats per token)
        and ``even_loss`` with the same share for all, else None.
        ``bytes`` and ``ratio`` for ``linears`` (the compressed ones) and ``model``; a ratio is the
        removed share of values (mask not counted), by the paper's Eq. 10 (``mask16``) and Eq. 11
        (``mask14``), of stored bytes (mask counted, from the sizes), and of file bytes (what the files
        really hold; for the model headers included), each against bf16.

    Raises
    ------
    CheckpointError
        The directory is no compressed checkpoint or damaged.
    """
    checkpoint = read_checkpoint(directory)
    report = read_report(Path(directory))
    reported = report.get("modules")
    reported = reported if isinstance(reported, dict) else {}
    losses, even_losses = _losses(report, "losses"), _losses(report, "even_losses")
    modules: dict[str, Any] = {}
    for name, entry in checkpoint.data.modules.items():
        spec = entry.spec
        entry_report = reported.get(name)
        entry_report = entry_report if isinstance(entry_report, dict) else {}
        modules[name] = {
            "d_in": spec.d_in,
            "d_out": spec.d_out,
            "n_atoms": spec.n_atoms,
            "sparsity": spec.sparsity,
            "n_identity": spec.n_identity,
            "support": spec.support,
            "dictionary_dtype": spec.dictionary_dtype,
            "coeffs_dtype": spec.coeffs_dtype,
            "coeffs_group": spec.coeffs_group,
            "dictionary": entry.leader,
            "layer_type": entry.layer_type,
            "dictionary_shape": [spec.d_in, spec.n_atoms],
            "coeffs_shape": [spec.d_out, spec.sparsity],
            "stored_bytes": spec.stored_bytes,
            "file_bytes": _file_bytes(checkpoint, name),
            "dense_bytes": spec.dense_bits // 8,
            "bits_per_weight": spec.stored_bits / (spec.d_in * spec.d_out),
            "loss": losses.get(name),
            "even_loss": even_losses.get(name),
            "relative_error": entry_report.get("relative_error"),
            "weight_error": entry_report.get("weight_error"),
            "seconds": entry_report.get("seconds"),
        }
    failed = report.get("failed")
    return {
        "directory": str(directory),
        "format_version": checkpoint.data.format_version,
        "producer": checkpoint.data.producer,
        "modules": modules,
        "failed": failed if isinstance(failed, list) else [],
        **_ratios(checkpoint),
    }


def _losses(report: dict[str, Any], key: str) -> dict[str, float]:
    allocation = report.get("allocation")
    found = allocation.get(key) if isinstance(allocation, dict) else None
    if not isinstance(found, dict):
        return {}
    return {name: loss for name, loss in found.items() if isinstance(loss, (int, float))}


def _file_bytes(checkpoint: CompressedCheckpoint, module: str) -> int:
    """Bytes of the tensors that replace the weight; the bias is there in the dense layer too."""
    prefix = f"{module}."
    return sum(
        info.nbytes
        for name, info in checkpoint.tensors.items()
        if name.startswith(prefix) and name != f"{module}.bias"
    )


def _ratios(checkpoint: CompressedCheckpoint) -> dict[str, Any]:
    specs = [entry.spec for entry in checkpoint.data.modules.values()]
    dense = sum(spec.dense_bits for spec in specs) // 8
    stored = sum(spec.stored_bytes for spec in specs)
    in_files = sum(_file_bytes(checkpoint, name) for name in checkpoint.data.modules)
    compressed = set(checkpoint.data.expected_tensors())
    other_values = sum(
        prod(info.shape)
        for name, info in checkpoint.tensors.items()
        if name not in compressed or name.endswith(".bias")
    )
    model_dense = dense + BF16_BYTES * other_values
    return {
        "bytes": {
            "linears": {"dense": dense, "stored": stored, "file": in_files},
            "model": {
                "dense": model_dense,
                "stored": stored + BF16_BYTES * other_values,
                "file": checkpoint.file_bytes,
            },
        },
        "ratio": {
            "linears": {**removed_shares(specs), "file": 1.0 - in_files / dense},
            "model": {
                **removed_shares(specs, other_values),
                "file": 1.0 - checkpoint.file_bytes / model_dense,
            },
        },
    }
