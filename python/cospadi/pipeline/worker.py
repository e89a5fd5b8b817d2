"""A worker: takes tasks from the queue of a work directory until the run is over."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cospadi.checkpoint.strict_json import read_json_object
from cospadi.errors import CheckpointError, InputError
from cospadi.pipeline.device import same_device
from cospadi.pipeline.fit_task import FIT_ERRORS, FitTask, failure_reason, run_task
from cospadi.pipeline.queue import BEAT_S, COORDINATOR, LEASE_S, Heartbeat, Queue
from cospadi.pipeline.task_files import TaskHead
from cospadi.pipeline.workdir import RUN_FILE, ResultStore, process_name, report_data, run_settings

POLL_S = 0.2


@dataclass
class WorkerSummary:
    """What a worker did: finished tasks, tasks that cannot succeed, attempts given up; and why it ended."""

    n_done: int = 0
    n_failed: int = 0
    n_given_up: int = 0
    reason: str = ""


def work(
    directory: str | Path,
    *,
    name: str | None = None,
    lease_s: float = LEASE_S,
    beat_s: float = BEAT_S,
    wait_s: float = 600.0,
    parent: int | None = None,
    report: Callable[[str], None] | None = None,
) -> WorkerSummary:
    """Fit tasks of a run until it is over.

    Parameters
    ----------
    directory : str or Path
        The work directory ``<output>.work``, on any file system that the coordinator sees.
    name : str, optional
        Of this worker; unique by default.
    lease_s, beat_s : float
        When other workers count as lost, and how often this one says that it lives.
    wait_s : float
        Seconds to wait for the run to begin.
    parent : int, optional
        Process without which this one ends.
    report : callable, optional
        Receives a line per task.

    Returns
    -------
    WorkerSummary

    Raises
    ------
    InputError
        There is no run in the directory, or this machine would compute other bits, or has no GPU for a run on GPUs.
    """
    path = Path(directory)
    say = report or (lambda text: None)
    summary = WorkerSummary()
    worker = name or process_name()
    queue = Queue(path, lease_s=lease_s)
    _wait_for_run(path, queue, wait_s)
    fingerprint = check_run(path)
    device = same_device(queue.device(), str(path))
    store = ResultStore(path, fingerprint)

    def watch_parent() -> None:
        if parent is not None and os.getppid() != parent:
            os._exit(1)  # from a thread: the fit in progress is nobody's any more

    with Heartbeat(queue, worker, beat_s, watch_parent):
        while queue.is_open:
            won = queue.claim(worker)
            if won is None:
                if queue.is_stale(COORDINATOR):
                    summary.reason = "the process that collects the results is gone"
                    return summary
                time.sleep(POLL_S)
                continue
            _attempt(queue, store, device, *won, summary, say)
    summary.reason = "the run is over"
    return summary


def store_task(store: ResultStore, task: FitTask, device: torch.device) -> None:
    """Fit a task on a device and commit its results; raises what `run_task` raises."""
    results = run_task(task, device=device)
    for name, (factor, report) in zip(task.names, results, strict=True):
        store.store(name, factor, report_data(report))


def _attempt(
    queue: Queue,
    store: ResultStore,
    device: torch.device,
    head: TaskHead,
    number: int,
    summary: WorkerSummary,
    say: Callable[[str], None],
) -> None:
    start = time.perf_counter()
    if head.fingerprint != store.fingerprint:
        queue.give_up(head.name, number, "the task belongs to another run")
        summary.n_given_up += 1
        return
    try:
        store_task(store, queue.read(head.name), device)
    except CheckpointError as error:
        # gone, because another worker was faster, or damaged: the next attempt would find the same
        if queue.has_task(head.name):
            queue.fail(head.name, str(error), is_damaged=True)
        queue.give_up(head.name, number, str(error))
        summary.n_given_up += 1
        say(f"{head.name}: {error}")
    except torch.OutOfMemoryError as error:
        # of a GPU that others use, too: another attempt may have it
        reason = failure_reason(error, head.name)
        queue.give_up(head.name, number, reason)
        summary.n_given_up += 1
        say(f"{head.name}: {reason}")
    except FIT_ERRORS as error:
        reason = failure_reason(error, head.name)
        if (
            isinstance(error, InputError) and "cannot be written" in reason
        ):  # the disk, not the numbers
            queue.give_up(head.name, number, reason)
            summary.n_given_up += 1
        else:
            queue.fail(head.name, reason)
            summary.n_failed += 1
        say(f"{head.name}: {reason}")
    except (MemoryError, OSError) as error:
        queue.give_up(head.name, number, f"{type(error).__name__}: {error}")
        summary.n_given_up += 1
        say(f"{head.name}: {type(error).__name__}: {error}")
    except BaseException:
        # told to stop: somebody else may have it at once
        queue.give_up(head.name, number, None)
        raise
    else:
        summary.n_done += 1
        say(f"{head.name}: {time.perf_counter() - start:.1f} s")


def _wait_for_run(path: Path, queue: Queue, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not queue.is_open:
        if time.monotonic() > deadline:
            raise InputError(
                f"{path}: holds no run with a queue; give the work directory of a running "
                "'cospadi compress --workers N' (OUT.work)"
            )
        time.sleep(POLL_S)


def check_run(path: Path) -> str:
    """Take over the threads of the run in a work directory, and return its fingerprint.

    Raises
    ------
    CheckpointError
        Its record is damaged.
    InputError
        This machine would compute other bits.
    """
    record = read_json_object(path / RUN_FILE)
    settings, fingerprint = record.get("settings"), record.get("fingerprint")
    if not isinstance(settings, dict) or not isinstance(fingerprint, str):
        raise CheckpointError(f"{path / RUN_FILE}: damaged")
    threads = settings.get("threads")
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 4096:
        raise CheckpointError(f"{path / RUN_FILE}: threads: expected 1 to 4096")
    torch.set_num_threads(threads)
    _check_machine(path, settings)
    return fingerprint


def _check_machine(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a machine on which equal tasks have other bits."""
    own: dict[str, Any] = json.loads(json.dumps(run_settings()))
    for key, value in own.items():
        if key != "threads" and settings.get(key) != value:
            raise InputError(
                f"{path}: this machine has another {key} than the run ({value} here, {settings.get(key)} there): "
                "its results would differ; use equal machines and versions"
            )
