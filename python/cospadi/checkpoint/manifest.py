"""The list of a checkpoint's files with their sizes and SHA-256 sums."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cospadi.checkpoint.atomic import HELD_SUFFIX
from cospadi.checkpoint.reader import checked_file
from cospadi.checkpoint.strict_json import brief_text, read_json_object
from cospadi.errors import CheckpointError, InputError
from cospadi.factor import brief

MANIFEST_FILE = "cospadi_manifest.json"
MANIFEST_VERSION = 1

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
        Files of the folder that the manifest does not know; not a problem by themselves.
    """

    n_files: int
    problems: tuple[str, ...]
    unlisted: tuple[str, ...]


def write_manifest(folder: Path) -> None:
    """Write the manifest of everything in `folder`; a held file is listed under its later name."""
    files = {
        path.relative_to(folder).as_posix().removesuffix(HELD_SUFFIX): _entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    text = json.dumps({"manifest_version": MANIFEST_VERSION, "files": files}, indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def renew_manifest(folder: Path, name: str) -> None:
    """State size and SHA-256 of one file of `folder` anew, after it was written again.

    Raises
    ------
    CheckpointError
        If the manifest is malformed; it is left as it was.
    InputError
        If it cannot be written.
    """
    manifest = checked_file(folder, MANIFEST_FILE)
    content = read_json_object(manifest)
    if not isinstance(content.get("files"), dict):
        raise CheckpointError(f"{manifest}: expected manifest_version {MANIFEST_VERSION} and files")
    partial = folder / f".{MANIFEST_FILE}.partial-{os.getpid()}"
    try:
        content["files"][name] = _entry(folder / name)
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(manifest)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{manifest}: cannot be written ({error.strerror or error})") from None


def has_manifest(path: str | Path) -> bool:
    """Whether the folder has a manifest, be it damaged; ``save_pretrained`` writes a folder without one."""
    return os.path.lexists(Path(path) / MANIFEST_FILE)


def verify_manifest(path: str | Path) -> ManifestReport:
    """Compare every listed file with its size and hash.

    Parameters
    ----------
    path : str or Path
        The checkpoint folder.

    Raises
    ------
    CheckpointError
        If there is no manifest or it is malformed. A file that differs is no exception but a line
        of the report.
    """
    folder = Path(path)
    manifest = checked_file(folder, MANIFEST_FILE)
    content = read_json_object(manifest)
    files = content.get("files")
    if content.get("manifest_version") != MANIFEST_VERSION or not isinstance(files, dict):
        raise CheckpointError(f"{manifest}: expected manifest_version {MANIFEST_VERSION} and files")
    problems = []
    for name, item in files.items():
        _check_relative(manifest, name)
        if not isinstance(item, dict):
            raise CheckpointError(f"{manifest}: {brief_text(name)}: expected an object")
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
    unlisted = sorted(
        name
        for file in folder.rglob("*")
        if file.is_file()
        and (name := file.relative_to(folder).as_posix()) not in files
        and name != MANIFEST_FILE
    )
    return ManifestReport(len(files), tuple(problems), tuple(unlisted))


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
