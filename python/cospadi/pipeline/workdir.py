"""The work directory: finished matrices kept on disk, so that a killed run goes on where it stopped.

Layout of ``<output>.work``: ``run.json`` (fingerprint and the settings behind it), ``modules/<name>.safetensors``
and ``modules/<name>.json`` per finished matrix, ``lock``. Each file is written beside its place and renamed, the
JSON last, so that a matrix either is there whole or is not there. The lock is the process's: it ends with it, whatever
ends it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cospadi.errors import InputError
from cospadi.factor import FactorSpec, SparseFactor

LOCK_FILE = "lock"
MODULES = "modules"
"""Stage of the fits, which every run has."""
HASHES = ("weights", "calibration_ids")
"""Settings that are hashes; a difference in others explains more."""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """sha256 of plain data in canonical JSON."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("wb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


class WorkDir:
    """Results of the matrices that are finished.

    Parameters
    ----------
    path : Path
        The directory; created if missing.
    settings : mapping
        Everything that decides the result (weights, calibration ids, recipe). A directory with results made under
        other settings is refused, the first difference named; one without results is taken over.

    Raises
    ------
    InputError
        The directory belongs to another run, is in use by another process, or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._modules = path / MODULES
        # through JSON once, so that tuples compare equal to the lists that come back
        wanted = json.loads(json.dumps(settings))
        self.fingerprint = fingerprint(wanted)
        run_file = path / "run.json"
        is_ours = run_file.exists()
        if not is_ours and path.exists() and any(item.name != LOCK_FILE for item in path.iterdir()):
            raise InputError(
                f"{path}: exists and is not a work directory; move it or choose another --out"
            )
        try:
            self._modules.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK_FILE).open("w")
        except OSError as error:
            raise InputError(f"{path}: cannot be created: {error.strerror or error}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(
                f"{path}: another process is writing this --out; wait for it or choose another"
            ) from None
        if is_ours and not self.is_empty:
            try:
                self._check_same_run(run_file, wanted)
            except InputError:
                self.close()
                raise
            return
        record = {"fingerprint": self.fingerprint, "settings": wanted}
        write_atomic(run_file, json.dumps(record, indent=1).encode())

    @property
    def is_empty(self) -> bool:
        """Whether no matrix is finished."""
        return not any(self._modules.glob("*.json"))

    def _check_same_run(self, run_file: Path, wanted: dict[str, Any]) -> None:
        try:
            found = json.loads(run_file.read_text())["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{run_file}: damaged; delete {self.path} to start anew") from None
        if found == wanted:
            return
        # settings of the user first: they are what explains a changed hash
        keys = [key for key in wanted if key not in HASHES] + [*HASHES, *sorted(found)]
        for key in keys:
            if found.get(key) != wanted.get(key):
                raise InputError(
                    f"{self.path}: holds an unfinished run with other settings ({key}: "
                    f"{found.get(key)!r} there, {wanted.get(key)!r} now); delete it to start anew, "
                    "or choose another --out"
                )

    def store(
        self, name: str, factor: SparseFactor, report: Mapping[str, Any], *, stage: str = MODULES
    ) -> None:
        """Commit one finished matrix of a stage (a folder); a shared dictionary is stored with its leader only."""
        folder = self.path / stage
        folder.mkdir(exist_ok=True)
        spec, tensors = factor.spec, factor.tensors()
        data = save_tensors({part: tensors[part].contiguous() for part in spec.tensors()})
        write_atomic(folder / f"{name}.safetensors", data)
        record = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "spec": dataclasses.asdict(spec),
            "report": dict(report),
        }
        write_atomic(folder / f"{name}.json", json.dumps(record).encode())

    def load(
        self, name: str, *, stage: str = MODULES
    ) -> tuple[SparseFactor, dict[str, Any]] | None:
        """A finished matrix of a stage; None if it is missing or damaged (it is then fitted again).

        A member of a shared dictionary comes without it.
        """
        try:
            folder = self.path / stage
            record = json.loads((folder / f"{name}.json").read_text())
            data = (folder / f"{name}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != record["sha256"]:
                return None
            tensors: dict[str, torch.Tensor] = load_tensors(data)
            factor = SparseFactor.from_tensors(FactorSpec(**record["spec"]), tensors)
            return factor, dict(record["report"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None

    def store_record(self, kind: str, name: str, data: Mapping[str, Any]) -> None:
        """Keep an intermediate result of this run, plain data, under a kind (a folder) and a module name."""
        folder = self.path / kind
        folder.mkdir(exist_ok=True)
        record = {"fingerprint": self.fingerprint, "data": dict(data)}
        write_atomic(folder / f"{name}.json", json.dumps(record).encode())

    def load_record(self, kind: str, name: str) -> dict[str, Any] | None:
        """What `store_record` kept; None if it is missing, damaged or of a run with other settings."""
        try:
            record = json.loads((self.path / kind / f"{name}.json").read_text())
            return dict(record["data"]) if record["fingerprint"] == self.fingerprint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def store_tensor(self, kind: str, name: str, tensor: torch.Tensor) -> None:
        """Keep an intermediate tensor of this run, see `store_record`."""
        folder = self.path / kind
        folder.mkdir(exist_ok=True)
        data = save_tensors({"tensor": tensor.contiguous()})
        write_atomic(folder / f"{name}.safetensors", data)
        self.store_record(kind, name, {"sha256": hashlib.sha256(data).hexdigest()})

    def load_tensor(self, kind: str, name: str) -> torch.Tensor | None:
        """What `store_tensor` kept; None if it is missing, damaged or of a run with other settings."""
        record = self.load_record(kind, name)
        try:
            data = (self.path / kind / f"{name}.safetensors").read_bytes()
            if record is None or hashlib.sha256(data).hexdigest() != record["sha256"]:
                return None
            tensors: dict[str, torch.Tensor] = load_tensors(data)
            return tensors["tensor"]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None

    def remove(self) -> None:
        """Delete the directory after the checkpoint was written, or when nothing in it is worth keeping."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let another process have the directory; the end of the context does the same."""
        self._lock.close()

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
