"""The report of a compression: its data, written beside the checkpoint, and its page, which can be written again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cospadi.calibration.data import CalibrationSet
from cospadi.checkpoint.format import CospadiConfigData, ModuleEntry
from cospadi.checkpoint.manifest import RUN_FILE, has_manifest, renew_manifest
from cospadi.checkpoint.reader import checked_file
from cospadi.errors import CheckpointError, InputError
from cospadi.factor.spec import removed_shares
from cospadi.model.source import SourceModel
from cospadi.model.streamed import StreamedSource
from cospadi.pipeline.measurements import add_measurements, plain_object, write_measurements
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.stated_origin import stated_origin
from cospadi.report.card import CARD_FILE, PAGE_FILE, model_card, with_measured
from cospadi.report.compression_page import compression_page
from cospadi.report.files import write_text
from cospadi.report.scores import Score

if TYPE_CHECKING:
    from cospadi.pipeline.compress import CompressResult

REPORT_FILE = "cospadi_report.json"
REPORT_VERSION = 1

RUN_KEYS = ("threads", "seconds", "calibration_seconds", "stages", "resumed")
"""What differs between runs with equal results: kept in the run record, not in the report."""

_CLOCKS = ("coding_s", "update_s")
"""Times in the alternations of a module."""

BF16_BYTES = 2
"""Of every value of the model that ratios compare with."""


def report_data(
    source: SourceModel | StreamedSource,
    data: CospadiConfigData,
    result: CompressResult,
    recipe: Recipe,
    calibration: CalibrationSet | None,
    versions: dict[str, str],
) -> dict[str, Any]:
    """Everything that is known about a compression, as plain data; `split_report` says which part goes where.

    Parameters
    ----------
    source : SourceModel
        The original model; the compressed layers may be in their places.
    data : CospadiConfigData
        Of the checkpoint.
    """
    specs = [entry.spec for entry in data.modules.values()]
    others = _other_values(source.model, data)
    sizes = {"dense": result.dense_bytes, "stored": result.stored_bytes}
    return {
        "report_version": REPORT_VERSION,
        "source": {
            "name": source.name,
            "kind": source.kind,
            "fingerprint": source.fingerprint,
            **stated_origin(source.path),
        },
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


def split_report(data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate what equal inputs decide (`REPORT_FILE`) from what differs from run to run (the run record)."""
    report = {key: value for key, value in data.items() if key not in RUN_KEYS}
    run: dict[str, Any] = {key: data[key] for key in RUN_KEYS if key in data}
    times: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    for name, module in data["modules"].items():
        history = module.get("history") or []
        times[name] = {"seconds": module.get("seconds")}
        if history:
            times[name] |= {key: [step[key] for step in history] for key in _CLOCKS}
        kept = [
            {key: value for key, value in step.items() if key not in _CLOCKS} for step in history
        ]
        modules[name] = {
            key: kept if key == "history" else value
            for key, value in module.items()
            if key != "seconds"
        }
    report["modules"], run["modules"] = modules, times
    if data.get("reconstruction") is not None:
        run["reconstruction"] = [block["seconds"] for block in data["reconstruction"]]
        report["reconstruction"] = [
            {key: value for key, value in block.items() if key != "seconds"}
            for block in data["reconstruction"]
        ]
    return report, run


def read_report(directory: str | Path) -> dict[str, Any]:
    """The report of a compressed directory, with what its run record adds to it where there is one.

    Raises
    ------
    CheckpointError
        One of them is no plain JSON object, or leads out of the directory.
    """
    folder = Path(directory)
    report = plain_object(checked_file(folder, REPORT_FILE))
    if not os.path.lexists(folder / RUN_FILE):
        return report
    run = plain_object(checked_file(folder, RUN_FILE))
    report |= {key: run[key] for key in RUN_KEYS if key in run}
    modules, times = report.get("modules"), run.get("modules")
    if isinstance(modules, dict) and isinstance(times, dict):
        for name, module in modules.items():
            found = times.get(name)
            if isinstance(module, dict) and isinstance(found, dict):
                module["seconds"] = found.get("seconds")
    blocks, seconds = report.get("reconstruction"), run.get("reconstruction")
    if isinstance(blocks, list) and isinstance(seconds, list):
        for block, value in zip(blocks, seconds, strict=False):
            if isinstance(block, dict):
                block["seconds"] = value
    return report


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
    replaced = {f"{name}.weight" for name in data.modules}
    compressed = (set(data.expected_tensors()) | replaced) - {f"{n}.bias" for n in data.modules}
    others = {
        # without data all addresses are equal, and tied tensors are one object
        (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape): tensor.numel()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in compressed
    }
    return sum(others.values())


def renew_page(
    directory: str | Path,
    evaluations: Sequence[str | Path] = (),
    originals: Sequence[str | Path] = (),
) -> Path:
    """Write the page of a compressed checkpoint again, from its report, and the measurements in its model card.

    Measurements stay in the folder: later calls add to them, and replace those of the same model on the same text or
    task.

    Parameters
    ----------
    directory : str or Path
        Compressed directory. Its manifest, where there is one, follows.
    evaluations : sequence of str or Path
        Files of ``cospadi eval --json`` whose numbers the page shows, of this model, of the original one, of others.
    originals : sequence of str or Path
        Such files of the original model, under whatever name it was measured.

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
    data = read_report(folder)
    source = data.get("source")
    source_name = str(source.get("name")) if isinstance(source, dict) else ""
    scores = add_measurements(folder, source_name, evaluations, originals)
    try:
        page = compression_page(data, scores)
        card = _renewed_card(folder, data, scores)
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(f"{folder / REPORT_FILE}: {error}") from None
    if evaluations or originals:
        write_measurements(folder, scores)
    for name, text in ((PAGE_FILE, page), (CARD_FILE, card)):
        write_text(folder / name, text)
        if has_manifest(folder):
            renew_manifest(folder, name)
    return folder / PAGE_FILE


def _renewed_card(folder: Path, data: Mapping[str, Any], scores: Sequence[Score]) -> str:
    """The folder's card with these measurements, or a new one where it has none."""
    if not os.path.lexists(folder / CARD_FILE):
        has_tokenizer = (folder / "tokenizer_config.json").exists()
        return model_card(data, scores, has_tokenizer=has_tokenizer)
    path = checked_file(folder, CARD_FILE)
    try:
        card = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return with_measured(card, scores)
