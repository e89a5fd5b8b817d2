"""The queue of `cospadi.pipeline.queue` as events: when a run of many workers ends, some of which fail.

Followed to the letter: the coordinator calibrates block after block and offers each block's tasks while
`cospadi.pipeline.queue_bound` has room for them; workers win the most expensive task that is free; a claim is lost when
its worker's number has stood still for a lease on the clock of the worker that looks, or at once where a parent saw the
end; three lost attempts leave a matrix dense. Idle workers look all the time, busy ones between two tasks, as the real
ones do. Left out: `POLL_S` but for one pause per wake-up, reading tasks, and links that two workers race for.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from cospadi.pipeline.queue import BEAT_S, LEASE_S, MOST_ATTEMPTS
from cospadi.pipeline.queue_bound import has_room
from cospadi.pipeline.worker import POLL_S


@dataclass(frozen=True)
class Task:
    """One matrix: its name, the cost that orders the queue, seconds of its fit, bytes of its files."""

    name: str
    cost: float
    seconds: float
    n_bytes: int = 0


@dataclass(frozen=True)
class Block:
    """What becomes ready together: seconds of the calibration before it, then its tasks in order."""

    tasks: Sequence[Task]
    calibration_s: float = 0.0


@dataclass(frozen=True)
class Setting:
    """How a run is made.

    Attributes
    ----------
    n_workers : int
        At a time; one that fails is started again.
    failures_per_hour : float
        Of one worker, a Poisson process.
    restart_s : float
        Until a failed worker is back, under another name.
    is_local : bool
        Workers are children of the coordinator, which sees them end.
    most_bytes : int
        What the disk has for the queue.
    most_attempts : int
        Lost attempts after which a matrix stays dense.
    """

    n_workers: int
    failures_per_hour: float = 0.0
    restart_s: float = 60.0
    is_local: bool = False
    lease_s: float = LEASE_S
    most_bytes: int = 1 << 60
    most_attempts: int = MOST_ATTEMPTS
    seed: int = 0


@dataclass
class Outcome:
    """What came of it: seconds until the last task, of lost attempts, of finished ones, of calibration; what is dense.

    `most_queued`: bytes that lay in the queue at most.
    """

    seconds: float = 0.0
    lost_s: float = 0.0
    useful_s: float = 0.0
    calibration_s: float = 0.0
    n_failures: int = 0
    most_queued: int = 0
    dense: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)


@dataclass
class _Worker:
    """A process: its task, when it began that or became idle, and what it remembers of the numbers of others."""

    name: int
    started: float
    task: Task | None = None
    since: float = 0.0
    died: float | None = None
    seen: dict[int, tuple[int, float]] = field(default_factory=dict)

    def beat(self, now: float) -> int:
        """Its number."""
        return 1 + int(
            ((now if self.died is None else min(now, self.died)) - self.started) / BEAT_S
        )

    def last_beat(self, now: float) -> float:
        """When that number was written."""
        return self.started + (self.beat(now) - 1) * BEAT_S


class Simulation:
    """One run.

    Parameters
    ----------
    blocks : sequence of Block
        In the order of the model.
    setting : Setting
        Workers, failures, bounds.
    """

    def __init__(self, blocks: Sequence[Block], setting: Setting) -> None:
        self._setting = setting
        self._draw = random.Random(setting.seed)
        self._outcome = Outcome()
        self._events: list[tuple[float, int, str, object]] = []
        self._wakes: set[float] = set()
        self._order = itertools.count()
        self._names = itertools.count()
        self._free: list[tuple[float, str, Task]] = []
        self._claimed: dict[str, tuple[Task, _Worker]] = {}
        self._attempts: dict[str, int] = {}
        self._idle: dict[int, _Worker] = {}
        self._waiting = [(b, t) for b, block in enumerate(blocks) for t in block.tasks]
        self._waiting.reverse()
        self._blocks = blocks
        self._calibrated = -1
        self._is_calibrating = False
        self._queued_bytes = 0
        self._n_open = sum(len(block.tasks) for block in blocks)

    def run(self) -> Outcome:
        """Play all events; return what came of them."""
        for _ in range(self._setting.n_workers):
            self._start_worker(0.0)
        self._publish(0.0)
        while self._n_open and self._events:
            now, _, kind, what = heapq.heappop(self._events)
            if kind == "calibrated":
                self._is_calibrating = False
                self._publish(now)
            elif kind == "finish":
                self._finish(now, what)  # type: ignore[arg-type]
            elif kind == "die":
                self._die(now, what)  # type: ignore[arg-type]
            elif kind == "dense":
                self._close(now, what)  # type: ignore[arg-type]
            elif kind == "start":
                self._start_worker(now)
            elif kind == "room":
                self._publish(now)
            else:
                self._wakes.discard(now)
                self._wake(now)
            self._outcome.seconds = now
        return self._outcome

    def _at(self, time: float, kind: str, what: object = None) -> None:
        if kind == "wake":
            # every idle worker asks for one
            if time in self._wakes:
                return
            self._wakes.add(time)
        heapq.heappush(self._events, (time, next(self._order), kind, what))

    def _publish(self, now: float) -> None:
        """The coordinator goes on: offers tasks, waits for room, or calibrates the next block."""
        if self._is_calibrating:
            return
        is_new = False
        while self._waiting:
            block, task = self._waiting[-1]
            if block > self._calibrated:
                self._calibrated = block
                taken = self._blocks[block].calibration_s
                self._outcome.calibration_s += taken
                if taken:
                    self._is_calibrating = True
                    self._at(now + taken, "calibrated")
                    break
            if self._queued_bytes and not has_room(
                self._queued_bytes,
                self._setting.most_bytes,
                self._n_free,
                lambda: self._setting.n_workers,
            ):
                break  # goes on when something is claimed or finished
            self._waiting.pop()
            self._queued_bytes += task.n_bytes
            self._outcome.most_queued = max(self._outcome.most_queued, self._queued_bytes)
            heapq.heappush(self._free, (-task.cost, task.name, task))
            is_new = True
        if is_new and self._idle:
            self._at(now + (POLL_S if now else 0.0), "wake")

    def _n_free(self) -> int:
        lost = sum(holder.died is not None for _, holder in self._claimed.values())
        return len(self._free) + (lost if self._setting.failures_per_hour else 0)

    def _start_worker(self, now: float) -> None:
        worker = _Worker(next(self._names), now)
        rate = self._setting.failures_per_hour / 3600.0
        if rate:
            self._at(now + self._draw.expovariate(rate), "die", worker)
        self._look(now, worker)

    def _look(self, now: float, worker: _Worker) -> None:
        """Claim what is free, the most expensive first."""
        first = self._free[0][:2] if self._free else None
        held = []
        if self._setting.failures_per_hour:
            held = sorted((-t.cost, t.name) for t, _ in self._claimed.values())
        for key in held:
            if first is not None and key > first:
                break
            task, holder = self._claimed[key[1]]
            if self._is_stale(now, worker, holder):
                if self._attempts[task.name] >= self._setting.most_attempts:
                    continue  # the coordinator will say so
                self._begin(now, worker, task)
                return
        if first is not None:
            self._begin(now, worker, heapq.heappop(self._free)[2])
            return
        if worker.name not in self._idle:
            self._idle[worker.name] = worker
            worker.since = now
        if not self._setting.failures_per_hour:
            return
        for _, holder in self._claimed.values():
            if holder.died is not None and holder.name in worker.seen:
                lost = worker.seen[holder.name][1] + self._setting.lease_s + POLL_S
                if lost > now:  # else it was lost too often
                    self._at(lost, "wake")

    def _is_stale(self, now: float, worker: _Worker, holder: _Worker) -> bool:
        if holder.died is not None and self._setting.is_local:
            return True
        beat = holder.beat(now)
        known = worker.seen.get(holder.name)
        if known is None or known[0] != beat:
            # an idle worker has seen it when it was written, others see it now
            is_idle = worker.name in self._idle
            worker.seen[holder.name] = (
                beat,
                max(worker.since, holder.last_beat(now)) if is_idle else now,
            )
        return now - worker.seen[holder.name][1] > self._setting.lease_s

    def _begin(self, now: float, worker: _Worker, task: Task) -> None:
        self._idle.pop(worker.name, None)
        worker.task, worker.since = task, now
        self._claimed[task.name] = (task, worker)
        self._attempts[task.name] = self._attempts.get(task.name, 0) + 1
        self._outcome.claims.append(task.name)
        if self._waiting and not self._is_calibrating:
            self._at(now, "room")
        self._at(now + task.seconds, "finish", (worker, task))

    def _finish(self, now: float, what: tuple[_Worker, Task]) -> None:
        worker, task = what
        if worker.died is not None:
            return
        self._outcome.useful_s += task.seconds
        worker.task = None
        self._close(now, task)
        self._look(now, worker)

    def _close(self, now: float, task: Task) -> None:
        self._claimed.pop(task.name, None)
        self._n_open -= 1
        self._queued_bytes -= task.n_bytes
        self._publish(now)

    def _die(self, now: float, worker: _Worker) -> None:
        worker.died = now
        self._outcome.n_failures += 1
        self._idle.pop(worker.name, None)
        self._at(now + self._setting.restart_s, "start")
        if worker.task is None:
            return
        self._outcome.lost_s += now - worker.since
        noticed = now if self._setting.is_local else now + self._setting.lease_s
        if self._attempts[worker.task.name] >= self._setting.most_attempts:
            self._outcome.dense.append(worker.task.name)
            self._at(noticed, "dense", worker.task)
            return
        if self._idle:
            # the first idle worker that saw the last number
            seen = min(max(other.since, worker.last_beat(now)) for other in self._idle.values())
            self._at(
                (now if self._setting.is_local else seen + self._setting.lease_s) + POLL_S, "wake"
            )

    def _wake(self, now: float) -> None:
        for worker in list(self._idle.values()):
            if not self._free and not self._has_lost():
                return  # nothing to be found
            self._look(now, worker)

    def _has_lost(self) -> bool:
        return bool(self._setting.failures_per_hour) and any(
            holder.died is not None for _, holder in self._claimed.values()
        )


def simulate(blocks: Sequence[Block], setting: Setting) -> Outcome:
    """Play one run."""
    return Simulation(blocks, setting).run()
