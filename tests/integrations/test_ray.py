"""A Ray cluster of two nodes, one of which is killed in the middle of the run."""

from __future__ import annotations

import threading
import time

import pytest

from cospadi.checkpoint.manifest import MANIFEST_FILE
from cospadi.errors import FitError, InputError
from cospadi.pipeline import compress as compress_module
from cospadi.pipeline import ray_executor
from cospadi.pipeline.compress import compress
from pretend_device import DEVICE, pretended_device

pytest.importorskip("ray", reason="needs the extra ray")

FAST = {
    "ratio": 0.3,
    "samples": 8,
    "sequence_length": 64,
    "num_threads": 1,
    "dictionary": "learned",
    "iterations": 30,
    "tolerance": 0.0,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_node_killed_in_the_middle_changes_nothing(tiny_model_dir, tiny_text, tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    source, settings = tiny_model_dir("llama"), {**FAST, "calibration": str(tiny_text)}
    compress(source, tmp_path / "one", **settings)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    finished = []

    def kill():
        while len(finished) < 2:
            time.sleep(0.02)
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        result = compress(
            source,
            tmp_path / "two",
            executor="ray",
            listener=lambda e: finished.append(e) if e["event"] == "module" else None,
            **settings,
        )
        killer.join(timeout=60)
        deadline = time.monotonic() + 60  # the cluster takes its time to say so
        while sum(node["Alive"] for node in ray.nodes()) > 1 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert [node["Alive"] for node in ray.nodes()].count(True) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert result.failed == ()
    assert (tmp_path / "two" / MANIFEST_FILE).read_bytes() == (
        tmp_path / "one" / MANIFEST_FILE
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_every_fit_of_a_run_on_gpus_has_one_to_itself(
    tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    """Ray hands out GPUs by count, whether there are any: what it reserved is what a task tells."""
    import ray

    def reserved(directory: str, name: str) -> str:
        return f"GPUs {ray.get_gpu_ids()}"

    monkeypatch.setattr(compress_module, "checked_device", lambda device: DEVICE)
    monkeypatch.setattr(ray_executor, "fit_task_file", reserved)
    settings = {**FAST, "calibration": str(tiny_text), "executor": "ray", "device": "cuda"}
    for n_gpus, error, text in (
        (0, InputError, "executor ray: the cluster has no GPU"),
        (1, FitError, r"the first: GPUs \[0\]"),
    ):
        ray.init(num_cpus=2, num_gpus=n_gpus, log_to_driver=False, logging_level="ERROR")
        try:
            with pretended_device(), pytest.raises(error, match=text):
                compress(tiny_model_dir("llama"), tmp_path / f"out{n_gpus}", **settings)
        finally:
            ray.shutdown()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nobody.invalid:6379"])
def test_an_address_where_nobody_listens_is_refused_at_once(
    address, tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    start = time.monotonic()
    with pytest.raises(InputError, match="nothing answers at RAY_ADDRESS"):
        compress(
            tiny_model_dir("llama"),
            tmp_path / "out",
            calibration=str(tiny_text),
            executor="ray",
            ratio=0.3,
            samples=4,
            sequence_length=64,
        )
    assert time.monotonic() - start < 60.0
