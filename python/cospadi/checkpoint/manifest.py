"""The list of a checkpoint's files with their sizes and SHA-256 sums.

The manifest lists what a checkpoint is: equal inputs give equal manifests. What differs from run to run all the same
(times, and pages that show them) is in the run record, or is listed there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cospadi.checkpoint.atomic import HELD_SUFFIX
from cospadi.checkpoint.reader import checked_file
from cospadi.checkpoint.strict_json import brief_text, read_json_object
from cospadi.errors import CheckpointError, InputError, brief

MANIFEST_FILE = "cospadi_manifest.json"
MANIFEST_VERSION = 1

RUN_FILE = "cospadi_run.json"
"""The run record. Its key ``files`` is a list like the manifest's; the other keys are the caller's."""

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ManifestReport:
    """What `verify_manifest` found.

    Parameters
    ----------
    n_files : int
        Files that the manifest lists.
    problems : tuple of str
        One line per listed file that is missing, differs or cannot be read.
    unlisted : tuple of str
        Files of the folder that neither the manifest nor the run record knows; not a problem by themselves.
    """

    n_files: int
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]


def write_run_record(folder: Path, run: Mapping[str, Any], names: Collection[str]) -> None:
    """Write the run record: plain data, and the sums of the files `names`, which the manifest then leaves out."""
    record = {**run, "files": {name: _entry(folder / name) for name in sorted(names)}}
    text = json.dumps(record, indent=1, allow_nan=False)
    (folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")


def write_manifest(folder: Path) -> None:
    """Write the manifest of everything in `folder`; a held file is listed under its later name.

    The run record, and what it lists, is left out.
    """
    apart = {MANIFEST_FILE, RUN_FILE, *_listed_by_run(folder)}
    files = {
        path.relative_to(folder).as_posix().removesuffix(HELD_SUFFIX): _entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in apart
    }
    text = json.dumps({"manifest_version": MANIFEST_VERSION, "files": files}, indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def renew_manifest(folder: Path, name: str) -> None:
    """State size and SHA-256 of one file of `folder` anew, after it was written again, where it is listed.

    Raises
    ------
    CheckpointError
        If the manifest or the run record is malformed; it is left as it was.
    InputError
        If it cannot be written.
    """
    is_of_run = name in _listed_by_run(folder)
    listing = checked_file(folder, RUN_FILE if is_of_run else MANIFEST_FILE)
    content = read_json_object(listing)
    if not isinstance(content.get("files"), dict):
        raise CheckpointError(f"{listing}: expected manifest_version {MANIFEST_VERSION} and files")
    partial = folder / f".{listing.name}.partial-{os.getpid()}"
    try:
        content["files"][name] = _entry(folder / name)
        text = json.dumps(content, indent=1 if is_of_run else 2)
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(listing)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{listing}: cannot be written ({error.strerror or error})") from None


def has_manifest(path: str | Path) -> bool:
    """Whether the folder has a manifest, be it damaged; ``save_pretrained`` writes a folder without one."""
    return os.path.lexists(Path(path) / MANIFEST_FILE)


def manifest_sha256(path: str | Path) -> str:
    """What tells one result from another, wherever its folder lies: the SHA-256 sum of its manifest.

    Raises
    ------
    CheckpointError
        There is none.
    """
    return _sha256(checked_file(Path(path), MANIFEST_FILE))


def verify_manifest(path: str | Path) -> ManifestReport:
    """Compare every listed file with its size and hash.

    Parameters
    ----------
    path : str or Path
        The checkpoint folder.

    Raises
    ------
    CheckpointError
        If there is no manifest, or it or the run record is malformed. A file that differs is no
        exception but a line of the report.
    """
    folder = Path(path)
    files = _listed_by_manifest(folder)
    of_run = _listed_by_run(folder)
    manifest = folder / MANIFEST_FILE
    problems = []
    for name, item in {**of_run, **files}.items():
        listing = manifest if name in files else folder / RUN_FILE
        _check_relative(listing, name)
        if not isinstance(item, dict):
            raise CheckpointError(f"{listing}: {brief_text(name)}: expected an object")
        try:
            file = checked_file(folder, name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        try:
            size = file.stat().st_size
            if size != item.get("bytes"):
                problems.append(f"{file}: expected {brief(item.get('bytes'))} bytes, got {size}")
            elif _sha256(file) != item.get("sha256"):
                problems.append(f"{file}: its SHA-256 differs from the manifest's")
        except OSError as error:
            problems.append(f"{file}: cannot be read ({error.strerror or error})")
    return ManifestReport(len(files) + len(of_run), tuple(problems), unlisted_files(folder))


def unlisted_files(path: str | Path) -> tuple[str, ...]:
    """Files of a folder that neither its manifest nor its run record knows; errors as for `verify_manifest`."""
    folder = Path(path)
    known = {*_listed_by_manifest(folder), *_listed_by_run(folder), MANIFEST_FILE, RUN_FILE}
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return tuple(sorted(name for name in found if name not in known))


def _listed_by_manifest(folder: Path) -> dict[str, Any]:
    manifest = checked_file(folder, MANIFEST_FILE)
    content = read_json_object(manifest)
    files = content.get("files")
    if content.get("manifest_version") != MANIFEST_VERSION or not isinstance(files, dict):
        raise CheckpointError(f"{manifest}: expected manifest_version {MANIFEST_VERSION} and files")
    return files


def _listed_by_run(folder: Path) -> dict[str, Any]:
    """Files that the run record lists; none where there is no run record, as in what older versions wrote."""
    if not os.path.lexists(folder / RUN_FILE):
        return {}
    path = checked_file(folder, RUN_FILE)
    files = read_json_object(path).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: expected files")
    return files


def _check_relative(manifest: Path, name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or not name.isprintable() or "\\" in name:
        raise CheckpointError(f"{manifest}: {brief_text(name)} is no path inside the folder")


def _entry(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
