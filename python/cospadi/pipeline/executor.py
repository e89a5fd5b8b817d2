"""Where fits run: in this process, or by workers that take them from a queue."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch

from cospadi.errors import CospadiError, InputError
from cospadi.learn.learner import IterationStats
from cospadi.pipeline.device import CUDA, kind_of, visible_gpus
from cospadi.pipeline.events import EventLog
from cospadi.pipeline.fit_task import (
    CPU,
    FIT_ERRORS,
    FitTask,
    failure_reason,
    is_out_of_memory,
    run_task,
)
from cospadi.pipeline.queue import BEAT_S, COORDINATOR, LEASE_S, Heartbeat, Queue
from cospadi.pipeline.queue_bound import MOST_AHEAD_BYTES, has_room
from cospadi.pipeline.side_by_side import SideBySide
from cospadi.pipeline.workdir import WorkDir, process_name, report_data
from cospadi.pipeline.worker import POLL_S

_LOOK_S = 5.0
"""Between two looks at the files of the queued tasks."""
_MOST_IDLE_DEATHS = 3
"""Local workers that may end one after another without having begun anything."""


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its results are in the work directory, or why its modules stay dense."""

    names: tuple[str, ...]
    failure: str | None = None


Done = Callable[[Outcome], None]


@dataclass(frozen=True)
class _Pending:
    """A task in the queue."""

    names: tuple[str, ...]
    n_bytes: int
    done: Done


class Executor(Protocol):
    """Runs tasks in any order; every task ends in one call of ``done``, made by `submit` or `drain`."""

    def submit(self, task: FitTask, done: Done) -> None:
        """Take a task, now or when there is room."""

    def make_room(self, d_in: int, d_out: int, on_one_thread: bool) -> None:
        """Wait until this process has room for a task; called before its inputs are made."""

    def free_cores(self) -> None:
        """Wait for the tasks that run in this process: it is about to compute something itself."""

    def drain(self) -> None:
        """Wait for all tasks."""

    def close(self) -> None:
        """Let go of workers and files."""


class InProcess:
    """Fits in this process on one device: those for one thread side by side, others alone with all threads.

    Parameters
    ----------
    work : WorkDir
        Where results go.
    log : EventLog
        Hears of progress.
    device : torch.device
        Of the fits; on any but the CPU they follow one another.
    most_bytes : int, optional
        See `SideBySide`.
    """

    def __init__(
        self,
        work: WorkDir,
        log: EventLog,
        device: torch.device = CPU,
        *,
        most_bytes: int | None = None,
    ) -> None:
        self._work = work
        self._log = log
        self._device = device
        self._fits = SideBySide(most_bytes)

    def submit(self, task: FitTask, done: Done) -> None:
        """Fit a task, at once or beside others as soon as there is room, and commit its results.

        Raises
        ------
        InputError
            A result cannot be written.
        """

        def finish(outcome: Outcome | None) -> None:
            if outcome is None:  # not enough memory for as many
                self._fits.drain()
                outcome = self._outcome(task)
            done(outcome)

        is_small = task.on_one_thread and self._device == CPU
        self._fits.submit(
            lambda: self._attempt(task), finish, shape=task.shape, on_one_thread=is_small
        )

    def make_room(self, d_in: int, d_out: int, on_one_thread: bool) -> None:
        """Wait until a task could begin at once."""
        is_small = on_one_thread and self._device == CPU
        self._fits.make_room(shape=(d_in, d_out), on_one_thread=is_small)

    def free_cores(self) -> None:
        """Wait for all tasks."""
        self.drain()

    def drain(self) -> None:
        """Wait for all tasks."""
        self._fits.drain()

    def close(self) -> None:
        """End the fits that still run, at their next iteration."""
        self._fits.close()

    def _attempt(self, task: FitTask) -> Outcome | None:
        """Outcome of a task that others may run beside; None where there was no memory."""
        try:
            return self._outcome(task, may_lack_memory=True)
        except MemoryError:
            return None

    def _outcome(self, task: FitTask, *, may_lack_memory: bool = False) -> Outcome:
        def progress(stats: IterationStats) -> None:
            data = {"module": task.name, **vars(stats)}
            self._fits.report(lambda: self._log.progress("iteration", **data))

        try:
            results = run_task(task, progress, self._device)
        except FIT_ERRORS as error:
            if may_lack_memory and is_out_of_memory(error):
                raise MemoryError from error
            return Outcome(task.names, failure_reason(error, task.name))
        for name, (factor, report) in zip(task.names, results, strict=True):
            self._work.store(name, factor, report_data(report))
        return Outcome(task.names)


class QueueExecutor:
    """Offers tasks to workers: processes of its own, and any that join with ``cospadi worker``.

    Parameters
    ----------
    work : WorkDir
        Where queue and results are.
    log : EventLog
        Hears of lost workers.
    n_workers : int
        Own processes; with 0 all workers come from elsewhere.
    device : torch.device
        Of the fits; on CUDA every own worker has a GPU to itself, of as many as there are.
    lease_s, beat_s : float
        See `cospadi.pipeline.queue`.
    most_bytes : int
        Bound on the tasks on disk; see `has_room` for the other one.

    Notes
    -----
    Own workers are told the threads of this process; they end with it.
    """

    def __init__(
        self,
        work: WorkDir,
        log: EventLog,
        n_workers: int,
        *,
        device: torch.device = CPU,
        lease_s: float = LEASE_S,
        beat_s: float = BEAT_S,
        most_bytes: int = MOST_AHEAD_BYTES,
    ) -> None:
        self._work = work
        self._log = log
        self._lease_s = lease_s
        self._beat_s = beat_s
        self._most_bytes = most_bytes
        self._pending: dict[str, _Pending] = {}
        self._damaged: dict[str, str] = {}
        self._looked = time.monotonic()
        self._idle_deaths = 0
        self.queue = Queue(work.path, lease_s=lease_s)
        try:
            self.queue.start(kind_of(device))
        except OSError as error:
            raise InputError(
                f"{self.queue.path}: cannot be made: {error.strerror or error}"
            ) from None
        self._heartbeat = Heartbeat(self.queue, COORDINATOR, beat_s)
        self._heartbeat.__enter__()
        self._output = work.path / "workers.log"
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._gpu_of: dict[str, str] = {}
        self._free_gpus = visible_gpus() if device.type == CUDA else []
        for _ in range(n_workers):
            self._start_worker()

    def submit(self, task: FitTask, done: Done) -> None:
        """Offer a task; waits while too many bytes are queued.

        Raises
        ------
        InputError
            The task cannot be written.
        """
        while self._pending and not self._has_room():
            self._wait()
        n_bytes = self.queue.publish(task, self._work.fingerprint)
        self._pending[task.name] = _Pending(task.names, n_bytes, done)
        self._collect()

    def make_room(self, d_in: int, d_out: int, on_one_thread: bool) -> None:
        """Nothing to wait for: workers are processes of their own."""

    def free_cores(self) -> None:
        """Nothing to wait for either."""

    def drain(self) -> None:
        """Wait for all tasks."""
        while self._pending:
            self._wait()
        check_undamaged(self._damaged)

    def close(self) -> None:
        """End the workers and remove the queue."""
        self._heartbeat.__exit__(None, None, None)
        self.queue.remove()
        for process in self._workers.values():
            process.terminate()
        for process in self._workers.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        with suppress(OSError):
            self._output.unlink()

    def _has_room(self) -> bool:
        return has_room(
            sum(p.n_bytes for p in self._pending.values()),
            self._most_bytes,
            lambda: self.queue.n_free(self._pending),
            self.queue.n_workers,
        )

    def _wait(self) -> None:
        if not self._collect():
            self._watch()
            time.sleep(POLL_S)

    def _collect(self) -> bool:
        """Hand on what is finished; tell whether anything was."""
        found = False
        now = time.monotonic()
        looks = now - self._looked > _LOOK_S
        for name, pending in list(self._pending.items()):
            failure = None
            if not all(self._work.has(member) for member in pending.names):
                damage = self.queue.damage(name, pending.n_bytes) if looks else None
                if damage is not None:
                    self._damaged[name] = damage
                    self._log.emit("warning", text=f"{name}: not fitted in this run: {damage}")
                    self.queue.withdraw(name)
                    del self._pending[name]
                    found = True
                    continue
                failure = self.queue.failure(name)
                if failure is None:
                    continue
            self.queue.withdraw(name)
            del self._pending[name]
            found = True
            pending.done(Outcome(pending.names, failure))
        if looks:
            self._looked = now
        return found

    def _watch(self) -> None:
        """Replace own workers that ended."""
        for name, process in list(self._workers.items()):
            code = process.poll()
            if code is None:
                continue
            del self._workers[name]
            if name in self._gpu_of:
                self._free_gpus.append(self._gpu_of.pop(name))
            self.queue.mark_dead(name)
            began = any(a.worker == name for a in self.queue.attempts().values())
            self._idle_deaths = 0 if began else self._idle_deaths + 1
            self._log.emit("worker_lost", worker=name, code=code)
            if self._idle_deaths >= _MOST_IDLE_DEATHS:
                raise CospadiError(
                    f"workers end before they begin anything (code {code}): {self._last_words()}"
                )
            self._start_worker()

    def _start_worker(self) -> None:
        name = process_name()
        command = [sys.executable, "-m", "cospadi", "worker", str(self._work.path)]
        command += ["--name", name, "--parent", str(os.getpid())]
        command += ["--lease", str(self._lease_s), "--beat", str(self._beat_s)]
        threads = str(torch.get_num_threads())
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self._free_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpu_of[name] = self._free_gpus.pop(0)
        with self._output.open("ab") as sink:
            self._workers[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment
            )

    def _last_words(self) -> str:
        try:
            lines = self._output.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "they said nothing"


def check_undamaged(damaged: Mapping[str, str]) -> None:
    """Raise CospadiError if files of tasks were damaged while they waited: their matrices are still to be fitted."""
    if not damaged:
        return
    name, reason = next(iter(damaged.items()))
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    raise CospadiError(
        f"{name}{more}: not fitted, what the task needs was damaged while it waited ({reason}); everything "
        "finished is kept, and the same command fits the rest"
    )


def worker_threads(n_workers: int) -> int:
    """Threads of each of so many processes on this machine's cores."""
    return max(1, torch.get_num_threads() // max(1, n_workers))
