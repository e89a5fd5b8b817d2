"""Writing a model with compressed layers as an ordinary model folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cospadi.checkpoint.atomic import HELD_SUFFIX, new_folder
from cospadi.checkpoint.format import CONFIG_KEY, CospadiConfigData, ModuleEntry
from cospadi.checkpoint.manifest import (
    MANIFEST_FILE,
    RUN_FILE,
    write_manifest,
    write_run_record,
)
from cospadi.checkpoint.reader import CONFIG_FILE, check_tensors, read_headers
from cospadi.errors import InputError, brief
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import STORAGE_DTYPES, dtype_name
from cospadi.model.layers import compressed_modules, describe_modules

_EXTRA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", re.ASCII)


@dataclass(frozen=True)
class RunRecord:
    """What differs between two runs that give equal checkpoints; the manifest leaves it out.

    Attributes
    ----------
    data : mapping
        Plain data, such as times.
    files : mapping
        Files by plain name that show some of it; listed in the run record with their sums.
    """

    data: Mapping[str, Any]
    files: Mapping[str, str | bytes]


def write_checkpoint(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    config_data: CospadiConfigData,
    out_dir: str | Path,
    extra_files: Mapping[str, str | bytes] | None = None,
    run: RunRecord | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a compressed checkpoint, completely or not at all.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model whose compressed layers are `CospadiLinear`; its tensors are not changed.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        Written beside the model; None writes none.
    config_data : CospadiConfigData
        Describes exactly the compressed layers of `model`; its storage types decide what is written
        for floating-point dictionaries and coefficients (`cospadi.model.layers.describe_modules` makes
        one).
    out_dir : str or Path
        Must not exist or be an empty folder.
    extra_files : mapping of str to str or bytes, optional
        Further files by plain name, such as ``README.md`` or ``recipe.yaml``.
    run : RunRecord, optional
        How this run went.
    dtype : torch.dtype
        Storage type of all other floating-point tensors.
    max_shard_size : int or str
        As in ``save_pretrained``.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        If the folder is taken or unwritable, a name in `extra_files` is unusable, or `config_data`
        describes another model.
    CheckpointError
        If a factor holds a wrong mask or a value that is not finite in its storage type, or
        `config_data` contradicts itself about a shared dictionary.
    """
    extra_files = dict(extra_files or {})
    check_extra_names([*extra_files, *(run.files if run is not None else ())])
    _check_description(model, config_data)
    with new_folder(out_dir) as folder:
        save_model(model, stored_state(model, config_data, dtype), folder, max_shard_size)
        check_tensors(config_data, read_headers(folder))
        hold_config(folder, {"dtype": dtype_name(dtype), CONFIG_KEY: config_data.to_dict()})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        finish_folder(folder, extra_files, run)
    return Path(out_dir)


def finish_folder(
    folder: Path, extra_files: Mapping[str, str | bytes], run: RunRecord | None
) -> None:
    """Write further files, the run record and, last, the manifest.

    Raises
    ------
    InputError
        A further file has the name of one that is there.
    """
    for name, content in {**extra_files, **(run.files if run is not None else {})}.items():
        if (folder / name).exists():
            raise InputError(f"extra file {name}: the checkpoint has a file of this name")
        data = content.encode("utf-8") if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    if run is not None:
        write_run_record(folder, run.data, run.files)
    write_manifest(folder)


def stored_state(
    model: Any,  # noqa: ANN401
    config_data: CospadiConfigData | None,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return the state dict in storage types; tied tensors stay tied.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model; tensors of the right type are shared with it.
    config_data : CospadiConfigData or None
        Types of floating-point dictionaries and coefficients; None for a dense model. Integers,
        packed coefficients and scales keep their types.
    dtype : torch.dtype
        Type of every other floating-point tensor.

    Raises
    ------
    CheckpointError
        If a factor is not valid in its storage type (float16 overflows, for example).
    """
    types: dict[str, torch.dtype] = {}
    modules = {} if config_data is None else config_data.modules
    for name, entry in modules.items():
        for part, expected in entry.spec.tensors().items():
            # The bias admits several types and follows the model; integers stay what they are.
            if len(expected.dtypes) == 1 and expected.dtypes[0] in STORAGE_DTYPES:
                types[f"{name}.{part}"] = STORAGE_DTYPES[expected.dtypes[0]]
    state: dict[str, torch.Tensor] = {}
    # save_pretrained recognises tied tensors by their storage, so one source must give one result.
    done: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in done:
            state[name] = done[key]
            continue
        target = types.get(name, dtype) if tensor.is_floating_point() else tensor.dtype
        state[name] = done[key] = tensor.detach().to(target)
    # which shard a tensor goes to must not depend on how transformers put the model together
    state = {name: state[name] for name in sorted(state, key=natural_key)}
    for name, entry in modules.items():
        tensors = {part: state[full] for part, full in entry.factor_tensors(name).items()}
        SparseFactor.from_tensors(entry.spec, tensors).validate(name, entry.leader)
    return state


def natural_key(name: str) -> tuple[tuple[int, str, int], ...]:
    """Sorts tensor names by their parts, numbers by value and before words, as transformers does."""
    parts = []
    for part in name.split("."):
        text = part.rstrip("0123456789")
        number = part[len(text) :]
        parts.append((1 if text else 0, text, int(number) if number else -1))
    return tuple(parts)


def save_model(
    model: Any,  # noqa: ANN401
    state: dict[str, torch.Tensor],
    folder: Path,
    max_shard_size: int | str,
) -> None:
    """Let transformers write shards, index, config and generation config from `state`."""
    # A quantizer would replace the state dict by that of the model.
    quantizer = model.__dict__.pop("hf_quantizer", None)
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer


def hold_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Rewrite config.json with `changes` (None removes a key) under its name until completion."""
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(changes)
    config = {
        key: value for key, value in config.items() if key not in changes or value is not None
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    (folder / f"{CONFIG_FILE}{HELD_SUFFIX}").write_text(text, encoding="utf-8")
    path.unlink()


def check_extra_names(names: Sequence[str]) -> None:
    """Refuse names that are no plain file names, or taken."""
    for name in names:
        if _EXTRA_NAME.fullmatch(name) is None or name in (CONFIG_FILE, MANIFEST_FILE, RUN_FILE):
            raise InputError(
                f"extra file {brief(name)}: expected a plain file name that is not taken"
            )
        if name.endswith((HELD_SUFFIX, ".safetensors")):
            raise InputError(f"extra file {name}: this kind of name is reserved")


def _check_description(model: Any, data: CospadiConfigData) -> None:  # noqa: ANN401
    layers = compressed_modules(model)
    if layers.keys() != data.modules.keys():
        name = sorted(layers.keys() ^ data.modules.keys())[0]
        where = "the model" if name in layers else "config_data"
        raise InputError(f"{name}: compressed in {where} only")
    data.check_sharing()
    for name, entry in describe_modules(model).modules.items():
        ours, wanted = _fixed_fields(entry), _fixed_fields(data.modules[name])
        for key, value in ours.items():
            if value != wanted[key]:
                raise InputError(
                    f"{name}: {key} is {value} in the model and {wanted[key]} in config_data"
                )


def _fixed_fields(entry: ModuleEntry) -> dict[str, object]:
    """Return what writing does not change: everything but which floating-point type is stored."""
    fields = {**asdict(entry.spec), "layer_type": entry.layer_type, "leader": entry.leader}
    for key in ("dictionary_dtype", "coeffs_dtype"):
        if fields[key] in STORAGE_DTYPES:
            fields[key] = "floating point"
    return fields
