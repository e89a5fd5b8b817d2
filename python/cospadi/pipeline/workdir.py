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
import platform
import re
import secrets
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cospadi import __version__, native
from cospadi.checkpoint.strict_json import read_json_object
from cospadi.errors import CheckpointError, CospadiError, InputError, brief
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import FactorSpec
from cospadi.learn.fit import FitReport

LOCK_FILE = "lock"
RUN_FILE = "run.json"
MODULES = "modules"
"""Stage of the fits, which every run has."""
HASHES = ("weights", "calibration_ids")
"""Settings that are hashes; a difference in others explains more."""
_MOST_SHOWN = 5


def fingerprint(settings: Mapping[str, Any]) -> str:
    """sha256 of plain data in canonical JSON."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def run_settings() -> dict[str, Any]:
    """What the bits of a result depend on besides weights, calibration ids and recipe."""
    return {
        "threads": torch.get_num_threads(),
        "isa": native.runtime_info()["isa"],
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "cospadi": __version__,
    }


def recorded_threads(path: Path) -> int | None:
    """Threads of an unfinished run in a work directory, None where there is none."""
    try:
        threads = read_json_object(path / RUN_FILE)["settings"]["threads"]
    except (CheckpointError, KeyError, TypeError):
        return None
    is_count = isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= 4096
    return threads if is_count else None


def report_data(report: FitReport) -> dict[str, Any]:
    """A fit's report as plain data, equal to what comes back from a file: JSON turns tuples into lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(report)))
    return plain


def process_name() -> str:
    """A name for this process that no other one has, on any machine; usable as a file name."""
    host = re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname())[:60].lstrip("-") or "host"
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.partial-{process_name()}")
    try:
        with temporary.open("wb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None


def _sealed(record: Mapping[str, Any], kind: str, name: str) -> bytes:
    """A record as bytes, with a hash over all of it and over what it belongs to."""
    return json.dumps({**record, "seal": fingerprint({**record, "for": [kind, name]})}).encode()


def _unsealed(path: Path, kind: str, name: str) -> dict[str, Any]:
    """What `_sealed` wrote under this kind and name; CheckpointError where any of it is another."""
    record = read_json_object(path)
    if record.pop("seal", None) != fingerprint({**record, "for": [kind, name]}):
        raise CheckpointError(f"{path}: was changed, or written for another matrix")
    return record


class ResultStore:
    """Results of the matrices of one run; any number of processes may read and write them.

    Parameters
    ----------
    path : Path
        The work directory.
    run : str
        Fingerprint of the run: results of others count as missing.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.fingerprint = run
        self._modules = path / MODULES

    @property
    def is_empty(self) -> bool:
        """Whether no matrix is finished."""
        return not any(self._modules.glob("*.json"))

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
            "fingerprint": self.fingerprint,
            "sha256": hashlib.sha256(data).hexdigest(),
            "spec": dataclasses.asdict(spec),
            "report": dict(report),
        }
        write_atomic(folder / f"{name}.json", _sealed(record, stage, name))

    def load(
        self, name: str, *, stage: str = MODULES
    ) -> tuple[SparseFactor, dict[str, Any]] | None:
        """A finished matrix of a stage; None if it is missing or damaged (it is then fitted again).

        A member of a shared dictionary comes without it.
        """
        found = self._load(name, stage)
        return None if found is None else (found[1], found[2])

    def entry(self, name: str) -> tuple[FactorSpec, dict[str, Any]] | None:
        """Sizes and report of a finished matrix, whose tensors were read and found whole; None as for `load`."""
        found = self._load(name, MODULES)
        return None if found is None else (found[0], found[2])

    def _load(
        self, name: str, stage: str
    ) -> tuple[FactorSpec, SparseFactor, dict[str, Any]] | None:
        try:
            folder = self.path / stage
            record = _unsealed(folder / f"{name}.json", stage, name)
            data = (folder / f"{name}.safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != record["sha256"]:
                return None
            if record["fingerprint"] != self.fingerprint:
                return None
            tensors: dict[str, torch.Tensor] = load_tensors(data)
            spec = FactorSpec(**record["spec"])
            return spec, SparseFactor.from_tensors(spec, tensors), dict(record["report"])
        except (CospadiError, OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None

    def has(self, name: str) -> bool:
        """Whether a matrix is finished and whole."""
        return (self._modules / f"{name}.json").exists() and self.load(name) is not None

    def store_record(self, kind: str, name: str, data: Mapping[str, Any]) -> None:
        """Keep an intermediate result of this run, plain data, under a kind (a folder) and a module name."""
        folder = self.path / kind
        folder.mkdir(exist_ok=True)
        record = {"fingerprint": self.fingerprint, "data": dict(data)}
        write_atomic(folder / f"{name}.json", _sealed(record, kind, name))

    def load_record(self, kind: str, name: str) -> dict[str, Any] | None:
        """What `store_record` kept; None if it is missing, damaged or of a run with other settings."""
        try:
            record = _unsealed(self.path / kind / f"{name}.json", kind, name)
            return dict(record["data"]) if record["fingerprint"] == self.fingerprint else None
        except (CheckpointError, OSError, ValueError, KeyError, TypeError):
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
        except (CheckpointError, OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None


class WorkDir(ResultStore):
    """Results of the matrices that are finished, and the right to say which run they belong to.

    Parameters
    ----------
    path : Path
        The directory; created if missing.
    settings : mapping
        Everything that decides the result (weights, calibration ids, recipe). A directory with results made under
        other settings is refused, the differences named; one without results is taken over.

    Raises
    ------
    InputError
        The directory belongs to another run, is in use by another process, or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        # through JSON once, so that tuples compare equal to the lists that come back
        wanted = json.loads(json.dumps(settings))
        super().__init__(path, fingerprint(wanted))
        run_file = path / RUN_FILE
        is_ours = run_file.exists()
        if not is_ours and path.exists() and any(item.name != LOCK_FILE for item in path.iterdir()):
            raise InputError(
                f"{path}: exists and is not a work directory; move it or choose another --out"
            )
        if self._modules.is_symlink():
            raise InputError(
                f"{self._modules}: a link, where results are kept in the folder itself"
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

    def _check_same_run(self, run_file: Path, wanted: dict[str, Any]) -> None:
        try:
            found = read_json_object(run_file)["settings"]
        except (CheckpointError, OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{run_file}: damaged; delete {self.path} to start anew") from None
        if found == wanted:
            return
        # settings of the user first: they are what explains a changed hash
        keys = [key for key in wanted if key not in HASHES] + [*HASHES, *sorted(found)]
        differing = [k for k in dict.fromkeys(keys) if found.get(k) != wanted.get(k)]
        told = [k for k in differing if k not in HASHES] or differing
        shown = ", ".join(
            f"{k}: {brief(found.get(k))} there, {brief(wanted.get(k))} now"
            for k in told[:_MOST_SHOWN]
        )
        more = f", and {len(told) - _MOST_SHOWN} more" if len(told) > _MOST_SHOWN else ""
        raise InputError(
            f"{self.path}: holds an unfinished run with other settings ({shown}{more}); delete it to start anew, "
            "or choose another --out"
        )

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
