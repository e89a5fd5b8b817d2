"""Checking that a compressed directory holds what it states."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from cospadi.calibration.data import CalibrationSet, load_calibration
from cospadi.calibration.statistics import collect_grams
from cospadi.checkpoint.hazards import check_hazards
from cospadi.checkpoint.manifest import has_manifest, verify_manifest
from cospadi.checkpoint.reader import CompressedCheckpoint, checked_file, read_checkpoint
from cospadi.checkpoint.strict_json import read_json_object
from cospadi.errors import (
    CheckpointError,
    InputError,
    NewerFormatError,
    NotCompressedError,
    VerificationError,
)
from cospadi.learn.whitening import relative_error, weight_error
from cospadi.model.discover import TargetLinear, discover, weight_of
from cospadi.model.source import SourceModel, open_source
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.recipe_file import recipe_from_mapping
from cospadi.pipeline.report import REPORT_FILE

ERROR_TOLERANCE = 1e-3

_EVERY_LINEAR = (".*",)


def verify_checkpoint(directory: str | Path) -> int:
    """Check hashes against the manifest, then every factor's shapes, mask population and values.

    No other tensor may hold a NaN or an infinity either, and no file may lead `cospadi.load` elsewhere.

    A directory without a manifest (`cospadi.checkpoint.manifest.has_manifest`) is checked but for the hashes.

    Returns
    -------
    int
        Number of compressed modules.

    Raises
    ------
    NotCompressedError
        The directory is no compressed checkpoint.
    NewerFormatError
        A newer version of cospadi made it.
    VerificationError
        A file is missing, damaged or does not match its hash, or a tensor is wrong.
    """
    try:
        checkpoint = read_checkpoint(directory)
        check_hazards(checkpoint)
        problems = verify_manifest(directory).problems if has_manifest(directory) else ()
        for name in () if problems else checkpoint.data.modules:
            checkpoint.factor(name)
        for name in () if problems else _other_tensors(checkpoint):
            tensor = checkpoint.tensor(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise VerificationError(f"{name}: holds a value that is not finite")
    except NotCompressedError as error:
        if has_manifest(directory):  # it was one
            raise VerificationError(str(error)) from None
        raise
    except NewerFormatError as error:
        if has_manifest(directory) and verify_manifest(directory).problems:
            raise VerificationError(str(error)) from None
        raise
    except InputError as error:
        raise VerificationError(str(error)) from None
    if problems:
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise VerificationError(problems[0] + more)
    return len(checkpoint.data.modules)


def verify_errors(
    directory: str | Path, source: str | Path, *, calibration: str | None = None
) -> float:
    """Recompute the stated errors of every compressed module from the written files and the original model.

    Tensors of the same name that were not compressed must be those of the original, rounded to the stored type.

    The errors of the weights need nothing else. For those of the activations the recipe's calibration runs again; its
    token ids must hash to what the report states. A recipe without calibration states errors of weights only.

    Parameters
    ----------
    directory : str or Path
        Compressed directory.
    source : str or Path
        The original model, as for `cospadi.model.source.open_source`.
    calibration : str, optional
        Where the calibration text is now, if it moved.

    Returns
    -------
    float
        Largest relative difference between a stated and a recomputed error.

    Raises
    ------
    NotCompressedError
        The directory is no compressed checkpoint.
    InputError
        There is no report, the source cannot be opened, or the calibration text is not there.
    VerificationError
        The report is damaged, the source is another model, the ids differ, an error differs by more than
        `ERROR_TOLERANCE` relative, or an embedding, a norm or another uncompressed tensor is not the source's.
    """
    checkpoint = read_checkpoint(directory)
    report = _read_report(checkpoint)
    recipe = _recipe(checkpoint, report)
    stated = {name: _stated_errors(checkpoint, report, name) for name in checkpoint.data.modules}
    if calibration is not None and not recipe.uses_calibration:
        raise InputError(
            f"calibration {calibration!r}: {directory} was made without calibration; leave it out"
        )
    opened = open_source(source)
    targets = _matching_targets(checkpoint, opened)
    _check_fingerprint(checkpoint, report, opened)

    worst = 0.0
    for target in targets:
        found = _weight_error(opened, target, checkpoint)
        # without activations both stated numbers are errors of the weight
        kinds = ["weight_error"] if recipe.uses_calibration else ["weight_error", "relative_error"]
        for kind in kinds:
            worst = max(worst, _difference(target.name, kind, stated[target.name], found))
    _check_other_tensors(checkpoint, opened)
    if not recipe.uses_calibration:
        return worst

    ids = _calibration_ids(checkpoint, report, recipe, opened, calibration)
    by_name = {target.name: target for target in targets}
    limit = recipe.max_gram_gb
    for finished in collect_grams(
        opened.model,
        targets,
        ids.ids,
        batch_size=recipe.batch_size,
        max_gram_bytes=None if limit is None else int(limit * 2**30),
    ):
        while finished.grams:  # let go of each Gram as soon as its modules are done
            _, statistics = finished.grams.popitem()
            for name in statistics.members:
                weight, _ = weight_of(opened.model, by_name[name])
                found = relative_error(
                    statistics.gram, weight, checkpoint.factor(name).dense_weight()
                )
                worst = max(worst, _difference(name, "relative_error", stated[name], found))
    return worst


def _other_tensors(checkpoint: CompressedCheckpoint) -> list[str]:
    """Names of the tensors that belong to no compressed module."""
    compressed = checkpoint.data.expected_tensors()
    return [name for name in checkpoint.tensors if name not in compressed]


def _check_other_tensors(checkpoint: CompressedCheckpoint, opened: SourceModel) -> None:
    originals = opened.model.state_dict()
    for name in _other_tensors(checkpoint):
        original = originals.get(name)
        stored = checkpoint.tensor(name)
        if original is None or not stored.is_floating_point():
            continue  # under another name in the files, as fused experts are
        if stored.shape != original.shape or not torch.equal(stored, original.to(stored.dtype)):
            raise VerificationError(
                f"{name}: not compressed, and yet another tensor than that of {opened.name}"
            )


def _read_report(checkpoint: CompressedCheckpoint) -> dict[str, Any]:
    path = checkpoint.path / REPORT_FILE
    if not path.exists():
        raise InputError(
            f"{path}: missing, and nothing else states errors to verify: it is in the folder that compress wrote"
        )
    try:
        return read_json_object(checked_file(checkpoint.path, REPORT_FILE))
    except CheckpointError as error:
        raise VerificationError(str(error)) from None


def _recipe(checkpoint: CompressedCheckpoint, report: dict[str, Any]) -> Recipe:
    where = f"{checkpoint.path / REPORT_FILE}: recipe"
    recipe = report.get("recipe")
    if not isinstance(recipe, dict):
        raise VerificationError(f"{where}: expected an object, got {type(recipe).__name__}")
    try:
        return recipe_from_mapping(recipe, source=where)
    except InputError as error:
        raise VerificationError(str(error)) from None


def _stated_errors(
    checkpoint: CompressedCheckpoint, report: dict[str, Any], name: str
) -> dict[str, float]:
    modules = report.get("modules")
    entry = modules.get(name) if isinstance(modules, dict) else None
    stated = {}
    for kind in ("weight_error", "relative_error"):
        value = entry.get(kind) if isinstance(entry, dict) else None
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise VerificationError(
                f"{checkpoint.path / REPORT_FILE}: states no {kind} of {name}, which is compressed"
            )
        stated[kind] = float(value)
    return stated


def _matching_targets(checkpoint: CompressedCheckpoint, opened: SourceModel) -> list[TargetLinear]:
    """Return the source's linear layer of every compressed module."""
    try:
        linears, _ = discover(opened.model, targets=_EVERY_LINEAR)
    except InputError as error:
        raise VerificationError(f"{opened.name}: the source is another model: {error}") from None
    by_name = {target.name: target for target in linears}
    targets = []
    for name, entry in checkpoint.data.modules.items():
        target, spec = by_name.get(name), entry.spec
        if target is None:
            raise VerificationError(
                f"{name}: compressed in {checkpoint.path}, but {opened.name} has no such linear layer: "
                "the source is another model"
            )
        wanted = f"{entry.layer_type} {spec.d_in} x {spec.d_out}"
        found = f"{target.layer_type} {target.d_in} x {target.d_out}"
        if wanted != found:
            raise VerificationError(
                f"{name}: {wanted} in {checkpoint.path}, {found} in {opened.name}: the source is another model"
            )
        targets.append(target)
    return targets


def _check_fingerprint(
    checkpoint: CompressedCheckpoint, report: dict[str, Any], opened: SourceModel
) -> None:
    source = report.get("source")
    stated = source.get("fingerprint") if isinstance(source, dict) else None
    if stated is not None and stated != opened.fingerprint:
        raise VerificationError(
            f"{opened.path}: its fingerprint is {opened.fingerprint}, {REPORT_FILE} of {checkpoint.path} states "
            f"{stated!s:.80}: the source is another model, or its config.json or weights have changed"
        )


def _calibration_ids(
    checkpoint: CompressedCheckpoint,
    report: dict[str, Any],
    recipe: Recipe,
    opened: SourceModel,
    calibration: str | None,
) -> CalibrationSet:
    try:
        ids = load_calibration(
            calibration or recipe.calibration,
            opened.tokenizer,
            n_samples=recipe.samples,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
        )
    except InputError as error:
        if calibration is not None:
            raise
        raise InputError(
            f"{checkpoint.path}: the calibration of its recipe, seen from here: {error}; "
            "give --calibration PATH to say where it is now"
        ) from None
    section = report.get("calibration")
    stated = section.get("ids_sha256") if isinstance(section, dict) else None
    if ids.sha256 != stated:
        raise VerificationError(
            f"{checkpoint.path}: the calibration ids hash to {ids.sha256}, {REPORT_FILE} states {stated!s:.80}: "
            f"{calibration or recipe.calibration} is another text, or the tokenizer has changed"
        )
    return ids


def _weight_error(
    opened: SourceModel, target: TargetLinear, checkpoint: CompressedCheckpoint
) -> float:
    weight = weight_of(opened.model, target)[0]
    return weight_error(weight, checkpoint.factor(target.name).dense_weight(torch.float64))


def _difference(name: str, kind: str, stated: dict[str, float], found: float) -> float:
    """Relative difference of a recomputed error, or the error that it is too large."""
    difference = abs(found - stated[kind]) / max(stated[kind], 1e-12)
    if difference > ERROR_TOLERANCE:
        raise VerificationError(
            f"{name}: {kind} is stated as {stated[kind]:.6f}, recomputed {found:.6f} from the files"
        )
    return difference
