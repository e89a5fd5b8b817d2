"""What `cospadi eval` measured of a compressed folder: kept in its run record, and told apart by model.

The run record is where what differs between folders of equal inputs has its place: the manifest stays that of the job.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cospadi.checkpoint.manifest import RUN_FILE, has_manifest, manifest_sha256
from cospadi.checkpoint.reader import checked_file
from cospadi.checkpoint.strict_json import brief_text, check_plain, read_json_object
from cospadi.errors import CheckpointError, InputError
from cospadi.report.files import write_text
from cospadi.report.scores import (
    COMPRESSED,
    ORIGINAL,
    ROLES,
    Score,
    blocks_of,
    kept_scores,
    merged,
    read_scores,
    to_plain,
)

MEASURED_KEY = "measured"
"""Of the run record."""


def plain_object(path: Path) -> dict[str, Any]:
    """A JSON object of plain values from a file that may come from strangers."""
    data = read_json_object(path)
    check_plain(data, str(path))
    return data


def read_measurements(folder: Path) -> list[Score]:
    """What was kept in a folder; nothing where there is no run record.

    Raises
    ------
    CheckpointError
        The run record is damaged or leads out of the folder.
    """
    if not os.path.lexists(folder / RUN_FILE):
        return []
    path = checked_file(folder, RUN_FILE)
    try:
        return kept_scores(plain_object(path).get(MEASURED_KEY) or [], f"{path}: {MEASURED_KEY}")
    except CheckpointError:
        raise
    except InputError as error:
        raise CheckpointError(str(error)) from None


def unknown_models(folder: Path) -> list[str]:
    """Names of measured models that may be the original, or this one, but whose name does not say so."""
    names: dict[str, None] = {}
    for block in blocks_of(read_measurements(folder)):
        roles = {score.role for score in block}
        if not roles.issuperset(ROLES):
            names |= dict.fromkeys(score.model for score in block if score.role is None)
    return [brief_text(name) for name in names]


def write_measurements(folder: Path, scores: Sequence[Score]) -> None:
    """Keep measurements in the run record; the other keys stay."""
    record: dict[str, Any] = {"files": {}}
    if os.path.lexists(folder / RUN_FILE):
        record = plain_object(checked_file(folder, RUN_FILE))
    record[MEASURED_KEY] = to_plain(scores)
    write_text(folder / RUN_FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")


def add_measurements(
    folder: Path,
    source_name: str,
    evaluations: Sequence[str | Path],
    originals: Sequence[str | Path],
) -> list[Score]:
    """What was kept, and what the files of ``eval --json`` add to it; nothing is written.

    Parameters
    ----------
    source_name : str
        Of the model that was compressed, as the report states it.
    evaluations, originals : sequence of str or Path
        Files about any model, and about the original one under whatever name it was measured.
    """
    new = []
    for file in evaluations:
        data = plain_object(Path(file))
        is_this = has_manifest(folder) and data.get("manifest_sha256") == manifest_sha256(folder)
        for score in read_scores(data, str(file)):
            role = COMPRESSED if is_this else _role(score.model, folder, source_name)
            new.append(replace(score, role=role))
    for file in originals:
        for score in read_scores(plain_object(Path(file)), str(file)):
            new.append(replace(score, role=ORIGINAL))
    return merged(read_measurements(folder), new)


def _role(model: str, folder: Path, source_name: str) -> str | None:
    """Which model a name on the command line of eval stands for; None if that cannot be said.

    A name that is a path here is decided by where it leads. Otherwise eval ran elsewhere: the last part decides.
    """
    path, name = Path(model), folder.resolve().name
    try:
        is_here = path.exists()
        if is_here and path.resolve() == folder.resolve():
            return COMPRESSED
        is_other_result = is_here and os.path.lexists(path / RUN_FILE)
    except (OSError, ValueError):  # no path at all, for example too long
        return None
    is_source = source_name in (model, path.name) or (
        path.suffix == ".gguf" and path.stem == source_name
    )
    if is_source and not is_other_result and (is_here or name != source_name):
        return ORIGINAL
    return COMPRESSED if not is_here and path.name == name and not is_source else None
