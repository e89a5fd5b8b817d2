"""A run that may not find room on its disk says so before it begins, and goes on."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from cospadi.pipeline.compress import compress
from cospadi.pipeline.disk import free_bytes, shortage

FAST = {"ratio": 0.3, "samples": 8, "sequence_length": 64}


def test_free_bytes_are_those_of_the_system(tmp_path):
    state = os.statvfs(tmp_path)
    assert free_bytes(tmp_path) == pytest.approx(state.f_bavail * state.f_frsize, rel=0.05)


@pytest.mark.parametrize(("wanted", "is_short"), [(1000, False), (1001, True), (1600, True)])
def test_what_is_there_already_counts(wanted, is_short, tmp_path, monkeypatch):
    monkeypatch.setattr("cospadi.pipeline.disk.free_bytes", lambda folder: 400)
    (tmp_path / "modules").mkdir()
    base = sum(file.lstat().st_size for file in tmp_path.rglob("*"))
    (tmp_path / "modules" / "a").write_bytes(bytes(600))
    text = shortage(tmp_path, base + wanted)
    assert (text is not None) is is_short
    if text:
        assert str(tmp_path.parent) in text and "400" not in text  # told in MB


@pytest.mark.parametrize("given", [{}, {"max_memory": "2GB"}])
@pytest.mark.parametrize("free", [0, 1 << 40])
def test_a_warning_at_the_start(given, free, tiny_model_dir, tiny_text, tmp_path, monkeypatch):
    state = SimpleNamespace(f_bavail=free, f_frsize=1)
    monkeypatch.setattr("cospadi.pipeline.disk.os.statvfs", lambda folder: state)
    events = []
    compress(
        tiny_model_dir("llama"),
        tmp_path / "out",
        calibration=str(tiny_text),
        listener=events.append,
        **FAST,
        **given,
    )
    said = [e["text"] for e in events if e["event"] == "warning" and e["text"].startswith("disk: ")]
    assert len(said) == (free == 0), said
    assert (tmp_path / "out").is_dir()
