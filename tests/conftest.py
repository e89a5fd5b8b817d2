"""Tiny random models, a tiny tokenizer and texts, made on the fly; nothing here needs the network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tiny_models import make_model, make_tokenizer

# The same examples in every run, so that a verdict can be repeated; COSPADI_TEST_RANDOM=1 looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("random" if os.environ.get("COSPADI_TEST_RANDOM") == "1" else "repeatable")


@pytest.fixture(scope="session")
def session_threads() -> int:
    """Threads before any test or fixture of a module changed them."""
    import torch

    return torch.get_num_threads()


@pytest.fixture(scope="session", autouse=True)
def count_threads_first(session_threads) -> None:
    """See to it that the count is taken at the very beginning."""


@pytest.fixture(autouse=True)
def same_threads(session_threads):
    """Give every test the thread count of the session: results depend on it, and commands and workers set it."""
    import torch

    def reset():
        if torch.get_num_threads() != session_threads:
            torch.set_num_threads(session_threads)

    reset()  # fixtures of modules set it, too
    yield
    reset()


@pytest.fixture(scope="session")
def quiet_transformers() -> None:
    """No progress bars or advice on the terminal; not automatic, since many tests never import transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tiny tokenizer, without BOS."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_tokenizer_bos():
    """The tiny tokenizer that begins every text with BOS (id 0)."""
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory, tiny_tokenizer, quiet_transformers) -> Callable[[str], Path]:
    """Return the folder of a tiny dense model by family name; made once, tests must not change it."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            make_model(family).save_pretrained(path)
            tiny_tokenizer.save_pretrained(path)
        return path

    return folder


@pytest.fixture
def damaged_dir(tiny_model_dir, tmp_path) -> Path:
    """A copy of the tiny Llama to damage."""
    return Path(shutil.copytree(tiny_model_dir("llama"), tmp_path / "damaged"))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A text file of 60,000 characters."""
    from cospadi.calibration.data import builtin_text

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(builtin_text("evaluation")[:60_000], encoding="utf-8")
    return path
