"""A run with workers has the manifest of the run without, whoever of them dies."""

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
from cospadi.errors import CospadiError, InputError
from cospadi.pipeline.compress import compress
from cospadi.pipeline.workdir import write_atomic
from cospadi.pipeline.worker import work

FAST = {"ratio": 0.3, "samples": 8, "sequence_length": 64, "num_threads": 1}


@pytest.fixture(scope="module")
def reference(tiny_model_dir, tiny_text, tmp_path_factory):
    """Manifests of undisturbed runs in one process, by settings."""
    done: dict[str, bytes] = {}

    def manifest(family: str, **settings) -> bytes:
        key = repr((family, settings))
        if key not in done:
            out = tmp_path_factory.mktemp("reference") / "out"
            compress(
                tiny_model_dir(family), out, calibration=str(tiny_text), **{**FAST, **settings}
            )
            done[key] = (out / MANIFEST_FILE).read_bytes()
        return done[key]

    return manifest


@pytest.mark.parametrize(
    ("family", "workers", "settings"),
    [
        ("llama", 2, {}),
        ("gpt2", 1, {"dictionary": "learned", "iterations": 2, "group_size": 2}),
        ("llama", 2, {"sequential": True}),
        ("llama", 2, {"output_metric": "fisher", "backward_samples": 4}),
        ("llama", 2, {"output_metric": "diagonal", "backward_samples": 4}),
        # two threads: fits side by side in one process, one by one in each worker
        ("llama", 2, {"num_threads": 2}),
        ("llama", 1, {"num_threads": 2, "group_size": 2, "dictionary": "learned", "iterations": 2}),
    ],
)
def test_any_number_of_workers_gives_the_same_manifest(
    family, workers, settings, reference, tiny_model_dir, tiny_text, tmp_path
):
    out = tmp_path / "out"
    compress(
        tiny_model_dir(family),
        out,
        calibration=str(tiny_text),
        workers=workers,
        **{**FAST, **settings},
    )
    assert (out / MANIFEST_FILE).read_bytes() == reference(family, **settings)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.log.jsonl"}


def start_worker(directory: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "cospadi", "worker", str(directory), "--name", name]
    command += ["--lease", "2", "--beat", "0.3", "--wait", "60"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_four_workers_two_of_which_are_killed_in_the_middle_of_a_claim(
    reference, tiny_model_dir, tiny_text, tmp_path, monkeypatch
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
    assert (out / MANIFEST_FILE).read_bytes() == reference("llama", **SLOWER)


SLOWER = {"dictionary": "learned", "iterations": 40, "tolerance": 0.0, "power_iterations": 8}


def quick_leases(*arguments, **settings):
    from cospadi.pipeline.executor import QueueExecutor

    return QueueExecutor(*arguments, **{**settings, "lease_s": 2.0, "beat_s": 0.3})


def test_a_task_that_kills_its_workers_is_quarantined_and_the_rest_finishes(
    tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    """Workers die as soon as they hold a certain task; its module stays dense, the run ends as partial."""
    poison = tmp_path / "poison"
    poison.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(poison))
    (poison / "sitecustomize.py").write_text(POISON)
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


def test_workers_that_cannot_start_are_an_error_and_not_an_endless_loop(
    tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    from cospadi.errors import CospadiError

    monkeypatch.setattr("cospadi.pipeline.executor.sys.executable", "/bin/false")
    with pytest.raises(CospadiError, match="end before they begin anything"):
        compress(
            tiny_model_dir("llama"), tmp_path / "out", calibration=str(tiny_text), workers=2, **FAST
        )


def test_a_resumed_run_keeps_its_threads(tiny_model_dir, tiny_text, tmp_path):
    import torch

    class Stop(BaseException):
        pass

    def dying(event):
        if event["event"] == "module":
            raise Stop

    settings = {**FAST, "calibration": str(tiny_text)}
    before = torch.get_num_threads()
    try:
        with pytest.raises(Stop):
            compress(tiny_model_dir("llama"), tmp_path / "out", listener=dying, **settings)
        with pytest.raises(InputError, match="threads: 1 there, 2 now"):
            compress(tiny_model_dir("llama"), tmp_path / "out", **{**settings, "num_threads": 2})
        torch.set_num_threads(2)
        compress(tiny_model_dir("llama"), tmp_path / "out", **{**settings, "num_threads": None})
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_worker_without_a_run_says_where_to_look(tmp_path):
    with pytest.raises(InputError, match=r"holds no run with a queue.*OUT\.work"):
        work(tmp_path, wait_s=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, "workers: expected 0 to"),
        ({"workers": True}, "workers: expected 0 to"),
        ({"executor": "slurm"}, "executor: expected local or ray"),
        ({"executor": "ray", "workers": 0}, "at least 1 with ray"),
    ],
)
def test_impossible_numbers_are_refused(settings, message, tiny_model_dir, tmp_path):
    with pytest.raises(InputError, match=message):
        compress(tiny_model_dir("llama"), tmp_path / "out", **settings)


@pytest.mark.parametrize(
    "damage", ["record cut", "record gone", "tensors cut", "tensors flipped", "tensors of a device"]
)
def test_a_damaged_task_ends_the_run_and_the_next_one_fits_it(
    damage, reference, tiny_model_dir, tiny_text, tmp_path, monkeypatch
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
    assert (tmp_path / "out" / MANIFEST_FILE).read_bytes() == reference("llama")
