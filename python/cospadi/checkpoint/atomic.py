"""A folder that appears complete or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from cospadi.errors import InputError

HELD_SUFFIX = ".held"


def check_vacant(path: str | Path) -> Path:
    """Return the absolute path of a folder that may be written: absent, or empty.

    Raises
    ------
    InputError
        If something is there.
    """
    target = Path(path).absolute()
    try:
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise InputError(f"{target}: exists and is not a folder; choose another output")
        if target.is_dir() and any(target.iterdir()):
            raise InputError(
                f"{target}: exists and is not empty; choose another output or remove it"
            )
    except OSError as error:
        raise InputError(f"{target}: cannot be used ({error.strerror or error})") from None
    return target


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Write a folder so that a killed process never leaves something that looks finished.

    The body fills a sibling folder ``.<name>.partial-<pid>``. When it ends normally, all files are
    flushed to the disk, a file ``config.json.held`` gets its real name (a model folder without
    config.json does not load), and the folder is renamed. When it raises, the sibling is removed.

    Parameters
    ----------
    path : str or Path
        The folder to make; absent or empty.

    Yields
    ------
    Path
        The sibling folder.

    Raises
    ------
    InputError
        If `path` is taken, or the disk refuses to write.
    """
    target = check_vacant(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial.mkdir()
        yield partial
        _open_to_readers(partial)
        _sync_tree(partial)
        for held in partial.glob(f"*{HELD_SUFFIX}"):
            held.rename(held.with_name(held.name.removesuffix(HELD_SUFFIX)))
        _sync(partial)
        check_vacant(target)
        partial.rename(target)  # POSIX: also over an empty folder
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Delete what killed processes left, and what an earlier process of this number did."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit() and (int(number) == os.getpid() or not _is_running(int(number))):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _open_to_readers(folder: Path) -> None:
    """Give files the mode that new files have: safetensors makes its own readable by the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
