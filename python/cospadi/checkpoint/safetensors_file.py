"""Read-only access to one safetensors file that nobody has vouched for; needs torch alone.

The safetensors package would do for files of our own. Here every claim of the header is checked
against the file, and an error names the file and the tensor.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from cospadi.checkpoint.strict_json import MAX_JSON_BYTES, brief_text, parse_json_object
from cospadi.errors import CheckpointError, brief
from cospadi.factor.spec import MAX_ELEMENTS

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Types by the names that headers have for them."""
_MAX_DIMS = 8
_TENSOR_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]{1,1024}")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Parameters
    ----------
    file : Path
        The safetensors file.
    dtype : torch.dtype
        Element type.
    shape : tuple of int
        Sizes, row-major.
    offset, nbytes : int
        First byte in the file and length in bytes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    dict of str to TensorInfo
        In file order. The tensors cover the data exactly: no overlap, no gap, no byte left over.

    Raises
    ------
    CheckpointError
        If the file is truncated, longer than its header says, or the header is inconsistent.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: truncated, {size} bytes cannot hold a header")
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{path}: header of {header_bytes} bytes exceeds {MAX_JSON_BYTES}"
                )
            if 8 + header_bytes > size:
                raise CheckpointError(
                    f"{path}: truncated, the header ends at byte {8 + header_bytes} of {size}"
                )
            text = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    header = parse_json_object(text, str(path))
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = {name: _parse_entry(path, name, item, data_start) for name, item in header.items()}
    _check_coverage(path, tensors, data_start, size)
    return tensors


def read_tensor(info: TensorInfo, name: str) -> torch.Tensor:
    """Read one tensor into memory of its own.

    Parameters
    ----------
    info : TensorInfo
        From `read_header`.
    name : str
        Tensor name, for the message.

    Raises
    ------
    CheckpointError
        If the file became shorter or cannot be read.
    """
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype, device="cpu")
    # Memory from torch starts at a cache line. Elsewhere (in a bytearray) the start changes from process to process,
    # and with it the last bits of products in the libraries below: runs from the same files would differ.
    buffer = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.offset)
            count = stream.readinto(buffer.numpy().data)
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: {name} cannot be read ({error.strerror or error})"
        ) from None
    if count != info.nbytes:
        raise CheckpointError(
            f"{info.file}: {name} is truncated, expected {info.nbytes} bytes, got {count}"
        )
    return buffer.view(info.dtype).reshape(info.shape)


def _parse_entry(path: Path, name: str, item: object, data_start: int) -> TensorInfo:
    if _TENSOR_NAME.fullmatch(name) is None:
        raise CheckpointError(f"{path}: {brief(name)} is no tensor name")
    where = f"{path}: {brief_text(name)}"
    if not isinstance(item, dict):
        raise CheckpointError(f"{where}: expected an object, got {brief(item)}")
    dtype_key = item.get("dtype")
    if not isinstance(dtype_key, str) or dtype_key not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {brief(dtype_key)}")
    shape = _sizes(item.get("shape"), f"{where}: shape")
    if len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{where}: {len(shape)} dimensions exceed {_MAX_DIMS}")
    offsets = _sizes(item.get("data_offsets"), f"{where}: data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets must be two ascending numbers")
    dtype = DTYPES[dtype_key]
    nbytes = prod(shape) * dtype.itemsize
    if prod(shape) >= MAX_ELEMENTS or nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype_key} {list(shape)} does not fill data_offsets {list(offsets)}"
        )
    return TensorInfo(path, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _sizes(value: object, where: str) -> list[int]:
    if not isinstance(value, list):
        raise CheckpointError(f"{where}: expected a list of integers, got {brief(value)}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**63:
            raise CheckpointError(f"{where}: expected sizes from 0 to 2**63 - 1, got {brief(item)}")
    return value


def _check_coverage(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    position, previous = start, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            raise CheckpointError(
                f"{path}: {brief_text(name)} starts at byte {info.offset}, "
                f"but {brief_text(previous)} ends at {position}"
            )
        position, previous = info.offset + info.nbytes, name
    if position != size:
        problem = "truncated" if position > size else "followed by unknown data"
        raise CheckpointError(
            f"{path}: {problem}, the header describes {position} bytes, the file has {size}"
        )
