"""FORMAT.md promises that its text suffices for a reader: its example and its reader are run here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from compressed_models import FAMILIES, write_tiny

from cospadi.checkpoint.format import _OPTIONAL, _REQUIRED, CospadiConfigData
from cospadi.checkpoint.reader import read_checkpoint

DOCUMENT = (Path(__file__).parents[2] / "FORMAT.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return text


@pytest.fixture(scope="module")
def read_dense():
    namespace: dict = {}
    exec(block("python"), namespace)
    return namespace["read_dense"]


def test_example_config_is_valid():
    data = CospadiConfigData.parse(json.loads(block("json")))
    assert data.values_ratio() == pytest.approx(data.ratio["values"], abs=5e-4)
    assert data.stored_ratio() == pytest.approx(data.ratio["stored"], abs=5e-4)


def test_every_key_is_documented():
    for key in (*_REQUIRED, *_OPTIONAL):
        assert f"`{key}`" in DOCUMENT, key


def compare(folder, read_dense):
    checkpoint = read_checkpoint(folder)
    for name in checkpoint.data.modules:
        expected = checkpoint.factor(name).dense_weight(torch.float64)
        found = torch.tensor(read_dense(folder, name), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reader_of_the_document_reads(stored, read_dense, family):
    compare(stored[family], read_dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_reader_of_the_document_reads_other_types_and_shards(tmp_path, read_dense, dtype):
    compare(write_tiny(tmp_path / "out", dtype=dtype, max_shard_size=6000), read_dense)
