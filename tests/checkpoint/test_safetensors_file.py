from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from cospadi.checkpoint.safetensors_file import read_header, read_tensor
from cospadi.errors import CheckpointError

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def write(path, header: object, data: bytes = b"", *, length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int = 0, end: int = 4, shape=(4,), dtype="U8") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_reads_what_safetensors_writes(tmp_path):
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.empty(0, dtype=torch.bfloat16), "scalar": torch.tensor(3.5)}
    tensors["none"] = torch.empty(2, 0, 3)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.keys() == tensors.keys()
    for name, tensor in tensors.items():
        loaded = read_tensor(header[name], name)
        assert loaded.dtype == tensor.dtype
        assert torch.equal(loaded, tensor)


def test_values_begin_at_a_cache_line_wherever_the_file_has_them(tmp_path):
    tensors = {f"t{n}": torch.randn(n) for n in range(1, 40)}
    save_file(tensors, tmp_path / "a.safetensors")
    read = [
        read_tensor(info, name) for name, info in read_header(tmp_path / "a.safetensors").items()
    ]
    assert {tensor.data_ptr() % 64 for tensor in read} == {0}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": entry()}, b"123", "truncated"),
        ({"a": entry()}, b"12345", "followed by unknown data"),
        ({"a": entry(1, 5)}, b"12345", "a starts at byte"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "b starts at byte"),
        ({"a": entry(0, 4), "b": entry(5, 9)}, b"123456789", "b starts at byte"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, b"1234", "starts at byte"),
        ({"a": entry(0, 3)}, b"123", "does not fill"),
        ({"a": entry(4, 0)}, b"1234", "ascending"),
        ({"a": entry(-1, 3)}, b"1234", "expected sizes"),
        ({"a": entry(0, 2**70)}, b"1234", "expected sizes"),
        ({"a": entry(shape=(2**40, 2**40))}, b"1234", "does not fill"),
        ({"a": entry(shape=(1,) * 20, end=1)}, b"1", "dimensions"),
        ({"a": entry(shape=(4.0,))}, b"1234", "expected sizes"),
        ({"a": entry(shape=(True,), end=1)}, b"1", "expected sizes"),
        ({"a": {**entry(), "shape": 4}}, b"1234", "expected a list"),
        ({"a": {**entry(), "data_offsets": [0, 4, 4]}}, b"1234", "two ascending"),
        ({"a": {**entry(), "dtype": "U9"}}, b"1234", "unknown dtype 'U9'"),
        ({"a": {**entry(), "dtype": []}}, b"1234", "unknown dtype a list"),
        ({"a": {"dtype": "U8"}}, b"1234", "expected a list"),
        ({"a": 3}, b"", "a: expected an object"),
        ({"../a": entry()}, b"1234", "no tensor name"),
        ({"": entry()}, b"1234", "no tensor name"),
        ([], b"", "expected a JSON object"),
        (b"{", b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "occurs twice"),
        ({}, b"x", "followed by unknown data"),
    ],
)
def test_rejects(tmp_path, header, data, words):
    path = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("length", [10**6, 10**9, 2**63, 2**64 - 1])
def test_rejects_header_lengths(tmp_path, length):
    with pytest.raises(CheckpointError, match=r"truncated|exceeds"):
        read_header(write(tmp_path / "a.safetensors", {}, length=length))


def test_rejects_short_files(tmp_path):
    for count in range(8):
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"\0" * count)
        with pytest.raises(CheckpointError, match="truncated"):
            read_header(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be read|truncated"):
        read_header(tmp_path)


def test_file_cut_after_the_header_was_read(tmp_path):
    path = write(tmp_path / "a.safetensors", {"a": entry()}, b"1234")
    info = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="a is truncated, expected 4 bytes, got 3"):
        read_tensor(info, "a")
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensor(info, "a")
