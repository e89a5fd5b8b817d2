"""The report of a compression: its data, written beside the checkpoint, and its page, which can be written again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cospadi.calibration.data import CalibrationSet
from cospadi.checkpoint.format import CospadiConfigData, ModuleEntry
from cospadi.checkpoint.manifest import has_manifest, renew_manifest
from cospadi.checkpoint.reader import checked_file
from cospadi.checkpoint.strict_json import check_plain, read_json_object
from cospadi.errors import CheckpointError, InputError
from cospadi.factor import removed_shares
from cospadi.model.source import SourceModel
from cospadi.pipeline.recipe import Recipe
from cospadi.report.card import PAGE_FILE
from cospadi.report.compression_page import compression_page
from cospadi.report.files import write_text
from cospadi.report.scores import read_scores

if TYPE_CHECKING:
    from cospadi.pipeline.compress import CompressResult

REPORT_FILE = "cospadi_report.json"
REPORT_VERSION = 1

BF16_BYTES = 2
"""Of every value of the model that ratios compare with."""


def report_data(
    source: SourceModel,
    data: CospadiConfigData,
    result: CompressResult,
    recipe: Recipe,
    calibration: CalibrationSet | None,
    versions: dict[str, str],
) -> dict[str, Any]:
    """Everything that is known about a compression, as plain data.

    Parameters
    ----------
    source : SourceModel
        With the compressed layers in their places.
    data : CospadiConfigData
        Of the checkpoint.
    """
    specs = [entry.spec for entry in data.modules.values()]
    others = _other_values(source.model, data)
    sizes = {"dense": result.dense_bytes, "stored": result.stored_bytes}
    return {
        "report_version": REPORT_VERSION,
        "source": {"name": source.name, "kind": source.kind, "fingerprint": source.fingerprint},
        "recipe": recipe.to_mapping(),
        "calibration": None
        if calibration is None
        else {
            "ids_sha256": calibration.sha256,
            "shape": list(calibration.ids.shape),
            "description": calibration.description,
        },
        "versions": versions,
        "threads": torch.get_num_threads(),
        "notes": list(source.notes),
        "seconds": round(result.seconds, 2),
        "calibration_seconds": round(result.calibration_seconds, 2),
        "stages": result.stages,
        "resumed": result.n_resumed,
        "bytes": {
            "linears": sizes,
            "model": {key: value + BF16_BYTES * others for key, value in sizes.items()},
        },
        "ratio": data.ratio,
        "model_ratio": removed_shares(specs, others),
        "modules": {
            name: {**_sizes(data.modules[name]), **found} for name, found in result.reports.items()
        },
        "dense": [
            {"module": item.name, "shape": list(item.shape), "reason": item.reason}
            for item in result.dense
        ],
        "failed": list(result.failed),
        "allocation": None if result.allocation is None else result.allocation.to_mapping(),
        "reconstruction": result.reconstruction,
    }


def _sizes(entry: ModuleEntry) -> dict[str, Any]:
    spec = entry.spec
    return {
        "d_in": spec.d_in,
        "d_out": spec.d_out,
        "n_identity": spec.n_identity,
        "n_atoms": spec.n_atoms,
        "sparsity": spec.sparsity,
        "coeffs_dtype": spec.coeffs_dtype,
        "dictionary_dtype": spec.dictionary_dtype,
        "leader": entry.leader,
        "dense_bytes": spec.dense_bits // 8,
        "stored_bytes": spec.stored_bytes,
    }


def _other_values(model: nn.Module, data: CospadiConfigData) -> int:
    """Values of a model that are stored as they are: all but the compressed weights; tied ones count once."""
    compressed = set(data.expected_tensors())
    others = {
        (tensor.data_ptr(), tensor.shape): tensor.numel()
        for name, tensor in model.state_dict().items()
        if name not in compressed or name.endswith(".bias")
    }
    return sum(others.values())


def renew_page(directory: str | Path, evaluations: Sequence[str | Path] = ()) -> Path:
    """Write the page of a compressed checkpoint again, from its report.

    Parameters
    ----------
    directory : str or Path
        Compressed directory. Its manifest, where there is one, follows.
    evaluations : sequence of str or Path
        Files of ``cospadi eval --json`` whose numbers the page shows, of this model, of the dense one, of others.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InputError
        There is no report, it is damaged, a file holds no evaluation, or the page cannot be written.
    """
    folder = Path(directory)
    if not (folder / REPORT_FILE).exists():
        raise InputError(
            f"{folder / REPORT_FILE}: missing; it is in the folder that compress wrote"
        )
    data = _plain_object(checked_file(folder, REPORT_FILE))
    scores = [
        score for file in evaluations for score in read_scores(_plain_object(Path(file)), str(file))
    ]
    try:
        text = compression_page(data, scores)
    except InputError as error:
        raise CheckpointError(f"{folder / REPORT_FILE}: {error}") from None
    page = folder / PAGE_FILE
    write_text(page, text)
    if has_manifest(folder):
        renew_manifest(folder, PAGE_FILE)
    return page


def _plain_object(path: Path) -> Mapping[str, Any]:
    data = read_json_object(path)
    check_plain(data, str(path))
    return data
