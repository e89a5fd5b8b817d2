"""The PEFT adapter: LoRA beside compressed layers, to win back ("heal") what compression cost.

PEFT makes adapters for layers that it knows. `lora_config` registers ours with a ``LoraConfig``; the rest is PEFT's:
``get_peft_model``, training, ``save_pretrained``. Dictionaries and codes stay as they are, so a healed model is the
compressed checkpoint and a small adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi.errors import InputError, install_command
from cospadi.model.layers import CospadiLinear

try:
    from peft import LoraConfig, PeftModel
    from peft.tuners.lora import Linear as LoraLinear
except ImportError as error:
    raise ImportError(f"cospadi.integrations.peft needs PEFT: {install_command('peft')}") from error

_NEEDS_WEIGHT = (
    "use_dora",
    "use_bdlora",
    "arrow_config",
    "loftq_config",
    "corda_config",
    "eva_config",
)
"""Settings of a ``LoraConfig`` that read or change the dense weight, which our layers do not have."""


class LoraCospadiLinear(LoraLinear):
    """A compressed layer with low-rank adapters: ``y = z S + bias + scaling B (A x)``.

    PEFT builds it. The adapters have the type of the activations of the layer.

    Raises
    ------
    InputError
        If the config asks for something that needs the dense weight.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        for setting in _NEEDS_WEIGHT:
            if getattr(config, setting, None):
                raise InputError(
                    f"LoraConfig.{setting}: needs dense weights, which compressed layers do not have; "
                    "leave it out"
                )
        if config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            raise InputError(
                "LoraConfig.init_lora_weights: expected True, False, 'gaussian' or 'orthogonal' beside "
                f"compressed layers, which have no dense weight, got {config.init_lora_weights!r}"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        # PEFT's own warns of layers that it does not know.
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the sum of a sparse code and a low-rank matrix is no sparse code.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError(
            "LoRA weights cannot be merged into a compressed layer: serve the adapter beside the model, "
            "or load it on the dense model that `cospadi export --dense` writes and merge it there"
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell that there is no dense weight to convert from."""
        return False


def lora_config(**settings: Any) -> LoraConfig:  # noqa: ANN401
    """Return a ``LoraConfig`` that also makes adapters for compressed layers.

    Parameters
    ----------
    **settings
        As for ``peft.LoraConfig``. Name the projections in `target_modules`, for example ``["q_proj",
        "v_proj"]`` or a regular expression: "all-linear" means dense layers only.

    Notes
    -----
    The registration is PEFT's interface for layer types that it does not know; it is not written with
    the adapter, so a saved one is loaded by `load_adapter`.
    """
    return _registered(LoraConfig(**settings))


def load_adapter(model: nn.Module, path: str | Path, **options: Any) -> PeftModel:  # noqa: ANN401
    """Put a saved adapter on a compressed model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model, from `cospadi.load` or ``from_pretrained``.
    path : str or Path
        Folder that ``save_pretrained`` of a PEFT model has written.
    **options
        As for ``peft.PeftModel.from_pretrained``, for example ``is_trainable=True``.
    """
    config = _registered(LoraConfig.from_pretrained(str(path)))
    return PeftModel.from_pretrained(model, str(path), config=config, **options)


def trainable_parameters(model: nn.Module) -> list[torch.nn.Parameter]:
    """Return what an optimizer should get: the adapters' parameters, and none of the factors'."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _registered(config: LoraConfig) -> LoraConfig:
    config._register_custom_module({CospadiLinear: LoraCospadiLinear})
    return config
