"""What ``--device cuda`` takes on the GPU, computed from shapes. No card has confirmed these figures.

What lies there follows from `cospadi.calibration.placement` and `cospadi.calibration.blockwise_statistics`: the whole
model in float32 where that is under half of what is free, else embeddings and head with one decoder block at a time;
hidden states in pinned memory of the CPU; the Grams of one block; and, while the model's place is kept, one fit with
its Gram and whitening. A fit takes ``13 P + 5 Q`` with ``P = 8 d_in d_out`` and ``Q = 8 d_in^2`` bytes of tensors at
most, and five Q more per further member of a group: bounds of the peaks that ``tests/pipeline/test_device_memory.py``
counts on a pretended device, which sees tensors and no workspace inside of torch's own routines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cospadi.calibration.placement import RESIDENT_SHARE
from cospadi.model.discover import TargetLinear, decoder_blocks
from cospadi.native.device_ops import OMP_WORKSPACE_BYTES
from cospadi.pipeline.gradient_memory import (
    backward_batch,
    depth_bytes,
    gradient_bytes,
    gradient_matrix_bytes,
    head_bytes,
)
from cospadi.pipeline.memory import activation_bytes, gram_bytes, hidden_bytes, whole_model_setting
from cospadi.pipeline.plan import Plan
from cospadi.pipeline.recipe import Recipe

LIBRARY_BYTES = 1 << 30
"""Assumed for the CUDA context, workspaces of cuBLAS and cuSOLVER, and what torch's allocator rounds up."""


@dataclass(frozen=True)
class DeviceNeeds:
    """What a compression takes on the GPU, by stage; the largest decides.

    Attributes
    ----------
    resident, by_block : dict or None
        Bytes with the whole model there, and with one decoder block at a time; None where that way is closed.
    model_bytes : int
        The model in float32.
    hidden_bytes : int
        Hidden states in pinned memory of the CPU.
    """

    resident: dict[str, int]
    by_block: dict[str, int] | None
    model_bytes: int
    hidden_bytes: int

    @property
    def resident_peak(self) -> int:
        """Bytes with the whole model on the GPU: the peak, or what its placement asks to be free."""
        return max(*self.resident.values(), int(self.model_bytes / RESIDENT_SHARE))

    @property
    def by_block_peak(self) -> int | None:
        """Bytes with one decoder block at a time."""
        return None if self.by_block is None else max(self.by_block.values())

    def to_mapping(self) -> dict[str, Any]:
        """Plain data for ``plan --json``."""
        by_block = None
        if self.by_block is not None:
            by_block = {"peak_bytes": self.by_block_peak, "stages": self.by_block}
        return {
            "resident": {"peak_bytes": self.resident_peak, "stages": self.resident},
            "by_block": by_block,
            "model_bytes": self.model_bytes,
        }


def device_fit_bytes(d_in: int, d_out: int, members: int = 1) -> int:
    """Bound on the tensors of one fit on the GPU, Grams and weights included.

    Parameters
    ----------
    d_in : int
        Inputs.
    d_out : int
        Outputs, of all members together.
    members : int
        Weights that share a dictionary.
    """
    return 13 * 8 * d_in * d_out + 5 * members * 8 * d_in * d_in


def estimate_device(
    model: nn.Module, targets: Sequence[TargetLinear], plan: Plan, recipe: Recipe
) -> DeviceNeeds | str:
    """What a compression takes on a GPU.

    Parameters
    ----------
    model : nn.Module
        Parameters may be without data.
    targets, plan, recipe
        What is to be done.

    Returns
    -------
    DeviceNeeds or str
        The setting for which nothing is computed: block-wise reconstruction and sequential calibration keep more.
    """
    setting = whole_model_setting(recipe)
    if setting is not None:
        return setting
    blocks = dict(decoder_blocks(model))
    sizes = {id(p): p.numel() for p in model.parameters()}
    in_blocks = {id(p) for block in blocks.values() for p in block.parameters()}
    whole = 4 * sum(sizes.values())
    outside = 4 * sum(n for key, n in sizes.items() if key not in in_blocks)
    block = 4 * max(sum(p.numel() for p in b.parameters()) for b in blocks.values())
    fit = LIBRARY_BYTES + max(
        device_fit_bytes(group[0].d_in, sum(m.d_out for m in group), len(group))
        for group in plan.groups.values()
    )
    if recipe.atoms == "learned" and recipe.solver in ("omp", "ormp"):
        fit += OMP_WORKSPACE_BYTES
    if not recipe.uses_calibration:  # the model is never moved
        return DeviceNeeds({"fits": fit}, {"fits": fit}, 0, 0)
    batch = LIBRARY_BYTES + activation_bytes(model, targets, recipe, recipe.batch_size)
    apart = all(target.block is not None for target in targets)
    grams = gram_bytes(targets, recipe, max_bytes=_bound(recipe), by_block=apart)[0]
    resident = {"calibration": whole + batch + grams, "fits": whole + fit}
    by_block = {"calibration": outside + block + batch + grams, "fits": outside + fit}
    if recipe.uses_gradients:
        matrices = gradient_matrix_bytes(targets, recipe, by_block=False)
        gradients = LIBRARY_BYTES + matrices
        gradients += depth_bytes(model, targets, recipe, backward_batch(recipe))
        gradients += max(head_bytes(model), gradient_bytes(model, targets, recipe))
        resident["gradients"] = whole + gradients
        by_block["gradients"] = outside + block + gradients
    return DeviceNeeds(
        resident, by_block if apart else None, whole, hidden_bytes(model, targets, recipe)
    )


def _bound(recipe: Recipe) -> int | None:
    return None if recipe.max_gram_gb is None else int(recipe.max_gram_gb * 2**30)
