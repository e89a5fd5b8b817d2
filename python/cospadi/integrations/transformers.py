"""The transformers adapter: a quantizer that builds and checks layers inside ``from_pretrained``.

transformers reads ``quantization_config`` in config.json, finds the classes registered here by
their method name, and calls the quantizer around the loading of the tensors. Nothing is downloaded
and no remote code is involved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from cospadi.checkpoint.format import QUANT_METHOD, CospadiConfigData
from cospadi.checkpoint.reader import check_tensors
from cospadi.checkpoint.safetensors_file import read_header
from cospadi.errors import CheckpointError, InputError
from cospadi.factor.spec import STORAGE_DTYPES, dtype_name
from cospadi.model.huge_pages import use_huge_pages
from cospadi.model.layers import (
    CospadiLinear,
    compressed_modules,
    convert_to_compressed,
    describe_modules,
    replace_modules,
)


class CospadiHfConfig(QuantizationConfigMixin):
    """``quantization_config`` as transformers holds it: a checked `CospadiConfigData`.

    Raises
    ------
    CheckpointError
        If the dict is not a valid config of a version that this code reads.
    """

    quant_method = QUANT_METHOD

    def __init__(self, **values: Any) -> None:  # noqa: ANN401
        self.data = CospadiConfigData.parse({"quant_method": QUANT_METHOD, **values})

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Build the config from a dict whose keys never become attributes or arguments."""
        config = cls.__new__(cls)
        config.data = CospadiConfigData.parse(config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON form that shares nothing with the config."""
        return copy.deepcopy(self.data.to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """Return all of it: transformers 5.0 prints differences from defaults, and there are none."""
        return self.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class CospadiHfQuantizer(HfQuantizer):
    """Loads, checks, saves and multiplies out compressed layers on behalf of transformers."""

    requires_calibration = True
    quantization_config: CospadiHfConfig

    def __init__(self, quantization_config: CospadiHfConfig, **kwargs: Any) -> None:  # noqa: ANN401
        if not kwargs.get("pre_quantized", True):
            raise InputError(
                "cospadi needs calibration text and cannot compress a dense model while loading "
                "it; run `cospadi compress MODEL --out DIR` and load DIR"
            )
        super().__init__(quantization_config, **kwargs)

    @property
    def data(self) -> CospadiConfigData:
        """The checked config."""
        return self.quantization_config.data

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Refuse off-loading to disk, which reads tensors behind the checks made here."""
        places = device_map.values() if isinstance(device_map, dict) else (device_map,)
        if "disk" in places:
            raise InputError(
                "cospadi models cannot be off-loaded to disk: use a device_map without 'disk' "
                "or more memory on the other devices"
            )

    def update_device_map(self, device_map: Any) -> Any:  # noqa: ANN401
        """Check the map; it is left as it is."""
        self.validate_environment(device_map=device_map)
        return device_map

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Accept the types that the kernels compute with."""
        if dtype not in STORAGE_DTYPES.values():
            raise InputError(
                f"dtype: cospadi models load as one of {', '.join(STORAGE_DTYPES)}, "
                f"got {dtype_name(dtype)}"
            )
        return dtype

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        if checkpoint_files is not None:
            _check_files([Path(file) for file in checkpoint_files], self.data)
        self.quantization_config.data = convert_to_compressed(model, self.data, dtype=dtype)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **kwargs: Any,  # noqa: ANN401
    ) -> PreTrainedModel:
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise InputError(
                "cospadi models cannot be split by tensor parallelism in transformers yet"
            )
        # Moving a model over several devices makes new tensor objects, which lose the loader's
        # mark.
        spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
        for name, layer in compressed_modules(model).items():
            if not spread:
                _check_loaded(layer, name)
            layer.freeze()
        if not spread:
            _check_rest_loaded(model)
        _cast_renamed(model, self._dtypes)
        for name, layer in compressed_modules(model).items():
            factor = layer.factor()
            if not any(tensor.is_meta for tensor in factor.tensors().values()):
                factor.validate(name, self.data.modules[name].leader)
        use_huge_pages(compressed_modules(model).values())
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Bring the config up to date with the tensors' types before both are saved."""
        now = describe_modules(model)
        self.quantization_config.data = replace(self.data, modules=now.modules)
        return None, {}

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Replace the compressed layers by the dense ones they stand for; all takes `dtype`."""
        target = model.dtype if dtype is None else dtype
        for name, layer in compressed_modules(model).items():
            replace_modules(model, {name: dense_module(layer, target)})
        return model.to(target)

    def is_serializable(self) -> bool:
        """Tell that ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that gradients go through the layers to adapters on them; the factors stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Tell that ``torch.compile`` takes the model in one graph."""
        return True


def dense_module(layer: CospadiLinear, dtype: torch.dtype) -> nn.Module:
    """Return the ``nn.Linear`` or (GPT-2) ``Conv1D`` that a compressed layer stands for.

    Parameters
    ----------
    layer : CospadiLinear
        The layer.
    dtype : torch.dtype
        Type of the weight, whose product is computed in float32.
    """
    factor = layer.factor()
    weight = factor.dense_weight(dtype)  # [d_out, d_in]
    bias = None if factor.bias is None else nn.Parameter(factor.bias.to(dtype))
    dense: Any
    with torch.device("meta"):
        if layer.layer_type == "conv1d":
            dense = Conv1D(layer.out_features, layer.in_features)
            weight = weight.t().contiguous()
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    dense.weight = nn.Parameter(weight)
    dense.bias = bias
    return cast("nn.Module", dense)


def register() -> None:
    """Make transformers know the method; calling it again changes nothing.

    Raises
    ------
    InputError
        If other code has registered a method of the same name.
    """
    for mapping, ours, decorator in (
        (AUTO_QUANTIZATION_CONFIG_MAPPING, CospadiHfConfig, register_quantization_config),
        (AUTO_QUANTIZER_MAPPING, CospadiHfQuantizer, register_quantizer),
    ):
        known = mapping.get(QUANT_METHOD)
        if known is None:
            decorator(QUANT_METHOD)(ours)
        elif known.__name__ != ours.__name__:
            raise InputError(f"transformers already has a method {QUANT_METHOD!r}: {known}")


def _check_files(files: list[Path], data: CospadiConfigData) -> None:
    """Check headers before loading: transformers accepts missing keys and any path."""
    for file in files:
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{file}: compressed checkpoints are safetensors files only")
        if file.parent != files[0].parent:
            raise CheckpointError(f"{file}: the index leads out of {files[0].parent}")
    tensors = {name: info for file in files for name, info in read_header(file).items()}
    check_tensors(data, tensors)


def _cast_renamed(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give parameters the type that was asked for, where the loader has kept the stored one.

    transformers 5.19 and older do so for tensors whose names they change (experts, models without
    their head). What is float32 stays: it may be meant to be.
    """
    for name, parameter in model.named_parameters():
        expected = dtypes.get(name, parameter.dtype)
        if parameter.dtype not in (expected, torch.float32) and not parameter.is_meta:
            parameter.data = parameter.data.to(expected)


def _check_loaded(layer: CospadiLinear, name: str) -> None:
    """Check that the loader has filled every tensor; it marks those that it fills."""
    tensors = {**layer._parameters, **layer._buffers}
    for part, tensor in tensors.items():
        if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
            raise CheckpointError(
                f"{name}.{part}: missing from the weights, refusing random values"
            )


def _check_rest_loaded(model: PreTrainedModel) -> None:
    """Check that embeddings, norms and whatever else is not compressed were filled as well.

    transformers alone initialises and warns. Another architecture than the stored one may have a new part, such as
    the head of a classifier.
    """
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or ()):
        return
    for prefix, module in model.named_modules():
        persistent = {
            name: buffer
            for name, buffer in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        for part, tensor in {**module._parameters, **persistent}.items():
            if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
                name = f"{prefix}.{part}" if prefix else part
                raise CheckpointError(
                    f"{name}: missing from the weights or of another shape, refusing random values"
                )
