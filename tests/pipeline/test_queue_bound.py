"""How far the coordinator runs ahead: by what the disk has, and beyond some bytes by what workers wait for."""

from __future__ import annotations

import json

import pytest
from test_queue import RUN, made

from cospadi.pipeline import queue_bound
from cospadi.pipeline.compress import compress
from cospadi.pipeline.queue import COORDINATOR, Queue
from cospadi.pipeline.queue_bound import MOST_AHEAD_BYTES, disk_share, has_room

MANY = 1 << 60


@pytest.mark.parametrize(
    ("n_bytes", "most", "n_free", "n_workers", "expected"),
    [
        (0, MANY, 0, 0, True),
        (MOST_AHEAD_BYTES, MANY, 9, 0, True),
        (MOST_AHEAD_BYTES + 1, MANY, 0, 0, False),  # nobody there who would take it
        (MOST_AHEAD_BYTES + 1, MANY, 3, 4, True),
        (MOST_AHEAD_BYTES + 1, MANY, 4, 4, False),
        (MOST_AHEAD_BYTES + 2, MOST_AHEAD_BYTES + 1, 0, 4, False),
        (11, 10, 0, 4, False),
    ],
)
def test_room(n_bytes, most, n_free, n_workers, expected):
    assert has_room(n_bytes, most, lambda: n_free, lambda: n_workers) is expected


def test_nobody_is_counted_while_little_is_queued():
    def never() -> int:
        raise AssertionError

    assert has_room(MOST_AHEAD_BYTES, MANY, never, never)


def test_a_quarter_of_the_disk(tmp_path):
    assert 0 < disk_share(tmp_path) < MANY


def test_workers_and_free_tasks_are_counted(tmp_path):
    now = [1000.0]
    queue = Queue(tmp_path, lease_s=60, clock=lambda: now[0])
    queue.start()
    beats = queue.path / "beats"
    for name in ("w1", "w2", "w3", COORDINATOR):
        (beats / name).write_text("1")
    for name in ("a", "b", "c"):
        queue.publish(made(name), RUN)
    names = ["a", "b", "c"]
    assert (queue.n_workers(), queue.n_free(names)) == (3, 3)
    assert queue.claim("w1") is not None and queue.claim("w2") is not None
    assert (queue.n_workers(), queue.n_free(names)) == (3, 1)
    queue.mark_dead("w1")  # its task is free again
    assert (queue.n_workers(), queue.n_free(names)) == (2, 2)
    now[0] += 61
    (beats / "w2").write_text("2")  # w3 has stood still
    assert (queue.n_workers(), queue.n_free(names)) == (1, 2)


def test_a_run_that_may_not_run_ahead_finishes(tiny_model_dir, tiny_text, tmp_path, monkeypatch):
    """With no bytes ahead at most one task lies free beside the one that the worker has."""
    monkeypatch.setattr(queue_bound, "MOST_AHEAD_BYTES", 0)
    most = []
    publish = Queue.publish

    def counted(self, task, fingerprint):
        n_bytes = publish(self, task, fingerprint)
        most.append(len(list((self.path / "tasks").glob("*.json"))))
        return n_bytes

    monkeypatch.setattr(Queue, "publish", counted)
    given = {"ratio": 0.3, "samples": 4, "sequence_length": 64, "calibration": str(tiny_text)}
    compress(tiny_model_dir("llama"), tmp_path / "queued", workers=1, **given)
    assert len(most) == 14 and max(most) <= 3  # free, held, and finished but not yet collected
    compress(tiny_model_dir("llama"), tmp_path / "alone", **given)
    files = [
        json.loads((tmp_path / name / "cospadi_manifest.json").read_text())["files"]
        for name in ("queued", "alone")
    ]
    assert files[0] == files[1]
