"""Reading a compressed checkpoint without transformers: structure first, tensors on demand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cospadi.checkpoint.format import CONFIG_KEY, QUANT_METHOD, CospadiConfigData
from cospadi.checkpoint.safetensors_file import TensorInfo, read_header, read_tensor
from cospadi.checkpoint.strict_json import brief_text, read_json_object
from cospadi.errors import CheckpointError, NotCompressedError, brief
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import dtype_name

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class CompressedCheckpoint:
    """A checkpoint folder whose structure has been checked.

    Parameters
    ----------
    path : Path
        The folder.
    config : dict
        All of config.json.
    data : CospadiConfigData
        Its checked ``quantization_config``.
    tensors : dict of str to TensorInfo
        Every tensor of the model, compressed or not.
    """

    path: Path
    config: dict[str, Any]
    data: CospadiConfigData
    tensors: dict[str, TensorInfo]

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def file_bytes(self) -> int:
        """Bytes of the safetensors files on disk, headers included."""
        return sum(path.stat().st_size for path in self.files)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor on the CPU, in its stored type.

        Raises
        ------
        CheckpointError
            If there is no such tensor or the file cannot be read.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: no tensor {brief(name)}")
        return read_tensor(info, name)

    def factor(self, name: str) -> SparseFactor:
        """Read and validate the factor of one compressed module, for a member with its leader's dictionary.

        Parameters
        ----------
        name : str
            A key of ``data.modules``.

        Raises
        ------
        CheckpointError
            If the module is not compressed, or its tensors hold a wrong mask or a wrong value (see
            `SparseFactor.validate`).
        """
        entry = self.data.modules.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: {brief(name)} is not a compressed module")
        names = entry.factor_tensors(name)
        tensors = {part: self.tensor(full_name) for part, full_name in names.items()}
        factor = SparseFactor.from_tensors(entry.spec, tensors)
        try:
            factor.validate(name, entry.leader)
        except CheckpointError as error:
            # The message begins with the tensor, whose file may be the leader's.
            info = self.tensors.get(str(error).partition(":")[0])
            where = self.path if info is None else info.file
            raise CheckpointError(f"{where}: {error}") from None
        return factor


def read_checkpoint(path: str | Path) -> CompressedCheckpoint:
    """Open a compressed checkpoint and check everything but the tensor values.

    Reads config.json, the index and the headers of all shards; time and memory do not depend on the
    size of the model.

    Parameters
    ----------
    path : str or Path
        The folder.

    Raises
    ------
    NotCompressedError
        If there is no folder or no config.json, or config.json names no compression or another one.
    CheckpointError
        If the checkpoint is damaged or was made by a newer version; names file and tensor.
    """
    try:
        return _read_checkpoint(Path(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_checkpoint(folder: Path) -> CompressedCheckpoint:
    if not folder.is_dir():
        raise NotCompressedError(f"{folder}: no such folder")
    config_file = folder / CONFIG_FILE
    if not config_file.exists():
        raise NotCompressedError(
            f"{folder}: {CONFIG_FILE} is missing: not a model folder, or one left unfinished"
        )
    config = read_json_object(checked_file(folder, CONFIG_FILE))
    section = config.get(CONFIG_KEY)
    if section is None:
        raise NotCompressedError(f"{config_file}: no {CONFIG_KEY}: this model is not compressed")
    method = section.get("quant_method") if isinstance(section, dict) else None
    if isinstance(method, str) and method != QUANT_METHOD:
        raise NotCompressedError(
            f"{config_file}: {CONFIG_KEY}.quant_method: expected {QUANT_METHOD!r}, got {brief(method)}"
        )
    try:
        data = CospadiConfigData.parse(section)
    except CheckpointError as error:
        raise type(error)(f"{config_file}: {error}") from None
    tensors = read_headers(folder)
    check_tensors(data, tensors)
    return CompressedCheckpoint(folder, config, data, tensors)


def check_tensors(data: CospadiConfigData, tensors: dict[str, TensorInfo]) -> None:
    """Check that files hold exactly the tensors which the config describes.

    Raises
    ------
    CheckpointError
        For a compressed tensor that is missing, of the wrong type or shape, or one too many in a
        compressed module.
    """
    expected = data.expected_tensors()
    for name, spec in expected.items():
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(f"{name}: missing from the checkpoint's safetensors files")
        if dtype_name(info.dtype) not in spec.dtypes or info.shape != spec.shape:
            raise CheckpointError(
                f"{info.file}: {name}: expected {' or '.join(spec.dtypes)} {list(spec.shape)}, "
                f"got {dtype_name(info.dtype)} {list(info.shape)}"
            )
    for name, info in tensors.items():
        parent = name.rpartition(".")[0]
        while parent:
            if parent in data.modules and name not in expected:
                raise CheckpointError(
                    f"{info.file}: {brief_text(name)}: not part of the compressed module "
                    f"{parent} as {CONFIG_KEY} describes it"
                )
            parent = parent.rpartition(".")[0]


def checked_file(folder: Path, name: str) -> Path:
    """Return the path of a regular file inside a checkpoint folder.

    A link may only lead to a place inside the folder, or from a hub cache's
    ``snapshots/<revision>`` into the ``blobs`` folder beside ``snapshots``, which is how that cache
    stores every file.

    Raises
    ------
    CheckpointError
        If the file is missing, is not a regular file, or leads elsewhere.
    """
    path = folder / name
    root = folder.resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise CheckpointError(f"{path}: missing, or a link that leads nowhere") from None
    in_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not target.is_relative_to(root) and not in_cache:
        raise CheckpointError(f"{path}: a link that leads out of the checkpoint folder")
    if not target.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    return path


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of all shards of a model folder, through the index if there is one.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, lies outside the folder, or disagrees with the index.
    """
    has_index = (folder / INDEX_FILE).exists()
    if (folder / SINGLE_FILE).exists() or not has_index:
        if has_index:
            # Loaders disagree on which of the two they take.
            raise CheckpointError(f"{folder}: both {SINGLE_FILE} and {INDEX_FILE}: ambiguous")
        return read_header(checked_file(folder, SINGLE_FILE))
    index_path = checked_file(folder, INDEX_FILE)
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map is missing or empty")
    shards: dict[str, None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or _SHARD_NAME.fullmatch(file) is None:
            raise CheckpointError(
                f"{index_path}: {brief_text(name)} lies in {brief(file)}, "
                "which is not a plain safetensors file name"
            )
        shards[file] = None
    tensors: dict[str, TensorInfo] = {}
    for file in shards:
        for name, info in read_header(checked_file(folder, file)).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{info.file}: {brief_text(name)}: the index places it in "
                    f"{brief(weight_map.get(name))}"
                )
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{folder / file}: {brief_text(name)}: missing, the index names it"
            )
    return tensors
