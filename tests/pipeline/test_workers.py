"""A run with workers has the manifest of the run without, whoever of them dies."""

from __future__ import annotations

import pytest

from cospadi.checkpoint.manifest import MANIFEST_FILE
from cospadi.errors import InputError
from cospadi.pipeline.compress import compress
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
