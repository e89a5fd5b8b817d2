"""FORMAT.md promises that its text suffices for a reader: its example and its reader are run here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from compressed_models import FAMILIES, write_tiny

from cospadi import native
from cospadi.checkpoint.format import _OPTIONAL, _REQUIRED, CospadiConfigData
from cospadi.checkpoint.reader import read_checkpoint
from cospadi.factor.spec import COEFFS_DTYPES, DICTIONARY_DTYPES, PARTS

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
    assert data.removed_shares() == pytest.approx(data.ratio, abs=5e-4)


def test_every_key_is_documented():
    for key in (*_REQUIRED, *_OPTIONAL):
        assert f"`{key}`" in DOCUMENT, key
    for key in (*COEFFS_DTYPES, *DICTIONARY_DTYPES):
        assert f'`"{key}"`' in DOCUMENT, key
    for part in PARTS:
        assert f"`M.{part}`" in DOCUMENT, part


def compare(folder, read_dense):
    checkpoint = read_checkpoint(folder)
    for name in checkpoint.data.modules:
        expected = checkpoint.factor(name).dense_weight(torch.float64)
        found = torch.tensor(read_dense(folder, name), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reader_of_the_document_reads(stored, read_dense, family):
    compare(stored[family], read_dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reader_of_the_document_reads_every_kind(varied, read_dense, family):
    compare(varied[family], read_dense)


def test_the_reader_of_the_document_reads_version_1(copied, read_dense):
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["format_version"] = 1
    (copied / "config.json").write_text(json.dumps(config))
    compare(copied, read_dense)


def test_packing_example():
    packed = native.pack_fields(torch.tensor([[1, -2, 7]], dtype=torch.int32), 4)
    text = bytes(packed.flatten().tolist()).hex(" ")
    assert f"integers 1, -2, 7:\nbytes `{text}`" in DOCUMENT


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_reader_of_the_document_reads_other_types_and_shards(tmp_path, read_dense, dtype):
    compare(write_tiny(tmp_path / "out", dtype=dtype, max_shard_size=6000), read_dense)
