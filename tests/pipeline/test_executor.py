"""Fits in one process: side by side on one thread each, and what ends them."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from cospadi.learn.fit import FitSettings
from cospadi.learn.methods import FactorSize
from cospadi.learn.options import LearnOptions
from cospadi.learn.quantize import StorageTypes
from cospadi.pipeline import executor as executor_module
from cospadi.pipeline.events import EventLog
from cospadi.pipeline.executor import InProcess
from cospadi.pipeline.fit_task import (
    MOST_ON_ONE_THREAD,
    FitTask,
    InputMetric,
    Statistics,
    TaskMember,
    fits_one_thread,
    run_task,
)
from cospadi.pipeline.memory import fit_bytes
from cospadi.pipeline.workdir import WorkDir


def made(name, *, metric=None, on_one_thread=True, d_in=48, d_out=40, iterations=3) -> FitTask:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(2 * d_in, d_in, generator=generator, dtype=torch.float64)
    metric = metric or InputMetric(name, x.T @ x / len(x))
    weight = torch.randn(d_out, d_in, generator=generator)
    settings = FitSettings(
        "cospadi",
        FactorSize(0, 16, 6),
        StorageTypes("bfloat16", "bfloat16", 0),
        LearnOptions(iterations=iterations, tolerance=0.0),
    )
    member = TaskMember(name, weight, None, Statistics(metric.gram, metric))
    return FitTask((member,), settings, 1.0, on_one_thread)


class Recorder:
    """Runs tasks as ever, and notes how many were at it at a time and with how many threads."""

    def __init__(self, seconds=0.3):
        self.seconds, self.now, self.most = seconds, 0, 0
        self.threads: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self, task, progress=None, device=None):
        """Run a task like `run_task`."""
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

        def noted(stats):
            self.threads[task.name] = torch.get_num_threads()
            progress(stats)

        try:
            time.sleep(self.seconds)
            return run_task(task, noted, device)
        finally:
            with self._lock:
                self.now -= 1


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Make an executor of two threads and return it with work directory and recorder."""
    opened = []

    def made_executor(name="run", recorder=None, **options):
        recorder = recorder or Recorder()
        monkeypatch.setattr(executor_module, "run_task", recorder)
        torch.set_num_threads(2)
        work = WorkDir(tmp_path / f"{name}.work", {})
        log = EventLog(tmp_path / f"{name}.jsonl", options.pop("listener", None))
        runner = InProcess(work, log, **options)
        opened.extend([runner, log, work])
        return runner, work, recorder

    yield made_executor
    for item in opened:
        item.__exit__(None, None, None) if isinstance(item, EventLog) else item.close()


def files(work):
    return {
        path.name: path.read_bytes() for path in (work.path / "modules").glob("[!.]*.safetensors")
    }


def test_small_fits_run_side_by_side_to_the_same_bits(start):
    results = []
    for name, most_bytes in (("one", 0), ("two", None)):
        runner, work, recorder = start(name, most_bytes=most_bytes)
        metric = made("shared").members[0].statistics.metric
        outcomes = []
        for i in range(5):
            runner.submit(made(f"t{i}", metric=metric), outcomes.append)
        runner.drain()
        assert sorted(o.names for o in outcomes) == [(f"t{i}",) for i in range(5)]
        assert {o.failure for o in outcomes} == {None}
        assert set(recorder.threads.values()) == {1}
        assert recorder.most == (1 if most_bytes == 0 else 2)
        assert torch.get_num_threads() == 2
        results.append(files(work))
    assert len(results[0]) == 5 and results[0] == results[1]


def test_a_large_fit_runs_alone_with_all_threads(start):
    runner, _, recorder = start()
    outcomes = []
    for i in range(4):
        task = made(f"t{i}", on_one_thread=i != 2)
        runner.submit(task, outcomes.append)
        if i == 2:
            # both before it are finished, and so is it
            assert [o.names for o in outcomes[-1:]] == [("t2",)] and len(outcomes) == 3
    runner.drain()
    assert recorder.threads == {"t0": 1, "t1": 1, "t2": 2, "t3": 1}


def test_as_many_at_a_time_as_there_is_memory_for(start):
    one = fit_bytes(48, 40)
    for name, room, expected in (("a", 2 * one - 1, 1), ("b", 2 * one, 2), ("c", 9 * one, 2)):
        runner, _, recorder = start(name, most_bytes=room)
        for i in range(4):
            runner.submit(made(f"t{i}"), lambda outcome: None)
        runner.drain()
        assert recorder.most == expected


def test_a_failed_fit_is_an_outcome_and_the_others_go_on(start):
    runner, work, _ = start()
    outcomes = []
    bad = made("bad")
    bad.members[0].weight[0, 0] = torch.nan
    for task in (made("t0"), bad, made("t1")):
        runner.submit(task, outcomes.append)
    runner.drain()
    failures = {o.names[0]: o.failure for o in outcomes}
    assert failures["t0"] is failures["t1"] is None and failures["bad"]
    assert set(files(work)) == {"t0.safetensors", "t1.safetensors"}


def test_closing_ends_fits_at_their_next_iteration(start):
    runner, work, recorder = start(recorder=Recorder(0.0))
    runner.submit(made("long", iterations=10**6), lambda outcome: None)
    deadline = time.monotonic() + 30
    while "long" not in recorder.threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert recorder.threads == {"long": 1}
    begun = time.monotonic()
    runner.close()
    assert time.monotonic() - begun < 20
    assert files(work) == {}
    assert threads_of_a_new_thread() == torch.get_num_threads() == 2


def threads_of_a_new_thread() -> int:
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_threads_that_begin_after_the_fits_have_all_threads(start):
    runner, _, _ = start(recorder=Recorder(0.0))
    for i in range(3):
        runner.submit(made(f"t{i}"), lambda outcome: None)
    runner.drain()
    assert threads_of_a_new_thread() == 2


def test_the_listener_is_called_in_the_thread_that_submits(start):
    heard = []
    runner, _, _ = start(
        listener=lambda event: heard.append((event["module"], threading.get_ident())),
        recorder=Recorder(0.0),
    )
    for i in range(6):
        runner.submit(made(f"t{i}", iterations=20), lambda outcome: None)
    runner.drain()
    assert {name for name, _ in heard} == {f"t{i}" for i in range(6)}
    assert {thread for _, thread in heard} == {threading.get_ident()}


def test_a_fit_that_finds_no_memory_beside_others_is_tried_alone(start, monkeypatch):
    class Scarce(Recorder):
        def __call__(self, task, progress=None, device=None):
            if self.now and task.name == "t3":
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            return super().__call__(task, progress, device)

    runner, work, _ = start(recorder=Scarce())
    outcomes = []
    for i in range(6):
        runner.submit(made(f"t{i}"), outcomes.append)
    runner.drain()
    assert {o.failure for o in outcomes} == {None} and len(files(work)) == len(outcomes) == 6


def test_which_fits_are_for_one_thread():
    assert fits_one_thread(896, 4864) and fits_one_thread(2048, 2048)
    # outputs of all members count, and so does the Gram
    assert not fits_one_thread(2048, 8192) and not fits_one_thread(4096, 128)
    assert fits_one_thread(1, MOST_ON_ONE_THREAD) and not fits_one_thread(1, MOST_ON_ONE_THREAD + 1)
