"""A dense model whose weights stay in their safetensors files, read a block at a time.

The modules exist, their parameters hold no data (meta device) except while `StreamedSource.resident` lends them some.
Buffers that are not stored, such as rotary frequencies, are real: the model is built with `torch.empty` alone sent to
the meta device, which is what parameters are made with. What does not fit this scheme (files with other names than the
model's, fused tensors that transformers puts together while loading) is said to be unsupported, and must be loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cospadi.checkpoint.reader import read_headers
from cospadi.checkpoint.safetensors_file import TensorInfo, read_tensor
from cospadi.errors import CheckpointError, CospadiError, InputError
from cospadi.model.discover import TargetLinear
from cospadi.model.files import check_tokenizer_files, check_weight_files
from cospadi.model.locate import Kind, one_line, resolve
from cospadi.model.source import (
    check_size,
    load_config,
    load_tokenizer,
    location_fingerprint,
    quiet_transformers,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CHUNK_BYTES = 8 << 20


class StreamingUnsupported(CospadiError):
    """The model cannot be read a block at a time; load it as a whole."""


@dataclass(eq=False)
class StreamedSource:
    """A dense model in files; otherwise as `cospadi.model.source.SourceModel`.

    Attributes
    ----------
    tensors : dict
        Where each of the model's tensors lies, by the model's names; tied ones once.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    name: str
    kind: Kind
    fingerprint: str
    path: Path
    tensors: dict[str, TensorInfo]
    notes: tuple[str, ...] = ()

    def weight(self, target: TargetLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight ``[d_out, d_in]`` float32 and bias of a target, read from the files."""
        weight = self.read(f"{target.name}.weight")
        if target.layer_type == "conv1d":
            weight = weight.T.contiguous()
        return weight, self.read(f"{target.name}.bias") if target.has_bias else None

    def read(self, name: str) -> torch.Tensor:
        """One tensor; floating-point numbers as float32."""
        info = self.tensors[name]
        if not info.dtype.is_floating_point:
            return read_tensor(info, name).clone()
        # memory of torch's own, also for float32: the bits of matrix products depend on the address
        values = torch.empty(info.shape, dtype=torch.float32)
        flat, done = values.view(-1), 0
        for part in _parts(info, name):
            flat[done : done + part.numel()] = part
            done += part.numel()
        return values

    def read_stored(self, name: str) -> torch.Tensor:
        """One tensor in the type of its file."""
        return read_tensor(self.tensors[name], name)

    @contextmanager
    def resident(self, prefix: str, *, without: str | None = None) -> Iterator[None]:
        """Give data to the parameters and stored buffers below a module while the context lasts.

        Parameters
        ----------
        prefix : str
            Module name; everything for an empty one.
        without : str, optional
            Module below it that gets none.
        """
        lent: list[tuple[nn.Module, str, nn.Parameter | torch.Tensor, bool]] = []
        start, skip = (f"{prefix}." if prefix else ""), (f"{without}." if without else None)
        real: dict[int, Any] = {}
        try:
            for name, module in list(self.model.named_modules()):
                below = f"{name}." if name else ""
                if not below.startswith(start) or (skip is not None and below.startswith(skip)):
                    continue
                for part, value in [*module._parameters.items(), *module._buffers.items()]:
                    is_parameter = part in module._parameters
                    if value is None or not value.is_meta:
                        continue
                    if id(value) not in real:
                        stored = self._stored_name(below + part, value)
                        if stored is None:
                            continue
                        data = self.read(stored)
                        real[id(value)] = nn.Parameter(data, False) if is_parameter else data
                    lent.append((module, part, value, is_parameter))
                    (module._parameters if is_parameter else module._buffers)[part] = real[
                        id(value)
                    ]
            yield
        finally:
            for module, part, value, is_parameter in lent:
                if is_parameter:
                    module._parameters[part] = value  # type: ignore[assignment]
                else:
                    module._buffers[part] = value

    def _stored_name(self, name: str, value: torch.Tensor) -> str | None:
        if name in self.tensors:
            return name
        for other, tensor in self.model.named_parameters():
            if tensor is value and other in self.tensors:
                return other
        return None


class _EmptyOnMeta(TorchFunctionMode):
    """Sends what `torch.empty` makes to the meta device."""

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") in (None, torch.device("cpu"), "cpu"):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def open_streamed(name_or_path: str | Path, *, revision: str | None = None) -> StreamedSource:
    """Open a dense model without loading it; parameters and errors as for `cospadi.model.source.open_source`.

    Raises
    ------
    StreamingUnsupported
        The weights are in another format than safetensors, or do not lie there as the model has them.

    Notes
    -----
    Every byte of the weights is read once, to hash it, and once to find numbers that are not finite; memory: some
    chunks of 8 MiB. A model that cannot run with its configuration shows at the first forward pass only.
    """
    location = resolve(name_or_path, gguf_file=None, revision=revision, with_weights=True)
    if location.gguf_file is not None:
        raise StreamingUnsupported(
            f"{location.name}: a GGUF file has to be dequantised as a whole; write it as a folder first "
            "('cospadi export MODEL --out FOLDER')"
        )
    counts = check_weight_files(location.folder)
    if counts is None:
        raise StreamingUnsupported(f"{location.name}: its weights are no safetensors files")
    check_tokenizer_files(location.folder)
    config = load_config(location, counts)
    check_size(config, counts, location.name)
    tokenizer = load_tokenizer(location)
    model = _empty_model(config, location.folder, location.name)
    try:
        stored = read_headers(location.folder)
    except CheckpointError as error:
        raise StreamingUnsupported(f"{location.name}: {error}") from None
    tensors, notes = _matched(model, stored, location.name)
    _check_finite(tensors, location.name)
    return StreamedSource(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        name=location.name,
        kind=location.kind,
        fingerprint=location_fingerprint(location),
        path=location.folder,
        tensors=tensors,
        notes=notes,
    )


def check_streamable(name_or_path: str | Path) -> None:
    """Check, by headers alone, that `open_streamed` will take a model.

    Raises
    ------
    StreamingUnsupported
        It will not; other errors as `open_streamed` raises them.
    """
    location = resolve(name_or_path, gguf_file=None, revision=None, with_weights=True)
    counts = None if location.gguf_file is not None else check_weight_files(location.folder)
    if counts is None:
        raise StreamingUnsupported(f"{location.name}: its weights are no safetensors files")
    config = load_config(location, counts)
    check_size(config, counts, location.name)
    model = _empty_model(config, location.folder, location.name)
    try:
        stored = read_headers(location.folder)
    except CheckpointError as error:
        raise StreamingUnsupported(f"{location.name}: {error}") from None
    _matched(model, stored, location.name)


def tied_names(model: nn.Module) -> set[str]:
    """Names of the state dict that are other names of an earlier tensor, and are not stored."""
    declared = getattr(model, "all_tied_weights_keys", None)
    by_object: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.numel():
            by_object.setdefault(id(tensor), []).append(name)
    names: set[str] = set()
    for group in by_object.values():
        if len(group) > 1:
            second = {n for n in group if declared and n in declared} or set(group[1:])
            names |= second if len(second) < len(group) else set(group[1:])
    return names


def _empty_model(config: PretrainedConfig, folder: Path, name: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        with quiet_transformers(), _EmptyOnMeta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise StreamingUnsupported(
            f"{name}: cannot be built without its weights: {one_line(error)}"
        ) from error
    if (folder / "generation_config.json").is_file():
        try:
            with quiet_transformers():
                model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise InputError(
                f"{folder / 'generation_config.json'}: cannot be read: {one_line(error)}"
            ) from error
    stored = model.state_dict(keep_vars=True)
    for buffer_name, buffer in model.named_buffers():
        if buffer.is_meta and buffer_name not in stored:
            raise StreamingUnsupported(
                f"{name}: the buffer {buffer_name} is neither stored nor computed when the model is built"
            )
    # norms are made by torch.ones: all parameters alike, so that what was not read shows
    for module in model.modules():
        for part, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[part] = nn.Parameter(parameter.to("meta"), False)
    model.tie_weights()
    model.config.architectures = [type(model).__name__]
    return model.eval().requires_grad_(False)


def _matched(
    model: nn.Module, stored: dict[str, TensorInfo], name: str
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Tensors by the model's names, and a note on those it has no place for."""
    wanted = model.state_dict(keep_vars=True)
    tied = tied_names(model)
    tensors: dict[str, TensorInfo] = {}
    architecture = type(model).__name__
    for key, tensor in wanted.items():
        info = stored.get(key)
        if info is None:
            if key in tied:
                continue
            raise StreamingUnsupported(
                f"{name}: the checkpoint has no tensor {key} of that name, which {architecture} needs"
            )
        if info.shape != tuple(tensor.shape):
            raise InputError(
                f"{name}: the tensor {key} is {list(info.shape)} in the checkpoint, config.json makes it "
                f"{list(tensor.shape)}"
            )
        if info.dtype.is_floating_point != tensor.is_floating_point():
            raise InputError(f"{name}: the tensor {key} is {info.dtype} in the checkpoint")
        if key not in tied:
            tensors[key] = info
    surplus = sorted(stored.keys() - wanted.keys())
    if not surplus:
        return tensors, ()
    count = f"{len(surplus)} tensor{'s' if len(surplus) > 1 else ''}"
    return tensors, (
        f"{name}: {count} of the checkpoint, first {surplus[0]}, not used: "
        f"{architecture} as config.json describes it has no place for them",
    )


def _parts(info: TensorInfo, name: str) -> Iterator[torch.Tensor]:
    """The values of a tensor, flat, some MiB at a time."""
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.offset)
            left = info.nbytes
            while left:
                data = bytearray(min(left, _CHUNK_BYTES))
                if stream.readinto(data) != len(data):
                    raise CheckpointError(f"{info.file}: {name} is truncated")
                left -= len(data)
                yield torch.frombuffer(data, dtype=info.dtype)
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: {name} cannot be read ({error.strerror or error})"
        ) from None


def _check_finite(tensors: dict[str, TensorInfo], name: str) -> None:
    for key, info in tensors.items():
        if info.nbytes == 0:
            raise InputError(f"{name}: the tensor {key} is empty (shape {info.shape})")
        if not info.dtype.is_floating_point:
            continue
        n_bad = 0
        for part in _parts(info, key):
            values = part.float() if info.dtype.itemsize == 1 else part
            low, high = torch.aminmax(values)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                n_bad += int((~torch.isfinite(values)).sum())
        if n_bad:
            raise InputError(
                f"{name}: the tensor {key} holds {n_bad} non-finite values (NaN or infinity) "
                f"of {info.nbytes // info.dtype.itemsize}: repair or download the checkpoint again"
            )
