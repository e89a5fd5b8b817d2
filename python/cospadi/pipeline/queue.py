"""A queue of tasks in a directory, for workers that share nothing but a file system.

Layout of ``<output>.work/queue``::

    tasks/<name>.safetensors, .json   a task, its JSON last; gone when it is finished
    claims/<name>@<n>                 the n-th attempt at a task belongs to one worker; made by a hard link, so once
    claims/<name>@<n>.over            that attempt ended without a result, and why
    failed/<name>.json                the task cannot succeed: its modules stay dense, or its files are damaged
    beats/<worker>                    a number that a living worker counts up
    beats/<worker>.dead               its parent saw it end
    device.json                       what the fits are computed on: every worker needs the like

Nothing is ever taken back or overwritten by another process: an attempt is superseded by the next one, which again one
worker wins. Results are committed elsewhere (`cospadi.pipeline.workdir`) and equal bit for bit whoever computes them:
a worker that was thought dead and finishes after all does no harm.

No two clocks are compared. Whoever waits for a beat measures, on a clock of its own that never jumps, how long it has
not seen the number change.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from cospadi.checkpoint.strict_json import read_json_object
from cospadi.errors import CheckpointError, InputError, brief
from cospadi.pipeline.device import DeviceKind
from cospadi.pipeline.fit_task import FitTask
from cospadi.pipeline.task_files import TaskHead, is_safe_name, read_head, read_task, task_data
from cospadi.pipeline.workdir import process_name, write_atomic

QUEUE = "queue"
DEVICE_FILE = "device.json"
LEASE_S = 60.0
"""A worker whose number stands still for so long has lost its attempt."""
BEAT_S = 5.0
MOST_ATTEMPTS = 3
"""Attempts at one task that may end without a result before its modules stay dense."""
COORDINATOR = "coordinator"

_MOST_NOTE_BYTES = 10_000


@dataclass(frozen=True)
class Attempt:
    """The latest attempt at a task: its number from 1, its worker, and how it ended, if it has."""

    number: int
    worker: str
    is_over: bool


class Queue:
    """The queue of one run.

    Parameters
    ----------
    work : Path
        The work directory.
    lease_s : float
        See `LEASE_S`.
    clock : callable
        Seconds that never jump.
    """

    def __init__(
        self,
        work: Path,
        *,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = work / QUEUE
        self._lease_s = lease_s
        self._clock = clock
        self._heads: dict[str, TaskHead] = {}
        self._seen: dict[str, tuple[str, float]] = {}

    # --- the coordinator's side --------------------------------------------------------------------------------------

    def start(self, device: DeviceKind = DeviceKind()) -> None:
        """Make an empty queue for fits on a device; what an earlier process left goes."""
        if self.path.exists():
            old = self.path.with_name(f".{QUEUE}.old-{process_name()}")
            self.path.rename(old)
            shutil.rmtree(old, ignore_errors=True)
        fresh = self.path.with_name(f".{QUEUE}.new-{process_name()}")
        for name in ("tasks", "claims", "failed", "beats"):
            (fresh / name).mkdir(parents=True)
        (fresh / DEVICE_FILE).write_text(json.dumps(asdict(device)))
        fresh.rename(self.path)

    def publish(self, task: FitTask, fingerprint: str) -> int:
        """Offer a task; return its bytes."""
        record, data = task_data(task, fingerprint)
        write_atomic(self._task(task.name, "safetensors"), data)
        write_atomic(self._task(task.name, "json"), json.dumps(record).encode())
        return len(data)

    def withdraw(self, name: str) -> None:
        """Take a finished task out."""
        for kind in ("json", "safetensors"):
            self._task(name, kind).unlink(missing_ok=True)

    def damage(self, name: str, n_bytes: int) -> str | None:
        """What is wrong with the files of a task that is not finished; None where nothing is seen.

        Parameters
        ----------
        name : str
            The task.
        n_bytes : int
            What `publish` returned.
        """
        note = _read_note(self.path / "failed" / f"{name}.json")
        if note is not None and note.get("is_damaged") is True:
            return str(note.get("reason", "damaged"))
        record, tensors = self._task(name, "json"), self._task(name, "safetensors")
        try:
            state = tensors.lstat()
            if not stat.S_ISREG(state.st_mode) or state.st_size != n_bytes:
                return f"{tensors}: no longer what was written"
            read_head(record)
        except OSError as error:
            return f"{tensors}: {error.strerror or error}"
        except CheckpointError as error:
            return str(error)
        return None

    def failure(self, name: str) -> str | None:
        """Why a task cannot succeed; None while it may."""
        note = _read_note(self.path / "failed" / f"{name}.json")
        if note is not None:
            damaged = note.get("is_damaged") is True
            return None if damaged else str(note.get("reason", "failed"))
        latest = self.attempts().get(name)
        if latest is None or latest.number < MOST_ATTEMPTS or not self._is_lost(name, latest):
            return None
        if self.n_failures(name, latest) < MOST_ATTEMPTS:
            return None
        reasons = [
            str(found["reason"])
            for number in range(1, latest.number + 1)
            if (found := _read_note(self._claim(name, number, ".over"))) and "reason" in found
        ]
        last = reasons[-1] if reasons else "its worker ended or stopped responding"
        return f"quarantined after {MOST_ATTEMPTS} attempts; the last: {last}"

    def n_workers(self) -> int:
        """Workers that were heard of within the time of a lease."""
        names = [entry.name for entry in (self.path / "beats").iterdir()]
        return sum(
            is_safe_name(name) and name != COORDINATOR and not self.is_stale(name)
            for name in names
            if not name.endswith(".dead")
        )

    def n_free(self, names: Iterable[str]) -> int:
        """How many of some tasks no living worker has claimed."""
        attempts = self.attempts()
        return sum(name not in attempts or self._is_lost(name, attempts[name]) for name in names)

    def mark_dead(self, worker: str) -> None:
        """Say that a worker's process has ended."""
        with suppress(OSError):
            (self.path / "beats" / f"{worker}.dead").touch()

    def remove(self) -> None:
        """Delete the queue: workers see that the run is over."""
        shutil.rmtree(self.path, ignore_errors=True)

    # --- the workers' side -------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether there is a queue."""
        return (self.path / "tasks").is_dir()

    def device(self) -> DeviceKind:
        """What the run's fits are computed on; CheckpointError where its file is damaged or gone."""
        path = self.path / DEVICE_FILE
        data = read_json_object(path)
        kind, model = data.get("kind"), data.get("model")
        if not isinstance(kind, str) or not isinstance(model, str) or len(kind + model) > 200:
            raise CheckpointError(f"{path}: expected kind and model, got {brief(data)}")
        return DeviceKind(kind, model)

    def claim(self, worker: str) -> tuple[TaskHead, int] | None:
        """Win the largest task that nobody works on.

        Returns
        -------
        (TaskHead, int) or None
            The task and the number of the attempt; None where there is nothing to do now.
        """
        try:
            attempts = self.attempts()
            heads = self._read_heads()
        except OSError:  # the queue went away
            return None
        for head in sorted(heads, key=lambda item: (-item.cost, item.name)):
            latest = attempts.get(head.name)
            if latest is not None and not self._is_lost(head.name, latest):
                continue
            number = 1 if latest is None else latest.number + 1
            if latest is not None and self.n_failures(head.name, latest) >= MOST_ATTEMPTS:
                continue
            if self._win(head.name, number, worker):
                return head, number
        return None

    def has_task(self, name: str) -> bool:
        """Whether a task's files are still there: it is not finished."""
        return self._task(name, "json").exists() and self._task(name, "safetensors").exists()

    def read(self, name: str) -> FitTask:
        """The task itself; CheckpointError where its files are damaged or gone."""
        return read_task(self._task(name, "json"), self._task(name, "safetensors"))

    def fail(self, name: str, reason: str, *, is_damaged: bool = False) -> None:
        """Say that a task cannot succeed, because of its numbers or because its files are damaged."""
        with suppress(OSError, InputError):
            note = _note(reason=reason, is_damaged=is_damaged)
            write_atomic(self.path / "failed" / f"{name}.json", note)

    def give_up(self, name: str, number: int, reason: str | None) -> None:
        """End an attempt without a result; without a reason (the worker was told to stop) it does not count."""
        note = _note(counts=reason is not None, reason=reason or "its worker was stopped")
        with suppress(OSError, InputError):
            write_atomic(self._claim(name, number, ".over"), note)

    # --- both --------------------------------------------------------------------------------------------------------

    def attempts(self) -> dict[str, Attempt]:
        """The latest attempt at every task that was begun."""
        numbers: dict[str, int] = {}
        over: set[tuple[str, int]] = set()
        for entry in (self.path / "claims").iterdir():
            name, _, rest = entry.name.partition("@")
            number, _, suffix = rest.partition(".")
            if not is_safe_name(name) or not number.isdigit() or len(number) > 6:
                continue
            if suffix == "over":
                over.add((name, int(number)))
            elif not suffix:
                numbers[name] = max(numbers.get(name, 0), int(number))
        return {
            name: Attempt(number, self._worker_of(name, number), (name, number) in over)
            for name, number in numbers.items()
        }

    def n_failures(self, name: str, latest: Attempt) -> int:
        """Attempts that ended without a result, those of workers that were told to stop not counted."""
        count = 0
        for number in range(1, latest.number + 1):
            note = _read_note(self._claim(name, number, ".over"))
            count += note is None or bool(note.get("counts", True))
        return count

    def is_stale(self, worker: str) -> bool:
        """Whether a worker has not been heard of for the time of a lease."""
        beats = self.path / "beats"
        if (beats / f"{worker}.dead").exists():
            return True
        try:
            beat = (beats / worker).read_text()[:100]
        except (OSError, ValueError):
            beat = ""
        now = self._clock()
        known = self._seen.get(worker)
        if known is None or known[0] != beat:
            self._seen[worker] = (beat, now)
            return False
        return now - known[1] > self._lease_s

    def _is_lost(self, name: str, latest: Attempt) -> bool:
        # without a worker's name its claim is judged by itself
        return latest.is_over or self.is_stale(latest.worker or f"{name}@{latest.number}")

    def _worker_of(self, name: str, number: int) -> str:
        note = _read_note(self._claim(name, number))
        worker = note.get("worker") if note is not None else None
        return worker if is_safe_name(worker) else ""  # type: ignore[return-value]

    def _win(self, name: str, number: int, worker: str) -> bool:
        own = self.path / "claims" / f".{worker}"
        try:
            own.write_bytes(_note(worker=worker))
            # a link either makes the name or finds it taken, also on network file systems
            os.link(own, self._claim(name, number))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                return False
            return _create(self._claim(name, number), _note(worker=worker))
        finally:
            with suppress(OSError):
                own.unlink()
        return True

    def _read_heads(self) -> list[TaskHead]:
        files = (self.path / "tasks").iterdir()
        present = {f.stem for f in files if f.suffix == ".json"}
        self._heads = {name: head for name, head in self._heads.items() if name in present}
        for name in present:
            if name not in self._heads and is_safe_name(name):
                with suppress(CheckpointError):
                    head = read_head(self._task(name, "json"))
                    if head.name == name:
                        self._heads[name] = head
        return list(self._heads.values())

    def _task(self, name: str, kind: str) -> Path:
        return self.path / "tasks" / f"{name}.{kind}"

    def _claim(self, name: str, number: int, suffix: str = "") -> Path:
        return self.path / "claims" / f"{name}@{number}{suffix}"


class Heartbeat:
    """Counts a number up in the background while its context lasts.

    Parameters
    ----------
    queue : Queue
        Where.
    worker : str
        Whose.
    beat_s : float
        Seconds between counts.
    tick : callable, optional
        Called with every count, in the background.
    """

    def __init__(
        self,
        queue: Queue,
        worker: str,
        beat_s: float = BEAT_S,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self._path = queue.path / "beats" / worker
        self._beat_s = beat_s
        self._tick = tick
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        count = 0
        while True:
            count += 1
            with suppress(OSError):  # a full disk, or the end of the run
                self._path.write_text(str(count))
            if self._tick is not None:
                self._tick()
            if self._stop.wait(self._beat_s):
                return


def _create(path: Path, content: bytes) -> bool:
    """Make a file that is not there, where the file system has no links."""
    try:
        with path.open("xb") as sink:
            sink.write(content)
    except OSError:
        return False
    return True


def _note(**data: object) -> bytes:
    return json.dumps(data).encode()


def _read_note(path: Path) -> Mapping[str, Any] | None:
    try:
        with path.open("rb") as stream:
            data = json.loads(stream.read(_MOST_NOTE_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
