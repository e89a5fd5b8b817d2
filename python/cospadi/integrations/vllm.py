"""The vLLM plugin: vLLM loads it through the entry point ``vllm.general_plugins`` in every process.

``config.json`` names the method, so ``vllm serve DIR`` needs no flag. Linear layers of which at least one projection is
compressed compute from the compressed form; embeddings, output head and all other layers are vLLM's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from cospadi.checkpoint.format import QUANT_METHOD, CospadiConfigData
from cospadi.errors import InputError
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.integrations.serving import ServedMethod, ServedModel
from cospadi.integrations.sharding import Parallel


class CospadiLinearMethod(ServedMethod, LinearMethodBase):
    """Loading and products of one vLLM layer; see `ServedMethod`."""

    def parallel(self, layer: nn.Module) -> Parallel:
        """Return the layer's group; layers that are not divided say so themselves."""
        rank = getattr(layer, "tp_rank", None)
        size = getattr(layer, "tp_size", None)
        return Parallel(
            get_tensor_model_parallel_rank() if rank is None else rank,
            get_tensor_model_parallel_world_size() if size is None else size,
            tensor_model_parallel_all_gather,
        )


class CospadiVllmConfig(QuantizationConfig):
    """``quantization_config`` as vLLM holds it.

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

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CospadiVllmConfig:
        """Check the ``quantization_config`` of a model.

        Raises
        ------
        CheckpointError
            If it is not a valid config of a version that this code reads.
        """
        return cls(CospadiConfigData.parse(config))

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: Any = None,  # noqa: ANN401
        revision: str | None = None,
    ) -> None:
        """Check the headers of the checkpoint's files, where it is a local folder.

        Raises
        ------
        CheckpointError
            If tensors of compressed modules are missing, too many, or of another type or shape.
        """
        if Path(model_name).is_dir():
            self.model.open(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:  # noqa: ANN401
        """Rename the modules as vLLM names them for this model."""
        self.model.rename(lambda name: next(iter(hf_to_vllm_mapper.apply_list([name])), None))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:  # noqa: ANN401
        """Return the method of a layer: ours, vLLM's own for a dense linear layer, None for others.

        Raises
        ------
        InputError
            If the checkpoint compresses something that is no linear layer in vLLM.
        """
        packed = self.packed_modules_mapping
        is_compressed = self.model.is_compressed(prefix, packed)
        if isinstance(layer, LinearBase):
            if is_compressed:
                return CospadiLinearMethod(self.model, self.model.projections(prefix, packed))
            return UnquantizedLinearMethod()
        if is_compressed:
            raise InputError(
                f"{prefix}: compressed, but a {type(layer).__name__} in vLLM, which takes only dense "
                "weights here; compress the model with this module ignored (--ignore)"
            )
        return None


def register() -> None:
    """Make vLLM know the method; calling it again changes nothing."""
    register_quantization_config(QUANT_METHOD)(CospadiVllmConfig)
