"""The SGLang plugin, on the same core as vLLM's: SGLang loads it through the entry point ``sglang.srt.plugins``.

Written from the source of SGLang 0.5.23 and tested with stand-ins for the few names that it imports; it has not run in
SGLang itself.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.choices import add_quantization_method_choices
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers import quantization
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from torch import nn

from cospadi.checkpoint.format import QUANT_METHOD, CospadiConfigData
from cospadi.errors import InputError
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.integrations.serving import ServedMethod, ServedModel
from cospadi.integrations.sharding import Parallel

_ADDED_KEYS = ("packed_modules_mapping", "hf_config", "requantization_method")
"""What SGLang puts into the ``quantization_config`` that it hands over; no part of the checkpoint."""


class CospadiLinearMethod(ServedMethod, LinearMethodBase):
    """Loading and products of one SGLang layer; see `ServedMethod`."""

    def parallel(self, layer: nn.Module) -> Parallel:
        """Return the group that the layer is divided over."""
        group: Any = getattr(layer, "tp_group", None)
        rank, size = get_group_rank_size(group)
        return Parallel(rank, size, None if group is None else partial(_gather, group))


def _gather(group: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    result: torch.Tensor = group.all_gather(x, -1)
    return result


class CospadiSglangConfig(QuantizationConfig):
    """``quantization_config`` as SGLang holds it.

    Parameters
    ----------
    data : CospadiConfigData
        The checked config.
    """

    def __init__(self, data: CospadiConfigData) -> None:
        super().__init__()
        self.model = ServedModel(data)

    def get_name(self) -> str:
        """Return the name of the method in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the types that the kernels compute in."""
        return list(STORAGE_DTYPES.values())

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest GPU generation (7.5); only asked where there is a GPU."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: everything is in config.json."""
        return []

    def get_scaled_act_names(self) -> list[str]:
        """Return no activation functions that need scales."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CospadiSglangConfig:
        """Check the ``quantization_config`` of a model, and the files' headers if it is a local folder.

        Raises
        ------
        CheckpointError
            If it is not a valid config of a version that this code reads, or tensors of compressed
            modules are missing, too many, or of another type or shape.
        """
        stored = {key: value for key, value in config.items() if key not in _ADDED_KEYS}
        result = cls(CospadiConfigData.parse(stored))
        result.packed_modules_mapping = dict(config.get("packed_modules_mapping") or {})
        folder = getattr(config.get("hf_config"), "name_or_path", "")
        if folder and Path(folder).is_dir():
            result.model.open(folder)
        return result

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:  # noqa: ANN401
        """Rename the modules as SGLang names them for this model."""
        self.model.rename(lambda name: next(iter(hf_to_sglang_mapper.apply_list([name])), None))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:  # noqa: ANN401
        """Return the method of a layer: ours, SGLang's own for a dense linear layer, None for others.

        Raises
        ------
        InputError
            If the checkpoint compresses something that is no linear layer in SGLang.
        """
        packed = self.packed_modules_mapping
        is_compressed = self.model.is_compressed(prefix, packed)
        if isinstance(layer, LinearBase):
            if is_compressed:
                return CospadiLinearMethod(self.model, self.model.projections(prefix, packed))
            return UnquantizedLinearMethod()
        if is_compressed:
            raise InputError(
                f"{prefix}: compressed, but a {type(layer).__name__} in SGLang, which takes only dense "
                "weights here; compress the model with this module ignored (--ignore)"
            )
        return None


def register() -> None:
    """Make SGLang know the method; calling it again changes nothing."""
    for table in (quantization.QUANTIZATION_METHODS, quantization.CPU_QUANTIZATION_METHODS):
        table[QUANT_METHOD] = CospadiSglangConfig
    if QUANT_METHOD not in getattr(add_quantization_method_choices, "__self__", ()):
        add_quantization_method_choices([QUANT_METHOD])
