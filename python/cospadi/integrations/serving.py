"""What the adapters to serving engines share: a linear method without the engine.

vLLM and SGLang build their own layers, several projections of a checkpoint in one (q, k and v; gate and up), hand every
tensor of the files to the ``weight_loader`` of a parameter, and call a *linear method* for the product. This module
needs torch alone, so its rules can be tested where no engine is installed. `cospadi.integrations.sharding` says which
outputs a rank holds.

Pipeline parallelism: a stage that has a member of a shared dictionary, but not its leader, never sees the leader's
tensors. They are read from the checkpoint's files, and the first member leads the others of that stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi.checkpoint.format import SENTINEL, CospadiConfigData
from cospadi.checkpoint.reader import read_checkpoint
from cospadi.errors import CheckpointError, InputError
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import STORAGE_DTYPES, dtype_name
from cospadi.integrations.served_layer import LayerPlan, Member, ServedLinear
from cospadi.integrations.sharding import Parallel
from cospadi.model.layers import CospadiLinear

PACKED_MODULES: dict[str, list[str]] = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Fused layers of engines and what they hold in a checkpoint, for models that do not say it themselves."""


class ServedModel:
    """The compressed layers of one model in one process, and the dictionaries that they share.

    Parameters
    ----------
    data : CospadiConfigData
        The checked ``quantization_config``.
    """

    def __init__(self, data: CospadiConfigData) -> None:
        self.data = data
        self._folder: Path | None = None
        self._stored_names = {name: name for name in data.modules}
        self._members: dict[str, Member] = {}
        self._layers: dict[str, CospadiLinear] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Engines copy and pickle their configs; layers belong to one model in one process.
        return {**self.__dict__, "_members": {}, "_layers": {}}

    def open(self, folder: str | Path) -> None:
        """Check the structure of the checkpoint before anything is loaded from it, and keep its place.

        Raises
        ------
        CheckpointError
            As `cospadi.checkpoint.reader.read_checkpoint`.
        """
        self.data = read_checkpoint(folder).data
        self._folder = Path(folder)
        self._stored_names = {name: name for name in self.data.modules}

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Follow an engine that names modules differently from the checkpoint.

        Parameters
        ----------
        new_name : callable
            Returns the engine's name of a module, or None for one that it does not build.
        """
        names = {name: new_name(name) or name for name in self.data.modules}
        entries = {
            names[name]: replace(entry, leader=entry.leader and names[entry.leader])
            for name, entry in self.data.modules.items()
        }
        self._stored_names = {names[name]: stored for name, stored in self._stored_names.items()}
        self.data = replace(self.data, modules=entries)

    def projections(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
        """Return the projections of the checkpoint that the engine's layer `prefix` holds, in its order.

        Parameters
        ----------
        prefix : str
            Name of the layer.
        packed : mapping of str to sequence of str
            The engine's table of fused layers, by the last part of their names; may be empty.
        """
        if prefix in self.data.modules:
            return [prefix]
        parent, dot, last = prefix.rpartition(".")
        return [f"{parent}{dot}{name}" for name in (packed or PACKED_MODULES).get(last, [last])]

    def is_compressed(self, prefix: str, packed: Mapping[str, Sequence[str]]) -> bool:
        """Tell whether any projection of the engine's layer `prefix` is compressed."""
        return any(name in self.data.modules for name in self.projections(prefix, packed))

    def attach(self, layer: nn.Module, plan: LayerPlan) -> None:
        """Let the engine's loader fill a layer; see `LayerPlan.attach`.

        Raises
        ------
        InputError
            If the kernels do not compute in the type of the activations.
        """
        if plan.dtype not in STORAGE_DTYPES.values():
            raise InputError(
                f"{plan.members[0].name}: cospadi layers compute in {', '.join(STORAGE_DTYPES)}, "
                f"got {dtype_name(plan.dtype)}"
            )
        self._members |= {member.name: member for member in plan.members}
        plan.attach(layer)

    def finish(self, layer: nn.Module, plan: LayerPlan) -> ServedLinear:
        """Check all that a layer has received and build its products, once everything is loaded.

        Raises
        ------
        CheckpointError
            If a tensor is missing or holds a wrong mask or a wrong value, or the engine's layer has a
            bias that the checkpoint does not have, or the other way round.
        """
        for member in plan.members:
            member.check_bias(getattr(layer, "bias", None))
        parts = [self._built(member, plan.dtype) for member in plan.members]
        plan.detach(layer)
        return ServedLinear(parts, plan.share, plan.d_out, plan.parallel.gather)

    def _built(self, member: Member, dtype: torch.dtype) -> nn.Module:
        if member.name in self._layers:  # built already, for a member that it leads
            return self._layers[member.name]
        member.check_complete()
        if member.entry is None:
            return _dense(member.tensors.pop(SENTINEL).to(dtype))
        spec, leader_name = member.spec(), member.entry.leader
        leader = None if leader_name is None else self._leader(leader_name, dtype)
        tensors = dict(member.tensors)
        if leader is not None:
            owned = leader.factor().tensors()
            tensors |= {part: owned[part] for part in spec.dictionary_tensors()}
        elif leader_name is not None:
            tensors |= self._dictionary_from_files(member, leader_name)
            spec = replace(spec, owns_dictionary=True)
        factor = SparseFactor.from_tensors(spec, tensors)
        factor.validate(member.name, leader_name)
        layer = CospadiLinear.from_factor(factor, dtype=dtype, leader=leader)
        layer.freeze()
        member.tensors.clear()
        self._layers[member.name] = layer
        if leader_name is not None and leader is None:
            self._layers[leader_name] = layer
        return layer

    def _leader(self, name: str, dtype: torch.dtype) -> CospadiLinear | None:
        """Return the layer that leads in this process, or None where it is on another stage."""
        if name in self._members and name not in self._layers:
            self._built(self._members[name], dtype)
        return self._layers.get(name)

    def _dictionary_from_files(self, member: Member, leader: str) -> dict[str, torch.Tensor]:
        if self._folder is None:
            raise CheckpointError(
                f"{member.name}: its dictionary belongs to {leader}, which is on another pipeline "
                "stage, and the model is no local folder to read it from; download it and serve the "
                "folder"
            )
        checkpoint, stored = read_checkpoint(self._folder), self._stored_names[leader]
        device = member.tensors["coeffs"].device
        return {
            part: checkpoint.tensor(f"{stored}.{part}").to(device)
            for part in member.spec().dictionary_tensors()
        }


def _dense(weight: torch.Tensor) -> nn.Linear:
    """Return a layer around a weight [d_out, d_in]."""
    d_out, d_in = weight.shape
    layer = nn.Linear(d_in, d_out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class ServedMethod:
    """The linear method; those of the engines derive from it and from the engine's base class.

    Parameters
    ----------
    model : ServedModel
        The model.
    names : sequence of str
        Projections of the layer, from `ServedModel.projections`.
    """

    def __init__(self, model: ServedModel, names: Sequence[str]) -> None:
        self.model = model
        self.names = list(names)
        self.plan: LayerPlan | None = None

    def parallel(self, layer: nn.Module) -> Parallel:
        """Return the tensor-parallel group of a layer; the engines say how."""
        return Parallel()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,  # noqa: ANN401
    ) -> None:
        """Plan the layer and register the parameters that the engine's loader fills.

        Raises
        ------
        InputError, CheckpointError
            As `LayerPlan.make` and `ServedModel.attach`.
        """
        self.plan = LayerPlan.make(
            self.model.data,
            self.names,
            input_size=input_size,
            input_size_per_partition=input_size_per_partition,
            output_partition_sizes=output_partition_sizes,
            dtype=params_dtype,
            parallel=self.parallel(layer),
        )
        self.model.attach(layer, self.plan)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was loaded and put the products in place; see `ServedModel.finish`."""
        assert self.plan is not None
        layer.cospadi = self.model.finish(layer, self.plan)
        self.plan = None

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the outputs of this rank for `x` [..., d_in], with the bias that the engine hands in."""
        served: Any = layer.cospadi
        y: torch.Tensor = served(x)
        return y if bias is None else y + bias
