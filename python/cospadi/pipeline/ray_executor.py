"""Fits on a Ray cluster. Ray carries the name of a task and a line of text back; all else goes through files."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import torch

from cospadi.errors import CheckpointError, InputError, install_command
from cospadi.pipeline.device import kind_of, same_device
from cospadi.pipeline.events import EventLog
from cospadi.pipeline.executor import Done, Outcome, check_undamaged
from cospadi.pipeline.fit_task import CPU, FIT_ERRORS, FitTask, failure_reason
from cospadi.pipeline.queue import MOST_ATTEMPTS, Queue
from cospadi.pipeline.queue_bound import disk_share, has_room
from cospadi.pipeline.workdir import ResultStore, WorkDir
from cospadi.pipeline.worker import POLL_S, check_run, store_task

_CONNECT_S = 10.0


class RayExecutor:
    """Runs tasks on the cluster that Ray finds (``RAY_ADDRESS``, or one on this machine), or on one made here.

    Parameters
    ----------
    work : WorkDir
        On a file system that every node sees.
    log : EventLog
        Hears how many processors there are.
    n_workers : int, optional
        Bound on the fits at a time; None: as many as the cluster's processors, or GPUs, allow.
    device : torch.device
        Of the fits; on a GPU each has one to itself.

    Raises
    ------
    InputError
        Ray is not installed, or its cluster has no GPU for a run on GPUs.
    """

    def __init__(
        self, work: WorkDir, log: EventLog, n_workers: int | None, device: torch.device = CPU
    ) -> None:
        try:
            import ray
        except ImportError:
            raise InputError(f"executor ray: needs Ray: {install_command('ray')}") from None
        self._ray = ray
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _check_reachable(os.environ.get("RAY_ADDRESS", ""))
            try:
                ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InputError(f"executor ray: Ray's cluster cannot be joined: {error}") from None
        resources = dict(ray.cluster_resources())
        if device != CPU and resources.get("GPU", 0) < 1:
            if self._is_ours:
                ray.shutdown()
            raise InputError(
                "executor ray: the cluster has no GPU; start its nodes with ray start --num-gpus, or give device cpu"
            )
        self._work = work
        self._log = log
        self._n_workers = n_workers
        self._n_gpus = int(device != CPU)
        self._most_bytes = disk_share(work.path)
        self._n_bytes: dict[str, int] = {}
        self._damaged: dict[str, str] = {}
        self._pending: dict[Any, tuple[tuple[str, ...], Done]] = {}
        self._waiting: list[tuple[float, str, tuple[str, ...], int, Done]] = []
        self.queue = Queue(work.path)
        self.queue.start(kind_of(device))
        self._remote = ray.remote(fit_task_file)
        log.emit("ray", resources=resources)

    def submit(self, task: FitTask, done: Done) -> None:
        """Offer a task; waits while too many bytes are queued."""
        while self._n_bytes and not self._has_room():
            self._wait()
        self._n_bytes[task.name] = self.queue.publish(task, self._work.fingerprint)
        n_threads = 1 if task.on_one_thread else torch.get_num_threads()
        self._waiting.append((task.cost, task.name, task.names, n_threads, done))
        self._collect(0.0)

    def make_room(self, d_in: int, d_out: int, on_one_thread: bool) -> None:
        """Nothing to wait for: the cluster's workers are processes of their own."""

    def free_cores(self) -> None:
        """Nothing to wait for either."""

    def drain(self) -> None:
        """Wait for all tasks."""
        while self._pending or self._waiting:
            self._wait()
        check_undamaged(self._damaged)

    def close(self) -> None:
        """Cancel what runs, and leave the cluster."""
        for reference in self._pending:
            self._ray.cancel(reference, force=True)
        self.queue.remove()
        if self._is_ours:
            self._ray.shutdown()

    def _has_room(self) -> bool:
        slots = self._ray.cluster_resources().get("GPU" if self._n_gpus else "CPU", 1)
        most = max(1, int(slots)) if self._n_workers is None else self._n_workers
        queued = len(self._pending) + len(self._waiting)
        return has_room(
            sum(self._n_bytes.values()), self._most_bytes, lambda: queued - most, lambda: most
        )

    def _wait(self) -> None:
        self._collect(POLL_S)

    def _start(self) -> None:
        """Hand the largest tasks to Ray, no more at a time than asked for."""
        self._waiting.sort(key=lambda item: (-item[0], item[1]))
        while self._waiting and (self._n_workers is None or len(self._pending) < self._n_workers):
            _, name, names, n_threads, done = self._waiting.pop(0)
            remote = self._remote.options(
                num_cpus=n_threads,
                num_gpus=self._n_gpus,
                max_retries=MOST_ATTEMPTS,
                retry_exceptions=[OSError, MemoryError, torch.OutOfMemoryError],
            )
            reference = remote.remote(str(self._work.path.absolute()), name)
            self._pending[reference] = (names, done)

    def _collect(self, seconds: float) -> None:
        self._start()
        if not self._pending:
            time.sleep(seconds)
            return
        ready, _ = self._ray.wait(
            list(self._pending), num_returns=len(self._pending), timeout=seconds
        )
        for reference in ready:
            names, done = self._pending.pop(reference)
            try:
                failure = self._ray.get(reference)
            except (
                Exception
            ) as error:  # of Ray's many kinds: a worker that died too often, a lost node
                failure = f"Ray gave up: {failure_reason(error, names[0])}"
            if failure is None and not all(self._work.has(name) for name in names):
                failure = (
                    f"its result is not in {self._work.path}: do all nodes see this directory?"
                )
            n_bytes = self._n_bytes.pop(names[0], 0)
            damage = None if failure is None else self.queue.damage(names[0], n_bytes)
            self.queue.withdraw(names[0])
            if damage is None:
                done(Outcome(names, failure))
            else:
                self._damaged[names[0]] = damage
                self._log.emit("warning", text=f"{names[0]}: not fitted in this run: {damage}")
        self._start()


def _check_reachable(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself waits for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local", or none
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"executor ray: nothing answers at RAY_ADDRESS {address!r:.80} ({error}); start the cluster, or unset "
            "it to use this machine alone"
        ) from None


def fit_task_file(directory: str, name: str) -> str | None:
    """Fit one task of a work directory, on whatever node this is.

    Returns
    -------
    str or None
        Why the task's modules stay dense; None where the results are in the directory.
    """
    # set by Ray to what it reserved; the run's own number decides the bits
    os.environ.pop("OMP_NUM_THREADS", None)
    path = Path(directory)
    try:
        store = ResultStore(path, check_run(path))
        queue = Queue(path)
        task = queue.read(name)
        if all(store.has(member) for member in task.names):
            return None
        store_task(store, task, same_device(queue.device(), directory))
    except torch.OutOfMemoryError:
        raise  # for another attempt
    except CheckpointError as error:
        Queue(path).fail(name, str(error), is_damaged=True)
        return str(error)
    except FIT_ERRORS as error:
        return failure_reason(error, name)
    return None
