"""Which outputs of a projection a rank of a tensor-parallel group holds.

Dictionaries are on every rank, outputs are divided. A column-parallel layer takes the rows of code that belong to its
outputs. A row-parallel layer, which receives a slice of the inputs on every rank, gathers the inputs and computes a
share of the outputs, with zeros in the place of the others, so that the engine's sum over ranks puts them together.
Dividing the code by inputs instead would give the outputs of a rank different numbers of coefficients where inputs are
atoms, which neither format nor kernels know. Either way every output is computed on one rank, from all inputs, as in
one process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cospadi.errors import InputError


@dataclass(frozen=True)
class Parallel:
    """The tensor-parallel group that a layer belongs to.

    Parameters
    ----------
    rank, size : int
        This process and the number of processes.
    gather : callable or None
        Takes the last-dimension slice that this rank holds, [..., n], and returns those of all ranks
        side by side, [..., size n]. Only called with `size` above 1.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None


def column_rows(d_out: int, n_rows: int, parallel: Parallel, name: str) -> range:
    """Return the outputs of a column-parallel projection that a rank holds.

    Parameters
    ----------
    d_out : int
        Outputs of the projection in the checkpoint.
    n_rows : int
        Outputs that the engine expects on a rank. Where ``d_out / n_rows`` is below the number of
        ranks, several neighbouring ranks hold the same ones (few key and value heads).
    parallel : Parallel
        The group.
    name : str
        Module name, for the message.

    Raises
    ------
    InputError
        If the outputs cannot be divided that way.
    """
    n_parts, rest = divmod(d_out, n_rows)
    if rest or not n_parts or parallel.size % n_parts:
        raise InputError(
            f"{name}: {d_out} outputs cannot be divided into parts of {n_rows} for "
            f"{parallel.size} ranks; choose another tensor-parallel size"
        )
    first = parallel.rank * n_parts // parallel.size * n_rows
    return range(first, first + n_rows)


def fused_rows(
    d_out: int, partition_sizes: Sequence[int], parallel: Parallel, name: str
) -> list[range]:
    """Return the outputs that a rank holds of a projection which is one in the checkpoint, too.

    Parameters
    ----------
    d_out : int
        Outputs in the checkpoint, those of the first partition first (Phi's ``qkv_proj``).
    partition_sizes : sequence of int
        Outputs of every partition on a rank.
    parallel, name
        As for `column_rows`.

    Raises
    ------
    InputError
        If the partitions of all ranks do not make up the outputs.
    """
    if sum(partition_sizes) * parallel.size != d_out:
        if len(partition_sizes) == 1:
            return [column_rows(d_out, partition_sizes[0], parallel, name)]
        raise InputError(
            f"{name}: partitions of {list(partition_sizes)} outputs on {parallel.size} ranks do not "
            f"make up {d_out}; choose another tensor-parallel size"
        )
    ranges, offset = [], 0
    for size in partition_sizes:
        first = offset + parallel.rank * size
        ranges.append(range(first, first + size))
        offset += size * parallel.size
    return ranges


def share_of_outputs(d_out: int, parallel: Parallel, name: str) -> range:
    """Return the outputs that a rank computes of a row-parallel projection; shares differ by one at most.

    Raises
    ------
    InputError
        If there are more ranks than outputs.
    """
    if d_out < parallel.size:
        raise InputError(f"{name}: {d_out} outputs are fewer than the {parallel.size} ranks")
    first, end = (rank * d_out // parallel.size for rank in (parallel.rank, parallel.rank + 1))
    return range(first, end)
