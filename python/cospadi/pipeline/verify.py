"""Checking that a compressed directory holds what it states."""

from __future__ import annotations

from pathlib import Path

from cospadi.calibration.data import load_calibration
from cospadi.calibration.statistics import collect_grams
from cospadi.checkpoint.manifest import verify_manifest
from cospadi.checkpoint.reader import read_checkpoint
from cospadi.errors import InputError, VerificationError
from cospadi.learn.whitening import relative_error
from cospadi.model.discover import discover, weight_of
from cospadi.model.source import open_source
from cospadi.pipeline.inspect import read_report
from cospadi.pipeline.recipe import recipe_from_mapping

ERROR_TOLERANCE = 1e-3


def verify_checkpoint(directory: str | Path) -> int:
    """Check hashes against the manifest, then every factor's shapes, mask population and finiteness.

    Returns
    -------
    int
        Number of compressed modules.

    Raises
    ------
    CheckpointError
        The directory is no compressed checkpoint.
    VerificationError
        A file does not match its hash, or a tensor is wrong.
    """
    checkpoint = read_checkpoint(directory)
    problems = verify_manifest(directory).problems
    if problems:
        raise VerificationError(problems[0])
    for name in checkpoint.data.modules:
        try:
            checkpoint.factor(name)
        except InputError as error:
            raise VerificationError(str(error)) from None
    return len(checkpoint.data.modules)


def verify_errors(
    directory: str | Path, source: str | Path, *, calibration: str | None = None
) -> float:
    """Recompute every stated relative error from the written files and the original model.

    Runs the recipe's calibration again; its token ids must hash to what the report states.

    Returns
    -------
    float
        Largest relative difference between a stated and a recomputed error.

    Raises
    ------
    VerificationError
        The ids differ, or an error differs by more than `ERROR_TOLERANCE` relative.
    """
    checkpoint = read_checkpoint(directory)
    report = read_report(Path(directory))
    if not isinstance(report.get("recipe"), dict) or not isinstance(report.get("modules"), dict):
        raise VerificationError(f"{directory}: holds no report to verify errors against")
    recipe = recipe_from_mapping(report["recipe"], source=f"{directory}: recipe")
    if not recipe.uses_calibration:
        raise InputError(
            f"{directory}: no calibration was used; the stated errors are plain weight errors"
        )
    opened = open_source(source)
    ids = load_calibration(
        calibration or recipe.calibration,
        opened.tokenizer,
        n_samples=recipe.samples,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
    )
    stated_hash = (report.get("calibration") or {}).get("ids_sha256")
    if ids.sha256 != stated_hash:
        raise VerificationError(
            f"{directory}: the calibration ids hash to {ids.sha256}, the report states {stated_hash}"
        )
    targets, _ = discover(
        opened.model, targets=recipe.targets or None, ignore=recipe.ignore or None
    )
    by_name = {target.name: target for target in targets if target.name in checkpoint.data.modules}
    worst = 0.0
    limit = recipe.max_gram_gb
    for finished in collect_grams(
        opened.model,
        list(by_name.values()),
        ids.ids,
        batch_size=recipe.batch_size,
        max_gram_bytes=None if limit is None else int(limit * 2**30),
    ):
        for statistics in finished.grams.values():
            for name in statistics.members:
                weight, _ = weight_of(opened.model, by_name[name])
                approximation = checkpoint.factor(name).dense_weight()
                found = relative_error(statistics.gram, weight, approximation)
                stated = float(report["modules"][name]["relative_error"])
                difference = abs(found - stated) / max(stated, 1e-12)
                worst = max(worst, difference)
                if difference > ERROR_TOLERANCE:
                    raise VerificationError(
                        f"{name}: stated error {stated:.6f}, recomputed {found:.6f} from the files"
                    )
    return worst
