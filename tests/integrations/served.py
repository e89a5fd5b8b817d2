"""A serving engine in miniature: its layers, its loader and its ranks, without the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cospadi.checkpoint.reader import CompressedCheckpoint
from cospadi.integrations.serving import PACKED_MODULES, ServedMethod, ServedModel
from cospadi.integrations.sharding import Parallel

FUSED = {
    source: (fused, shard)
    for fused, sources in PACKED_MODULES.items()
    for shard, source in zip(
        ("q", "k", "v") if fused == "qkv_proj" else (0, 1), sources, strict=False
    )
}
"""Fused layer and shard id of a projection, as engines have them."""


class EngineLayer(nn.Module):
    """A linear layer of an engine on one rank of a simulated group."""

    def __init__(
        self,
        method: ServedMethod,
        d_in: int,
        outputs: Sequence[int],
        *,
        is_row_parallel: bool = False,
        bias: bool = False,
        rank: int = 0,
        size: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.group = Parallel(rank, size, gather=lambda x: self.all_inputs)
        self.method, self.is_row_parallel = method, is_row_parallel
        method.parallel = lambda layer: layer.group
        sizes = list(outputs) if is_row_parallel else [max(1, n // size) for n in outputs]
        method.create_weights(
            self, d_in // size if is_row_parallel else d_in, sizes, d_in, sum(outputs), dtype
        )
        self.bias = nn.Parameter(torch.zeros(sum(sizes), dtype=dtype)) if bias else None

    def load(self, part: str, tensor: torch.Tensor, shard_id: str | int | None = None) -> None:
        """Do what an engine's loader does with one tensor of the files."""
        parameter = getattr(self, part)
        arguments = () if shard_id is None else (shard_id,)
        parameter.weight_loader(parameter, tensor, *arguments)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute this rank's outputs; a row-parallel layer takes its slice of `x` itself."""
        self.all_inputs = x  # what gathering the slices of all ranks would give
        if self.is_row_parallel:
            width = x.shape[-1] // self.group.size
            x = x[..., self.group.rank * width : (self.group.rank + 1) * width]
        return self.method.apply(self, x, self.bias)


@dataclass
class Engine:
    """One process of a group that serves a checkpoint: its layers by their names in the engine."""

    checkpoint: CompressedCheckpoint
    model: ServedModel
    layers: dict[str, EngineLayer]

    @classmethod
    def build(
        cls,
        checkpoint: CompressedCheckpoint,
        *,
        rank: int = 0,
        size: int = 1,
        keep: Callable[[str], bool] = lambda name: True,
        dense: Sequence[str] = (),
    ) -> Engine:
        """Build the layers of a Llama-like checkpoint.

        Parameters
        ----------
        checkpoint : CompressedCheckpoint
            The checkpoint.
        rank, size : int
            Place in the tensor-parallel group.
        keep : callable
            Which layers this process has, by name; others are on another pipeline stage.
        dense : sequence of str
            Projections that are to count as dense.
        """
        data = checkpoint.data
        for name in dense:
            del data.modules[name]
        model = ServedModel(data)
        entries = read_entries(checkpoint)
        groups: dict[str, list[str]] = {}
        for name in entries:
            parent, _, last = name.rpartition(".")
            groups.setdefault(f"{parent}.{FUSED.get(last, (last, None))[0]}", []).append(name)
        layers = {}
        for prefix in filter(keep, groups):
            names = model.projections(prefix, {})
            layers[prefix] = EngineLayer(
                ServedMethod(model, names),
                entries[names[0]].d_in,
                [entries[name].d_out for name in names],
                is_row_parallel=prefix.endswith(("o_proj", "down_proj")),
                bias=entries[names[0]].bias,
                rank=rank,
                size=size,
            )
        return cls(checkpoint, model, layers)

    def load(self) -> Engine:
        """Hand over every tensor of the files, and finish all layers."""
        for name in self.checkpoint.tensors:
            module, _, part = name.rpartition(".")
            parent, _, last = module.rpartition(".")
            fused, shard_id = FUSED.get(last, (last, None))
            layer = self.layers.get(f"{parent}.{fused}")
            if layer is not None and part != "bias":
                layer.load(part, self.checkpoint.tensor(name), shard_id)
        for layer in self.layers.values():
            layer.method.process_weights_after_loading(layer)
        return self


def read_entries(checkpoint: CompressedCheckpoint):
    """Return the specs of the compressed modules by name, from the files' own config."""
    from cospadi.checkpoint.reader import read_checkpoint

    return {
        name: entry.spec for name, entry in read_checkpoint(checkpoint.path).data.modules.items()
    }
