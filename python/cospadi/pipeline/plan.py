"""The plan: what becomes of every linear, and what that costs, before any work is done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cospadi.checkpoint.format import LayerType
from cospadi.errors import InputError
from cospadi.factor import FactorSpec, Support
from cospadi.learn.budget import low_rank_size, sparse_size
from cospadi.model.discover import Skipped, TargetLinear, match_names
from cospadi.pipeline.recipe import Override, Recipe


@dataclass(frozen=True)
class ModulePlan:
    """What one linear becomes."""

    name: str
    layer_type: LayerType
    d_in: int
    d_out: int
    bias: bool
    n_atoms: int
    sparsity: int
    support: Support

    @property
    def spec(self) -> FactorSpec:
        """Sizes and bits of the stored form in 16-bit values."""
        return FactorSpec(
            d_in=self.d_in,
            d_out=self.d_out,
            n_atoms=self.n_atoms,
            sparsity=self.sparsity,
            support=self.support,
            bias=self.bias,
        )

    @property
    def cost(self) -> float:
        """Work estimate (flops of one coding), used for the ETA only."""
        if self.support == "full":
            return 2.0 * self.d_in * self.d_out * min(self.d_in, self.d_out)
        greedy = 2.0 * self.d_out * self.n_atoms * self.sparsity**2
        update = 24.0 * self.d_in * self.d_out * self.n_atoms
        return greedy + update


@dataclass(frozen=True)
class Plan:
    """All modules of a compression."""

    modules: tuple[ModulePlan, ...]
    dense: tuple[Skipped, ...]

    @property
    def dense_bits(self) -> int:
        """Bits of the planned linears in bf16."""
        return sum(module.spec.dense_bits for module in self.modules)

    @property
    def stored_bits(self) -> int:
        """Bits of the planned linears after compression."""
        return sum(module.spec.stored_bits for module in self.modules)

    @property
    def stored_ratio(self) -> float:
        """Removed share of the stored bytes of the planned linears."""
        return 1.0 - self.stored_bits / self.dense_bits

    @property
    def values_ratio(self) -> float:
        """Removed share of the values of the planned linears, mask not counted."""
        kept = sum(module.spec.n_values for module in self.modules)
        return 1.0 - kept / sum(module.d_in * module.d_out for module in self.modules)

    def to_mapping(self) -> dict[str, Any]:
        """Plain data for ``plan --json``."""
        return {
            "modules": [
                asdict(module)
                | {
                    "stored_bytes": module.spec.stored_bits // 8,
                    "dense_bytes": module.spec.dense_bits // 8,
                }
                for module in self.modules
            ],
            "left_dense": [asdict(item) for item in self.dense],
            "ratio": {"stored": self.stored_ratio, "values": self.values_ratio},
            "stored_bytes": self.stored_bits // 8,
            "dense_bytes": self.dense_bits // 8,
        }


def make_plan(targets: Sequence[TargetLinear], skipped: Sequence[Skipped], recipe: Recipe) -> Plan:
    """Sizes of every target under the recipe.

    Raises
    ------
    InputError
        An override matches nothing, or nothing is left to compress.
    """
    names = [target.name for target in targets]
    for override in recipe.overrides:
        match_names(override.match, names, argument="overrides")
    modules: list[ModulePlan] = []
    dense = list(skipped)
    for target in targets:
        module = _plan_module(target, recipe)
        if isinstance(module, ModulePlan):
            modules.append(module)
        else:
            dense.append(module)
    if not modules:
        raise InputError("nothing to compress: every target stays dense under these settings")
    return Plan(tuple(modules), tuple(dense))


def _plan_module(target: TargetLinear, recipe: Recipe) -> ModulePlan | Skipped:
    ratio, k_over_s, is_dense = _settings(target.name, recipe)
    shape = (target.d_out, target.d_in)
    if is_dense:
        return Skipped(target.name, shape, "kept dense by an override")
    if recipe.method == "cospadi":
        n_atoms, sparsity = sparse_size(
            target.d_in,
            target.d_out,
            ratio,
            k_over_s=k_over_s,
            convention=recipe.ratio_convention,
        )
        support: Support = "mask"
    else:
        n_atoms = sparsity = low_rank_size(target.d_in, target.d_out, ratio)
        support = "full"
    if sparsity < 1:
        return Skipped(target.name, shape, f"too small: nothing fits at ratio {ratio}")
    plan = ModulePlan(
        name=target.name,
        layer_type=target.layer_type,
        d_in=target.d_in,
        d_out=target.d_out,
        bias=target.has_bias,
        n_atoms=n_atoms,
        sparsity=sparsity,
        support=support,
    )
    if plan.spec.stored_bits >= plan.spec.dense_bits:
        return Skipped(target.name, shape, f"would not get smaller at ratio {ratio}")
    return plan


def _settings(name: str, recipe: Recipe) -> tuple[float, float, bool]:
    ratio, k_over_s, is_dense = recipe.ratio, recipe.k_over_s, False
    for override in recipe.overrides:
        if _matches(override, name):
            ratio = override.ratio if override.ratio is not None else ratio
            k_over_s = override.k_over_s if override.k_over_s is not None else k_over_s
            is_dense = override.dense
    return ratio, k_over_s, is_dense


def _matches(override: Override, name: str) -> bool:
    return re.fullmatch(override.match, name) is not None
