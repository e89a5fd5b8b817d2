"""The queue of tasks: one worker per attempt, lost ones replaced by the observer's own clock, hostile files refused."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch

from cospadi.errors import CheckpointError
from cospadi.learn.fit import FitSettings
from cospadi.learn.methods import FactorSize
from cospadi.learn.options import LearnOptions
from cospadi.learn.output_metric import OutputMetric, RowScales
from cospadi.learn.quantize import StorageTypes
from cospadi.pipeline.fit_task import FitTask, InputMetric, Statistics, TaskMember, run_task
from cospadi.pipeline.queue import MOST_ATTEMPTS, Heartbeat, Queue
from cospadi.pipeline.task_files import TASK_VERSION, read_task

RUN = "0" * 64


def made(name="a.b", *, cost=1.0, d_in=24, d_out=20, seed=0, output="none") -> FitTask:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, d_in, generator=generator, dtype=torch.float64)
    gram = x.T @ x / 64
    weight = torch.randn(d_out, d_in, generator=generator)
    metrics = {
        "none": None,
        "matrix": OutputMetric(torch.eye(d_out, dtype=torch.float64), 0.5),
        "rows": RowScales(2.0 ** (torch.arange(d_out) % 3).double()),
    }
    statistics = Statistics(gram, InputMetric(name, gram), output=metrics[output])
    settings = FitSettings(
        "cospadi",
        FactorSize(d_in, 4, 12),
        StorageTypes("bfloat16", "bfloat16", 0),
        LearnOptions(),
        candidates=(FactorSize(d_in, 4, 12), FactorSize(d_in, 0, 14)),
    )
    return FitTask((TaskMember(name, weight, None, statistics),), settings, cost)


@pytest.fixture
def clock():
    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def queue(tmp_path, clock):
    queue = Queue(tmp_path, lease_s=60, clock=clock)
    queue.start()
    return queue


def test_a_task_comes_back_and_has_the_same_result(queue):
    for output in ("none", "matrix", "rows"):
        task = made(output=output)
        queue.publish(task, RUN)
        back = queue.read(task.name)
        assert back.settings == task.settings and back.cost == task.cost
        (expected, report), (found, again) = run_task(task)[0], run_task(back)[0]
        for part, tensor in expected.tensors().items():
            assert torch.equal(tensor, found.tensors()[part]), part
        assert report.relative_error == again.relative_error


def test_the_largest_task_is_begun_first_and_once(queue):
    for name, cost in (("small", 1.0), ("large", 9.0), ("middle", 3.0)):
        queue.publish(made(name, cost=cost), RUN)
    won = [queue.claim(f"w{i}")[0].name for i in range(3)]
    assert won == ["large", "middle", "small"] and queue.claim("w9") is None


def test_many_workers_never_win_the_same_attempt(queue, tmp_path):
    for i in range(8):
        queue.publish(made(f"t{i}"), RUN)
    won = []

    def take(worker):
        mine = Queue(tmp_path)
        while (found := mine.claim(worker)) is not None:
            won.append((found[0].name, found[1]))

    threads = [threading.Thread(target=take, args=(f"w{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [(f"t{i}", 1) for i in range(8)]


def test_a_silent_worker_loses_its_attempt_after_the_lease(queue, clock):
    queue.publish(made(), RUN)
    beat = queue.path / "beats" / "first"
    beat.write_text("1")
    assert queue.claim("first")[1] == 1
    assert queue.claim("second") is None  # the observer's clock starts here
    clock.now += 50
    beat.write_text("2")  # it lives
    assert queue.claim("second") is None
    clock.now += 59
    assert queue.claim("second") is None
    clock.now += 2
    head, number = queue.claim("second")
    assert (head.name, number) == ("a.b", 2)


@pytest.mark.parametrize("skew", [-1e9, 1e9, 0.0])
def test_clocks_of_other_machines_do_not_matter(queue, clock, skew):
    queue.publish(made(), RUN)
    beat = queue.path / "beats" / "first"
    beat.write_text("7")
    queue.claim("first")
    for file in (beat, queue.path / "claims/a.b@1"):
        os.utime(file, (clock.now + skew, clock.now + skew))
    assert queue.claim("second") is None
    clock.now += 61
    assert queue.claim("second")[1] == 2


def test_a_worker_seen_to_end_is_replaced_at_once(queue):
    queue.publish(made(), RUN)
    queue.claim("first")
    queue.mark_dead("first")
    assert queue.claim("second")[1] == 2


def test_attempts_are_counted_and_the_task_is_quarantined(queue):
    queue.publish(made(), RUN)
    for i in range(MOST_ATTEMPTS):
        assert queue.failure("a.b") is None
        _, number = queue.claim(f"w{i}")
        if i:
            queue.give_up("a.b", number, f"no memory {i}")
        else:
            queue.mark_dead(f"w{i}")
    assert queue.claim("w9") is None
    assert queue.failure("a.b") == "quarantined after 3 attempts; the last: no memory 2"


def test_being_told_to_stop_does_not_count(queue):
    queue.publish(made(), RUN)
    for i in range(2 * MOST_ATTEMPTS):
        _, number = queue.claim(f"w{i}")
        queue.give_up("a.b", number, None)
    assert queue.failure("a.b") is None and queue.claim("w9") is not None


def test_what_cannot_succeed_is_not_tried_again(queue):
    queue.publish(made(), RUN)
    queue.claim("first")
    queue.fail("a.b", "a.b: every calibration activation is zero")
    assert queue.failure("a.b") == "a.b: every calibration activation is zero"


def test_beats_count_up_and_stop(queue):
    ticks = []
    with Heartbeat(queue, "me", 0.01, lambda: ticks.append(1)):
        while len(ticks) < 3:
            pass
    last = (queue.path / "beats/me").read_text()
    assert int(last) >= 3 and (queue.path / "beats/me").read_text() == last


def test_a_queue_of_an_earlier_process_is_replaced(queue, tmp_path):
    queue.publish(made(), RUN)
    queue.claim("first")
    queue.start()
    assert queue.claim("second") is None and queue.attempts() == {}
    assert [item.name for item in tmp_path.iterdir()] == ["queue"]


def edit(queue, change):
    path = queue.path / "tasks/a.b.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["members"][0].update(name="../../x"), "expected module names"),
        (lambda r: r["members"][0].update(name="a/b"), "expected module names"),
        (lambda r: r["members"][0].update(name="a..b"), "expected module names"),
        (lambda r: r.update(members=[]), "expected module names"),
        (lambda r: r.update(members={"name": "a"}), "expected a list"),
        (lambda r: r.update(cost=-1), "cost"),
        (lambda r: r.update(cost=True), "cost"),
        (lambda r: r.update(task_version=TASK_VERSION + 1), "task_version"),
        (lambda r: r.update(sha256="0"), "SHA-256"),
        (lambda r: r["members"][0].update(weight="t9"), "expected a tensor's name"),
        (lambda r: r["members"][0].update(weight=None), "expected a tensor's name"),
        (lambda r: r["members"][0].update(bias="t0"), "bias: expected"),
        (lambda r: r["members"][0].update(gram="t0"), "gram: expected"),
        (lambda r: r["members"][0].update(output="t1", output_scale=1.0), "output: expected"),
        (lambda r: r["members"][0].update(row_scales="t1"), "row_scales: expected"),
        (lambda r: r["members"][0].update(n_tokens=True), "n_tokens: got True"),
        (lambda r: r["settings"].update(method="__import__"), "method"),
        (lambda r: r["settings"].update(extra=1), "expected"),
        (lambda r: r["settings"].update(objective={"a": 1}), "objective"),
        (lambda r: r["settings"]["options"].update(solver="os.system"), "solver"),
        (lambda r: r["settings"]["options"].update(iterations=-4), "iterations"),
        (lambda r: r["settings"].update(candidates={"a": 1}), "candidates"),
    ],
)
def test_hostile_tasks_are_refused(queue, change, message):
    queue.publish(made(), RUN)
    path = edit(queue, change)
    with pytest.raises(CheckpointError, match=message):
        read_task(path, path.with_suffix(".safetensors"))


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "header"])
def test_torn_tensors_are_refused(queue, damage):
    queue.publish(made(), RUN)
    path = queue.path / "tasks/a.b.safetensors"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-9], "empty": b"", "header": b"\xff" * 8 + data[8:]}[damage])
    with pytest.raises(CheckpointError):
        queue.read("a.b")


@pytest.mark.parametrize("content", ["", "[", "[]", '{"task_version": 1}', "[" * 5000])
def test_torn_records_are_no_tasks(queue, content):
    (queue.path / "tasks/a.b.json").write_text(content)
    assert queue.claim("w") is None


def test_names_in_the_claims_folder_are_data(queue):
    queue.publish(made(), RUN)
    for name in ("a.b@", "a.b@x", "..@1", "a.b@99999999999999999999", "a.b@1.over.over", "@1"):
        (queue.path / "claims" / name).write_text("{}")
    assert queue.attempts() == {}
    (queue.path / "claims/a.b@1").write_text('{"worker": "../../../etc/passwd"}')
    assert queue.attempts()["a.b"].worker == ""
