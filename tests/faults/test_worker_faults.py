"""Runs whose workers die, sit on slow disks, have clocks of their own, or are handed damaged tasks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cospadi.checkpoint.manifest import MANIFEST_FILE
from cospadi.errors import CospadiError
from cospadi.pipeline.compress import compress
from cospadi.pipeline.executor import QueueExecutor
from cospadi.pipeline.workdir import write_atomic

FAST = {"ratio": 0.3, "samples": 8, "sequence_length": 64, "num_threads": 1}
SLOWER = {"dictionary": "learned", "iterations": 40, "tolerance": 0.0, "power_iterations": 8}


@pytest.fixture(scope="module")
def undisturbed(tiny_model_dir, tiny_text, tmp_path_factory):
    """Manifest of a run in one process."""

    def manifest(**settings) -> bytes:
        out = tmp_path_factory.mktemp("undisturbed") / "out"
        compress(tiny_model_dir("llama"), out, calibration=str(tiny_text), **{**FAST, **settings})
        return (out / MANIFEST_FILE).read_bytes()

    return manifest


def quick_leases(*arguments, **settings):
    return QueueExecutor(*arguments, **{**settings, "lease_s": 2.0, "beat_s": 0.3})


def start_worker(directory: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cospadi", "worker", str(directory), "--name", name]
    command += ["--lease", "2", "--beat", "0.3", "--wait", "60"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_four_workers_two_of_which_are_killed_in_the_middle_of_a_claim(
    undisturbed, tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    """Nobody but the lease tells the others: these workers are nobody's children."""
    monkeypatch.setattr("cospadi.pipeline.compress.QueueExecutor", quick_leases)
    out = tmp_path / "out"
    workers = [start_worker(tmp_path / "out.work", f"w{i}") for i in range(4)]
    killed = []

    def kill_two():
        claims = tmp_path / "out.work/queue/claims"
        deadline = time.monotonic() + 90
        while len(killed) < 2 and time.monotonic() < deadline:
            for i in (0, 1):
                # stopped first: a claim that is held is then held by a process that does nothing
                owned = [
                    c for c in claims.glob("*@*") if f'"w{i}"' in c.read_text(errors="replace")
                ]
                if i not in killed and owned:
                    os.kill(workers[i].pid, signal.SIGKILL)
                    killed.append(i)
            time.sleep(0.005)

    killer = threading.Thread(target=kill_two)
    killer.start()
    compress(
        tiny_model_dir("llama"),
        out,
        calibration=str(tiny_text),
        workers=0,
        **{**FAST, **SLOWER},
    )
    killer.join()
    codes = [worker.wait(timeout=30) for worker in workers]
    assert sorted(killed) == [0, 1] and codes == [-9, -9, 0, 0]
    assert (out / MANIFEST_FILE).read_bytes() == undisturbed(**SLOWER)


def in_every_process(code: str, folder: Path, monkeypatch) -> None:
    """Have every process that is started run some code before anything else."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))


POISON = """
import os, threading, time
def watch():
    import sys
    while "cospadi.pipeline.queue" not in sys.modules or not hasattr(
        sys.modules["cospadi.pipeline.queue"], "Heartbeat"
    ):
        time.sleep(0.001)
    q = sys.modules["cospadi.pipeline.queue"].Queue
    read = q.read
    def dying(self, name):
        if name.endswith("layers.1.mlp.up_proj"):
            os._exit(9)
        return read(self, name)
    q.read = dying
threading.Thread(target=watch, daemon=True).start()
"""


SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(descriptor):
    time.sleep(SECONDS)
    fsync(descriptor)
os.fsync = slow
"""

# of every second process, both its own clock and the times that a server would give to its files
SKEWED = """
import os, time
ahead = SECONDS if os.getpid() % 2 else 0.0
clock = time.time
time.time = lambda: clock() + ahead
def stamped(move):
    def moved(source, target, **given):
        move(source, target, **given)
        try:
            os.utime(target, (time.time(), time.time()))
        except FileNotFoundError:  # somebody has taken it since
            pass
    return moved
os.replace, os.rename, os.link = map(stamped, (os.replace, os.rename, os.link))
"""


@pytest.mark.parametrize(
    ("code", "seconds"),
    [
        (SLOW_DISK, 0.2),
        pytest.param(SLOW_DISK, 3.0, marks=pytest.mark.slow),  # longer than the lease
        (SKEWED, 1e7),
        (SKEWED, -1e7),
    ],
    ids=["slow disk", "disk slower than the lease", "clocks ahead", "clocks behind"],
)
def test_slow_disks_and_other_clocks_change_nothing(
    code, seconds, undisturbed, tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    monkeypatch.setattr("cospadi.pipeline.compress.QueueExecutor", quick_leases)
    in_every_process(code.replace("SECONDS", str(seconds)), tmp_path / "site", monkeypatch)
    given = {"calibration": str(tiny_text), "workers": 2, **FAST}
    result = compress(tiny_model_dir("llama"), tmp_path / "out", **given)
    assert not result.failed
    assert (tmp_path / "out" / MANIFEST_FILE).read_bytes() == undisturbed()


def test_a_task_that_kills_its_workers_is_quarantined_and_the_rest_finishes(
    tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    """Workers die as soon as they hold a certain task; its module stays dense, the run ends as partial."""
    in_every_process(POISON, tmp_path / "poison", monkeypatch)
    events = []
    result = compress(
        tiny_model_dir("llama"),
        tmp_path / "out",
        calibration=str(tiny_text),
        workers=1,
        listener=events.append,
        **FAST,
    )
    assert result.failed == ("model.layers.1.mlp.up_proj",)
    (reason,) = [e["reason"] for e in events if e["event"] == "failed"]
    assert reason.startswith("quarantined after 3 attempts")
    assert len([e for e in events if e["event"] == "worker_lost"]) == 3
    assert len(result.reports) == 13


def test_workers_that_cannot_start_are_an_error_and_not_an_endless_loop(
    tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    monkeypatch.setattr("cospadi.pipeline.executor.sys.executable", "/bin/false")
    with pytest.raises(CospadiError, match="end before they begin anything"):
        compress(
            tiny_model_dir("llama"), tmp_path / "out", calibration=str(tiny_text), workers=2, **FAST
        )


@pytest.mark.parametrize(
    "damage", ["record cut", "record gone", "tensors cut", "tensors flipped", "tensors of a device"]
)
def test_a_damaged_task_ends_the_run_and_the_next_one_fits_it(
    damage, undisturbed, tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    """What the task held is gone: the rest is fitted, the run says so, and nothing waits for ever."""
    monkeypatch.setattr("cospadi.pipeline.executor._LOOK_S", 0.2)
    victim = "model.layers.1.mlp.up_proj"

    def harmed(path, data):
        if path.parent.name != "tasks" or not path.name.startswith(victim):
            write_atomic(path, data)
        elif path.suffix == ".json":
            if damage != "record gone":
                write_atomic(path, data[:100] if damage == "record cut" else data)
        elif damage == "tensors cut":
            write_atomic(path, data[:-1])
        elif damage == "tensors flipped":
            write_atomic(path, data[:-1] + bytes([data[-1] ^ 1]))
        elif damage == "tensors of a device":
            path.symlink_to("/dev/zero")
        else:
            write_atomic(path, data)

    given = {"calibration": str(tiny_text), "workers": 1, **FAST}
    events = []
    with monkeypatch.context() as patch:
        patch.setattr("cospadi.pipeline.queue.write_atomic", harmed)
        with pytest.raises(CospadiError, match=f"{victim}: not fitted, what the task needs was"):
            compress(tiny_model_dir("llama"), tmp_path / "out", listener=events.append, **given)
    assert [e for e in events if e["event"] == "warning" and victim in e["text"]]
    assert not (tmp_path / "out").exists()
    result = compress(tiny_model_dir("llama"), tmp_path / "out", **given)
    assert result.n_resumed == 13 and not result.failed
    assert (tmp_path / "out" / MANIFEST_FILE).read_bytes() == undisturbed()
