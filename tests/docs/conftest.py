"""A directory in which the commands of the documents have what they name: MODEL, my_text.jsonl, held_out.txt, small."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

CONTEXT = 1024
"""Of the model that the commands compress: their windows have 1024 tokens."""


@pytest.fixture(scope="session")
def material(tiny_model_dir, tmp_path_factory) -> Path:
    """``MODEL``, a tiny Llama that takes 1024 tokens; ``my_text.jsonl`` and ``held_out.txt``."""
    from cospadi.calibration.data import builtin_text

    root = tmp_path_factory.mktemp("documents")
    model = shutil.copytree(tiny_model_dir("llama"), root / "MODEL")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": CONTEXT + 64})
    )
    text = builtin_text("calibration")
    documents = [text[i : i + 200] for i in range(0, len(text), 200)]
    lines = (json.dumps({"text": document}) for document in documents)
    (root / "my_text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (root / "held_out.txt").write_text(builtin_text("evaluation")[:8000], encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def small(material, tmp_path_factory) -> Path:
    """``small``, as the first command of the README makes it, from less text."""
    from cospadi.pipeline.compress import compress

    out = tmp_path_factory.mktemp("small") / "small"
    calibration = str(material / "my_text.jsonl")
    compress(
        material / "MODEL", out, ratio=0.3, calibration=calibration, samples=16, sequence_length=256
    )
    return out


@pytest.fixture
def place(material, small, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Go to a new directory with all of that; ``small`` only where the text does not make it itself."""

    def prepare(text: str) -> Path:
        for path in material.iterdir():
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "path/to").mkdir(parents=True)
        (tmp_path / "path/to/model").symlink_to(material / "MODEL")
        if "--out small " not in text:
            shutil.copytree(small, tmp_path / "small")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return prepare
