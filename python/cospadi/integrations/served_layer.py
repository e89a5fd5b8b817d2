"""One layer of a serving engine: the projections of the checkpoint that it holds, their loading, their products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from cospadi.checkpoint.format import SENTINEL, CospadiConfigData, ModuleEntry
from cospadi.errors import CheckpointError, InputError
from cospadi.factor.spec import FactorSpec, TensorSpec, dtype_name
from cospadi.integrations.sharding import Parallel, column_rows, fused_rows, share_of_outputs

_BY_OUTPUT = ("mask", "coeffs", "coeffs_scale")
"""Tensors with one row per output; dictionaries belong to all of them."""

_QKV = {"q": 0, "k": 1, "v": 2}


@dataclass
class Member:
    """One projection of a checkpoint inside a layer of the engine, while its tensors arrive.

    Parameters
    ----------
    name : str
        Its name, as the engine spells it.
    entry : ModuleEntry or None
        How it is compressed; None where it stayed dense.
    d_in : int
        Inputs.
    n_rows : int
        Outputs on this rank.
    rows : list of range
        Which outputs; empty for a dense projection, whose size is only known when its weight comes.
    tensors : dict of str to torch.Tensor
        What has come so far, cut to the rows.
    """

    name: str
    entry: ModuleEntry | None
    d_in: int
    n_rows: int
    rows: list[range]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def expected(self) -> dict[str, TensorSpec]:
        """Return what the files hold, by the last part of the name; the bias is left to the engine."""
        if self.entry is None:
            return {}
        return {part: spec for part, spec in self.entry.tensors().items() if part != "bias"}

    def spec(self) -> FactorSpec:
        """Shapes and types of a compressed projection on this rank, without its bias."""
        assert self.entry is not None
        return replace(self.entry.spec, d_out=self.n_rows, bias=False)

    def receive(self, part: str, tensor: torch.Tensor, parallel: Parallel) -> torch.Tensor:
        """Check one whole tensor of the files and return a copy of the rows of this rank.

        Raises
        ------
        CheckpointError
            If it is not part of the projection, has another shape or type, or has come before.
        InputError
            If the outputs of a dense projection cannot be divided among the ranks.
        """
        name = f"{self.name}.{part}"
        if part in self.tensors:
            raise CheckpointError(f"{name}: there are two tensors of this name")
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        if self.entry is None:
            if part != SENTINEL or len(shape) != 2 or shape[1] != self.d_in:
                raise CheckpointError(
                    f"{name}: {dtype} {list(shape)} is not the weight of a dense layer with "
                    f"{self.d_in} inputs, and config.json does not say that it is compressed"
                )
            rows = [column_rows(shape[0], self.n_rows, parallel, self.name)]
            return _take_rows(tensor, rows)
        spec = self.expected().get(part)
        if spec is None:
            raise CheckpointError(f"{name}: not part of the module as config.json describes it")
        if dtype not in spec.dtypes or shape != spec.shape:
            raise CheckpointError(
                f"{name}: expected {' or '.join(spec.dtypes)} {list(spec.shape)}, "
                f"got {dtype} {list(shape)}"
            )
        return _take_rows(tensor, self.rows) if part in _BY_OUTPUT else tensor.clone()

    def check_complete(self) -> None:
        """Check that every tensor has come.

        Raises
        ------
        CheckpointError
            Naming the first that has not.
        """
        for part in self.expected() if self.entry is not None else (SENTINEL,):
            if part not in self.tensors:
                raise CheckpointError(
                    f"{self.name}.{part}: missing from the weights, refusing random values"
                )

    def check_bias(self, bias: torch.Tensor | None) -> None:
        """Check that the engine's layer and the checkpoint agree about a bias.

        Raises
        ------
        CheckpointError
            If they do not, or the bias holds a value that is not finite.
        """
        if self.entry is not None and self.entry.spec.bias != (bias is not None):
            raise CheckpointError(
                f"{self.name}: config.json says bias = {self.entry.spec.bias}, "
                f"the model {'has none' if bias is None else 'has one'}"
            )
        if bias is not None and not bool(torch.isfinite(bias).all()):
            raise CheckpointError(f"{self.name}.bias: missing, or holds a value that is not finite")


def _take_rows(tensor: torch.Tensor, rows: list[range]) -> torch.Tensor:
    """Copy ranges of rows, so that the mapping or the buffer of the file can go."""
    return torch.cat([tensor[part.start : part.stop] for part in rows])


@dataclass(frozen=True)
class LayerPlan:
    """What one layer of the engine holds on this rank.

    Parameters
    ----------
    members : tuple of Member
        Its projections, in the order of its outputs.
    dtype : torch.dtype
        Type of the activations.
    parallel : Parallel
        Its group.
    share : range or None
        For a row-parallel layer on several ranks: the outputs that this one computes.
    d_out : int
        Outputs of a row-parallel layer.
    """

    members: tuple[Member, ...]
    dtype: torch.dtype
    parallel: Parallel
    share: range | None = None
    d_out: int = 0

    @classmethod
    def make(
        cls,
        data: CospadiConfigData,
        names: Sequence[str],
        *,
        input_size: int,
        input_size_per_partition: int,
        output_partition_sizes: Sequence[int],
        dtype: torch.dtype,
        parallel: Parallel,
    ) -> LayerPlan:
        """Plan a layer from what the engine says of it.

        Parameters
        ----------
        data : CospadiConfigData
            The checked ``quantization_config``.
        names : sequence of str
            Projections of the layer: one for every partition, or one for all of them.
        input_size, input_size_per_partition : int
            Inputs of the layer and of this rank; they differ for a row-parallel layer.
        output_partition_sizes : sequence of int
            Outputs of every partition on this rank.
        dtype, parallel
            As for the class.

        Raises
        ------
        CheckpointError
            If config.json tells of other sizes than the engine's layer has.
        InputError
            If the outputs cannot be divided among the ranks.
        """
        if len(names) not in (1, len(output_partition_sizes)):
            raise InputError(
                f"{', '.join(names)}: expected one projection for each of the "
                f"{len(output_partition_sizes)} partitions of a layer, or one for all"
            )
        is_split = input_size_per_partition != input_size
        members, share, d_out = [], None, 0
        for index, name in enumerate(names):
            entry = data.modules.get(name)
            sizes = output_partition_sizes if len(names) == 1 else [output_partition_sizes[index]]
            rows: list[range] = []
            if entry is not None:
                d_out = entry.spec.d_out
                if entry.spec.d_in != input_size or (is_split and d_out != sum(sizes)):
                    raise CheckpointError(
                        f"{name}: config.json tells of {entry.spec.d_in} inputs and {d_out} outputs, "
                        f"the model has {input_size} and {sum(sizes)}"
                    )
                if is_split:
                    share = share_of_outputs(d_out, parallel, name)
                    rows = [share]
                else:
                    rows = fused_rows(d_out, sizes, parallel, name)
            n_rows = sum(map(len, rows)) if rows else sum(sizes)
            members.append(Member(name, entry, input_size, n_rows, rows))
        return cls(tuple(members), dtype, parallel, share, d_out)

    def attach(self, layer: nn.Module) -> None:
        """Give the engine's layer the parameters that its loader fills.

        They are empty; their ``weight_loader(parameter, tensor, shard_id=None)`` checks what comes,
        and keeps the rows of this rank in the member that the shard id means.
        """
        dtypes = {SENTINEL: self.dtype}
        for member in self.members:
            for part, spec in member.expected().items():
                dtypes.setdefault(part, getattr(torch, spec.dtypes[0]))
        for part, dtype in dtypes.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            loader = partial(self.load, part)
            setattr(parameter, "weight_loader", loader)  # noqa: B010 (mypy knows no such field)
            layer.register_parameter(part, parameter)

    def load(
        self,
        part: str,
        parameter: nn.Parameter,
        tensor: torch.Tensor,
        shard_id: str | int | None = None,
    ) -> None:
        """Take one tensor of the files.

        Parameters
        ----------
        part : str
            Last part of its name.
        parameter : torch.nn.Parameter
            The layer's parameter of that name, which tells the device.
        tensor : torch.Tensor
            The whole tensor.
        shard_id : str or int or None
            Which member: "q", "k", "v" or a number; None where there is only one.

        Raises
        ------
        CheckpointError
            As `Member.receive`.
        InputError
            If the shard id means no member.
        """
        index = _QKV.get(shard_id) if isinstance(shard_id, str) else shard_id
        if shard_id is None and len(self.members) == 1:
            index = 0
        if not isinstance(index, int) or not 0 <= index < len(self.members):
            names = ", ".join(member.name for member in self.members)
            raise InputError(f"{part}: shard {shard_id!r} is none of {names}")
        member = self.members[index]
        rows = member.receive(part, tensor, self.parallel)
        member.tensors[part] = rows.to(parameter.device)

    def detach(self, layer: nn.Module) -> None:
        """Take the empty parameters away again, except ``weight``, which engines look at."""
        dtypes = {part for member in self.members for part in member.expected()}
        for part in dtypes - {SENTINEL}:
            delattr(layer, part)


class ServedLinear(nn.Module):
    """The products of one layer of the engine on one rank.

    Parameters
    ----------
    parts : sequence of torch.nn.Module
        A `CospadiLinear` or ``nn.Linear`` without bias for every projection, whose outputs are put
        side by side.
    share, d_out
        As in `LayerPlan`.
    gather : callable or None
        As in `Parallel`, for a `share`.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        share: range | None = None,
        d_out: int = 0,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        if share is not None and gather is None:
            raise InputError("gather: expected a function for a row-parallel layer, got None")
        self.parts = nn.ModuleList(parts)
        self.padding = None if share is None else (share.start, d_out - share.stop)
        self.gather = gather

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs [..., n] of this rank; of a row-parallel layer [..., d_out], to be summed."""
        if self.padding is not None and self.gather is not None:
            return F.pad(self.parts[0](self.gather(x)), self.padding)
        if len(self.parts) == 1:
            result: torch.Tensor = self.parts[0](x)
            return result
        return torch.cat([part(x) for part in self.parts], dim=-1)
