"""Writing a compressed checkpoint tensor by tensor, so that no more than one of them is in memory.

The files have the bytes that `cospadi.checkpoint.writer.write_checkpoint` gives them for the same model in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi.checkpoint.atomic import new_folder
from cospadi.checkpoint.format import CONFIG_KEY, SENTINEL, CospadiConfigData
from cospadi.checkpoint.reader import INDEX_FILE, SINGLE_FILE, check_tensors, read_headers
from cospadi.checkpoint.safetensors_file import DTYPES
from cospadi.checkpoint.writer import (
    RunRecord,
    check_extra_names,
    finish_folder,
    hold_config,
    natural_key,
)
from cospadi.errors import CheckpointError
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import STORAGE_DTYPES, dtype_name
from cospadi.model.layers import CospadiLinear, replace_modules

# The order in which the safetensors library writes types, alignment first.
_ORDER = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64", "I64", "U64",
)  # fmt: skip
_KEYS = {dtype: key for key, dtype in DTYPES.items()}


@dataclass(frozen=True)
class _Entry:
    """One tensor to write: type and sizes now, values when it is its turn."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_streamed(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    config_data: CospadiConfigData,
    out_dir: str | Path,
    *,
    read: Callable[[str], torch.Tensor],
    factor: Callable[[str], SparseFactor],
    unstored: Callable[[nn.Module], set[str]],
    extra_files: Mapping[str, str | bytes],
    run: RunRecord | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a compressed checkpoint, completely or not at all.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        On the meta device. Its compressed modules are replaced by layers without data.
    tokenizer, config_data, out_dir, extra_files, run, dtype, max_shard_size
        As for `cospadi.checkpoint.writer.write_checkpoint`.
    read : callable
        Gives a tensor of the dense model by name.
    factor : callable
        Gives a factor by module name.
    unstored : callable
        Names of the model's state dict that are not stored because they are tied to others.

    Raises
    ------
    InputError, CheckpointError
        As `write_checkpoint`.

    Notes
    -----
    Memory: the largest tensor twice (as read and as stored), or one factor.
    """
    check_extra_names([*extra_files, *(run.files if run is not None else ())])
    config_data.check_sharing()
    layers: dict[str, CospadiLinear] = {}
    for name, entry in sorted(
        config_data.modules.items(), key=lambda item: item[1].leader is not None
    ):
        layers[name] = CospadiLinear(
            entry.spec,
            device="meta",
            layer_type=entry.layer_type,
            leader=layers[entry.leader] if entry.leader is not None else None,
        )
    replace_modules(model, layers)
    entries = list(_entries(model, config_data, read, factor, unstored(model), dtype))
    with new_folder(out_dir) as folder:
        _write_configs(model, folder)
        _write_shards(model, entries, folder, max_shard_size)
        check_tensors(config_data, read_headers(folder))
        hold_config(folder, {"dtype": dtype_name(dtype), CONFIG_KEY: config_data.to_dict()})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        finish_folder(folder, extra_files, run)
    return Path(out_dir)


def _entries(
    model: nn.Module,
    data: CospadiConfigData,
    read: Callable[[str], torch.Tensor],
    factor: Callable[[str], SparseFactor],
    unstored: set[str],
    dtype: torch.dtype,
) -> Iterator[_Entry]:
    latest: dict[str, SparseFactor] = {}

    def part_of(module: str, part: str) -> torch.Tensor:
        if module not in latest:
            latest.clear()  # the tensors of one factor follow each other, but for their types
            found = factor(module)
            found.validate(module, data.modules[module].leader)
            latest[module] = found
        tensor = getattr(latest[module], part)
        if tensor is None:
            raise CheckpointError(f"{module}: its factor has no {part}")
        return tensor

    state = model.state_dict()
    for name in sorted(state, key=natural_key):
        tensor = state[name]
        if name in unstored:
            continue
        module, _, part = name.rpartition(".")
        entry = data.modules.get(module)
        shape = tuple(tensor.shape)
        if entry is None:
            stored = dtype if tensor.is_floating_point() else tensor.dtype
            yield _Entry(name, stored, shape, partial(read, name))
        elif part == SENTINEL:
            yield _Entry(name, dtype, (0,), lambda: torch.empty(0))
        else:
            expected = entry.spec.tensors()[part].dtypes
            stored = tensor.dtype
            if tensor.is_floating_point():
                is_fixed = len(expected) == 1 and expected[0] in STORAGE_DTYPES
                stored = STORAGE_DTYPES[expected[0]] if is_fixed else dtype
            yield _Entry(name, stored, shape, partial(part_of, module, part))


def _write_configs(model: Any, folder: Path) -> None:  # noqa: ANN401
    """Write what ``save_pretrained`` writes beside the weights."""
    model.config.dtype = (
        "float32"  # what a loaded model has; its place is taken when the config is held
    )
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write_shards(
    model: nn.Module, entries: list[_Entry], folder: Path, max_shard_size: int | str
) -> None:
    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    by_name = {entry.name: entry for entry in entries}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda entry: entry.nbytes,
        # as transformers does: tensors without elements count as one, and lie with the first
        get_storage_id=lambda entry: None if entry.nbytes else "empty",
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, [by_name[name] for name in names])
    if split.is_sharded:
        index = {
            "metadata": {
                "total_parameters": sum(p.numel() for p in model.parameters()),
                **split.metadata,
            },
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")
    else:
        assert list(split.filename_to_tensors) == [SINGLE_FILE]


def _write_file(path: Path, entries: list[_Entry]) -> None:
    ordered = sorted(entries, key=lambda e: (-_ORDER.index(_KEYS[e.dtype]), e.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": _KEYS[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as sink:
        sink.write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            values = entry.read()
            if values.dtype == torch.float64:  # in two steps, as through a model in float32
                values = values.float()
            values = values.to(entry.dtype).contiguous()
            if tuple(values.shape) != entry.shape:
                raise CheckpointError(
                    f"{entry.name}: expected {list(entry.shape)}, got {list(values.shape)}"
                )
            if values.numel():
                sink.write(values.view(torch.uint8).numpy().data.cast("B"))
