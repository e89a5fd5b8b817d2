"""Workers of a run whose fits are computed on a GPU; see tests/pretend_device.py for the one that is used here."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from cospadi.errors import CheckpointError, CospadiError, CudaUnavailableError, InputError
from cospadi.pipeline import compress as compress_module
from cospadi.pipeline import device as device_module
from cospadi.pipeline import executor as executor_module
from cospadi.pipeline import worker as worker_module
from cospadi.pipeline.compress import compress
from cospadi.pipeline.device import DeviceKind, same_device, visible_gpus
from cospadi.pipeline.events import EventLog
from cospadi.pipeline.executor import QueueExecutor
from cospadi.pipeline.queue import DEVICE_FILE, MOST_ATTEMPTS, Queue
from cospadi.pipeline.workdir import WorkDir, run_settings
from cospadi.pipeline.worker import work
from pretend_device import DEVICE, pretended_device

FAST = {
    "samples": 8,
    "sequence_length": 48,
    "num_threads": 1,
    "first_penalty": 0.02,
    "penalty_growth": 1.6,
}
CUDA = torch.device("cuda", 0)


def a_worker_on_the_device(directory: Path, summaries: list) -> threading.Thread:
    def run() -> None:
        with pretended_device() as mode:
            summaries.append((work(directory, wait_s=60), mode))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def on_the_device(monkeypatch):
    monkeypatch.setattr(compress_module, "checked_device", lambda device: DEVICE)
    monkeypatch.setattr(
        worker_module,
        "same_device",
        lambda wanted, where: DEVICE if wanted == DeviceKind("pretend") else pytest.fail(wanted),
    )


def test_fits_of_a_worker_are_computed_on_the_runs_device(
    on_the_device, tiny_model_dir, tiny_text, tmp_path
):
    settings = {**FAST, "ratio": 0.3, "calibration": str(tiny_text)}
    with pretended_device():
        alone = compress(tiny_model_dir("llama"), tmp_path / "one", device="cuda", **settings)
    summaries: list = []
    thread = a_worker_on_the_device(tmp_path / "two.work", summaries)
    with pretended_device():
        found = compress(
            tiny_model_dir("llama"), tmp_path / "two", device="cuda", workers=0, **settings
        )
    thread.join(timeout=60)
    (summary, mode) = summaries[0]
    assert summary.n_done == len(found.reports) and mode.calls
    manifests = [(tmp_path / name / "cospadi_manifest.json") for name in ("one", "two")]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()
    assert alone.failed == found.failed == ()


def test_a_device_without_room_is_tried_again_and_then_given_up(
    on_the_device, monkeypatch, tiny_model_dir, tiny_text, tmp_path
):
    fit, refused = worker_module.run_task, []

    def full(task, **settings):
        if task.name.endswith("0.mlp.up_proj"):
            refused.append(task.name)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if task.name.endswith("0.self_attn.q_proj") and not refused.count(task.name):
            refused.append(task.name)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return fit(task, **settings)

    monkeypatch.setattr(worker_module, "run_task", full)
    thread = a_worker_on_the_device(tmp_path / "out.work", [])
    with pretended_device():
        result = compress(
            tiny_model_dir("llama"),
            tmp_path / "out",
            device="cuda",
            workers=0,
            calibration=str(tiny_text),
            **FAST,
        )
    thread.join(timeout=60)
    assert result.failed == ("model.layers.0.mlp.up_proj",)
    assert "CUDA out of memory" in next(d for d in result.dense if d.name in result.failed).reason
    assert refused.count("model.layers.0.mlp.up_proj") == MOST_ATTEMPTS


def test_a_machine_without_a_gpu_cannot_join(monkeypatch):
    wanted = DeviceKind("cuda", "NVIDIA H200")
    monkeypatch.setattr(device_module.native, "has_cuda_kernels", lambda: False)
    with pytest.raises(
        CudaUnavailableError, match=r"out\.work: its fits run on NVIDIA H200; .*no C"
    ):
        same_device(wanted, "out.work")


def test_another_gpu_cannot_join(monkeypatch):
    monkeypatch.setattr(device_module, "checked_device", lambda kind: CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert same_device(DeviceKind("cuda", "NVIDIA L4"), "out.work") == CUDA
    with pytest.raises(InputError, match="NVIDIA L4 here, NVIDIA H200 there"):
        same_device(DeviceKind("cuda", "NVIDIA H200"), "out.work")


def test_a_run_on_the_cpu_takes_any_machine():
    assert same_device(DeviceKind(), "out.work") == torch.device("cpu")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"kind": "cuda"}', '{"kind": 1, "model": ""}', '{"kind": "%s", "model": ""}' % ("x" * 300)]
)  # fmt: skip
def test_a_damaged_record_of_the_device_is_refused(content, tmp_path):
    queue = Queue(tmp_path)
    queue.start()
    (queue.path / DEVICE_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=DEVICE_FILE):
        queue.device()


def test_a_record_cannot_name_a_device_of_another_kind(tmp_path):
    queue = Queue(tmp_path)
    queue.start()
    (queue.path / DEVICE_FILE).write_text(json.dumps({"kind": "xpu", "model": ""}))
    with pytest.raises(InputError, match="expected cpu or cuda, got 'xpu'"):
        same_device(queue.device(), "out.work")


@pytest.mark.parametrize(
    ("given", "names"),
    [(None, ["0", "1"]), ("", ["0", "1"]), ("3, GPU-5", ["3", "GPU-5"]), ("7,8,9", ["7", "8"])],
)
def test_gpus_are_named_as_cuda_names_them(given, names, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == names


def test_no_more_workers_than_gpus(monkeypatch, tiny_model_dir, tmp_path):
    monkeypatch.setattr(compress_module, "checked_device", lambda device: CUDA)
    monkeypatch.setattr(compress_module, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(InputError, match="workers: each has a GPU to itself; expected at most 2"):
        compress(tiny_model_dir("llama"), tmp_path / "out", device="cuda", workers=3)


def test_every_own_worker_has_a_gpu_to_itself_and_says_what_is_wrong_with_it(monkeypatch, tmp_path):
    """Real workers, told of GPUs that are not there: each sees one, its successor the same, and their error is told."""
    monkeypatch.setattr(executor_module, "visible_gpus", lambda: ["3", "GPU-5"])
    monkeypatch.setattr(
        executor_module, "kind_of", lambda device: DeviceKind("cuda", "NVIDIA H200")
    )
    seen: dict[int, str] = {}
    real = executor_module.subprocess.Popen

    def noted(*arguments, **settings):
        process = real(*arguments, **settings)
        seen[process.pid] = settings["env"]["CUDA_VISIBLE_DEVICES"]
        return process

    monkeypatch.setattr(executor_module.subprocess, "Popen", noted)
    work_dir = WorkDir(tmp_path / "out.work", run_settings())
    with EventLog(tmp_path / "log.jsonl", None) as log:
        runner = QueueExecutor(work_dir, log, 2, device=CUDA, beat_s=0.2)
        try:
            assert sorted(seen.values()) == ["3", "GPU-5"]
            with pytest.raises(CospadiError, match=r"its fits run on NVIDIA H200; device cuda"):
                for _ in range(600):
                    runner._watch()
                    time.sleep(0.1)
        finally:
            runner.close()
            work_dir.close()
    names = sorted(seen.values())
    assert len(names) > 2 and set(names) == {"3", "GPU-5"}
