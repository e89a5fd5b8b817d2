"""Which weights share a dictionary: neighbours, or the ones that are most alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cospadi.errors import InputError
from cospadi.learn.whitening import Whitening


def groups_by_position(count: int, size: int) -> list[tuple[int, ...]]:
    """``(0, 1), (2, 3), ...`` for size 2, as Basis Sharing and CoSpaDi group layers; the last group may be smaller.

    Raises `InputError` for a size below one.
    """
    if size < 1:
        raise InputError(f"group_size: expected at least 1, got {size!r}")
    return [tuple(range(i, min(i + size, count))) for i in range(0, count, size)]


def whitened_distances(weights: Sequence[torch.Tensor], joint: Whitening) -> torch.Tensor:
    """How differently weights use the directions of their input.

    With ``Y_l = L W_l`` whitened by one common metric and scaled to norm one, the distance of two weights is
    ``||Y_i Y_i^T - Y_j Y_j^T||_F``: 0 if one dictionary serves both alike, at most the root of 2. It does not depend on
    the order or the number of outputs, which say nothing about the directions that a shared dictionary must hold.
    GeoPair (arXiv 2609.25963) matches on a whitened normalised Frobenius distance as well.

    Parameters
    ----------
    weights : sequence of torch.Tensor
        ``[d_out_l, d_in]``.
    joint : Whitening
        Of the mean of all the weights' activation Grams; the identity compares the weights alone.

    Returns
    -------
    torch.Tensor
        ``[n, n]`` float64, symmetric, zero diagonal.
    """
    shapes = []
    for weight in weights:
        signals = joint.whiten(weight)
        energy = signals.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        shapes.append((signals.T @ signals / energy).float().flatten())
    distances = torch.zeros((len(shapes), len(shapes)), dtype=torch.float64)
    for i, first in enumerate(shapes):
        for j in range(i):
            distances[i, j] = distances[j, i] = float((first - shapes[j]).norm())
    return distances


def groups_by_similarity(distances: torch.Tensor, size: int) -> list[tuple[int, ...]]:
    """Groups of ``size`` with a small sum of the distances inside them; the last may be smaller.

    Exchanges members between groups while that lowers the sum, from two starts: neighbours, and greedily closest.
    For pairs a blossom matching would be exact; exchanges come within a percent or so on the few dozen layers of a
    model, work for every size, and are never worse than grouping by position.

    Parameters
    ----------
    distances : torch.Tensor
        ``[n, n]`` symmetric.
    size : int
        Members of a group.

    Returns
    -------
    list of tuple of int
        Every index once; members ascending, groups by their first member.

    Raises
    ------
    InputError
        A size below one, distances that are not a square matrix or not finite.
    """
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise InputError(f"distances: expected a square matrix, got {tuple(distances.shape)}")
    if not bool(torch.isfinite(distances).all()):
        raise InputError("distances: hold non-finite values")
    count = distances.shape[0]
    table: list[list[float]] = distances.tolist()
    starts = [groups_by_position(count, size), _greedy(table, count, size)]
    improved = [_exchange(table, [list(group) for group in start]) for start in starts]
    best = min(improved, key=lambda groups: sum(_inner(table, group) for group in groups))
    return sorted(tuple(sorted(group)) for group in best)


def _greedy(table: list[list[float]], count: int, size: int) -> list[tuple[int, ...]]:
    """Groups grown one by one, each from the closest pair that is left."""
    left = set(range(count))
    groups: list[tuple[int, ...]] = []
    while left:
        group = [min(left)]
        if size > 1 and len(left) > 1:
            pairs = ((table[i][j], i, j) for i in left for j in left if i < j)
            group = list(min(pairs)[1:])
        while len(group) < min(size, len(left)):
            rest = left.difference(group)
            group.append(min(rest, key=lambda j: (sum(table[i][j] for i in group), j)))
        left.difference_update(group)
        groups.append(tuple(group))
    return groups


def _exchange(table: list[list[float]], groups: list[list[int]]) -> list[list[int]]:
    """Swap two members of different groups as long as a swap lowers the sum."""
    improved = True
    while improved:
        improved = False
        for a, first in enumerate(groups):
            for second in groups[a + 1 :]:
                for i in range(len(first)):
                    for j in range(len(second)):
                        before = _inner(table, first) + _inner(table, second)
                        first[i], second[j] = second[j], first[i]
                        # a margin, so that rounding cannot make two swaps undo each other for ever
                        if _inner(table, first) + _inner(table, second) < before * (1 - 1e-12):
                            improved = True
                        else:
                            first[i], second[j] = second[j], first[i]
    return groups


def _inner(table: list[list[float]], group: Sequence[int]) -> float:
    return sum(table[i][j] for i in group for j in group if i < j)
