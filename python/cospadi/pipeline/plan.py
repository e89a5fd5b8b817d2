"""The plan: what becomes of every linear, and what that costs, before any work is done."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cospadi.checkpoint.format import LayerType
from cospadi.errors import InputError
from cospadi.factor.spec import STORAGE_DTYPES, FactorSpec, Support, removed_shares
from cospadi.learn.budget import VALUE_BITS, StorageWidths
from cospadi.learn.grouping import groups_by_position as consecutive
from cospadi.learn.methods import FactorSize, candidate_sizes, factor_size
from cospadi.learn.quantize import INTEGER_BITS, StorageTypes
from cospadi.learn.widths import AUTO, deal_bits, kept_bits, removed_share
from cospadi.model.discover import Skipped, TargetLinear, match_names
from cospadi.pipeline.recipe import Override, Recipe


@dataclass(frozen=True)
class ModulePlan:
    """What one linear becomes.

    Attributes
    ----------
    leader : str
        Module that owns the dictionary: the own name, unless a group shares one.
    n_identity, n_atoms : int
        Identity atoms and learned atoms.
    dictionary_dtype, coeffs_dtype, coeffs_group
        Storage types.
    candidates : tuple of FactorSize
        Sizes at the same bytes among which the fit chooses; empty where there is no choice.
    """

    name: str
    layer_type: LayerType
    d_in: int
    d_out: int
    bias: bool
    n_atoms: int
    sparsity: int
    support: Support
    leader: str
    n_identity: int = 0
    dictionary_dtype: str = "bfloat16"
    coeffs_dtype: str = "bfloat16"
    coeffs_group: int = 0
    candidates: tuple[FactorSize, ...] = ()

    @property
    def spec(self) -> FactorSpec:
        """Sizes and bits of the stored form."""
        return FactorSpec(
            d_in=self.d_in,
            d_out=self.d_out,
            n_atoms=self.n_atoms,
            sparsity=self.sparsity,
            support=self.support,
            bias=self.bias,
            n_identity=self.n_identity,
            dictionary_dtype=self.dictionary_dtype,
            coeffs_dtype=self.coeffs_dtype,
            coeffs_group=self.coeffs_group,
            owns_dictionary=self.leader == self.name or not self.n_atoms,
        )

    @property
    def types(self) -> StorageTypes:
        """Storage types, nothing said about rounding."""
        return StorageTypes(self.dictionary_dtype, self.coeffs_dtype, self.coeffs_group)

    @property
    def cost(self) -> float:
        """Work estimate (flops of one coding), used for the ETA only."""
        if self.support == "full" or self.n_identity:
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
    def groups(self) -> dict[str, tuple[ModulePlan, ...]]:
        """Modules by the leader whose dictionary they use, in model order; most are alone."""
        groups: dict[str, list[ModulePlan]] = defaultdict(list)
        for module in self.modules:
            groups[module.leader].append(module)
        return {leader: tuple(members) for leader, members in groups.items()}

    @property
    def dense_bits(self) -> int:
        """Bits of the planned linears in bf16."""
        return sum(module.spec.dense_bits for module in self.modules)

    @property
    def stored_bits(self) -> int:
        """Bits of the planned linears after compression."""
        return sum(module.spec.stored_bits for module in self.modules)

    @property
    def ratio(self) -> dict[str, float]:
        """Removed shares of the planned linears in every convention, see `cospadi.factor.spec.removed_shares`."""
        return removed_shares(module.spec for module in self.modules)

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
            "ratio": self.ratio,
            "stored_bytes": self.stored_bits // 8,
            "dense_bytes": self.dense_bits // 8,
        }


def make_plan(
    targets: Sequence[TargetLinear],
    skipped: Sequence[Skipped],
    recipe: Recipe,
    *,
    groups: Sequence[Sequence[str]] | None = None,
    ratios: Mapping[str, float] | None = None,
) -> Plan:
    """Sizes of every target under the recipe.

    Parameters
    ----------
    targets, skipped
        From `cospadi.model.discover.discover`.
    recipe : Recipe
        Settings.
    groups : sequence of sequences of str, optional
        Modules that share a dictionary, each group in model order; by default neighbouring layers as the recipe says.
    ratios : mapping, optional
        Removed share by module name, in place of the recipe's; overrides still win. By default the recipe's, or, where
        integers are chosen by budget, shares that make it up together (`cospadi.learn.widths.deal_bits`).

    Raises
    ------
    InputError
        An override or a group target matches nothing, or nothing is left to compress.
    """
    names = [target.name for target in targets]
    for override in recipe.overrides:
        match_names(override.match, names, argument="overrides")
    if groups is None:
        groups = groups_by_position(targets, recipe)
    if ratios is None and recipe.coeffs_dtype == AUTO:
        ratios = _dealt_ratios(targets, recipe)
    by_name = {target.name: target for target in targets}
    grouped = {name: group for group in groups for name in group}
    planned: dict[str, ModulePlan | Skipped] = {}
    for target in targets:
        if target.name not in planned:
            members = [by_name[name] for name in grouped.get(target.name, (target.name,))]
            own = None if ratios is None else ratios.get(target.name)
            planned |= _plan_group(members, recipe, own)
    modules = tuple(p for t in targets if isinstance(p := planned[t.name], ModulePlan))
    dense = [p for t in targets if isinstance(p := planned[t.name], Skipped)]
    if not modules:
        reason = dense[0].reason if dense else "no target"
        raise InputError(
            f"nothing to compress: every target stays dense under these settings; the first, "
            f"{dense[0].name if dense else '-'}: {reason}"
        )
    return Plan(modules, (*skipped, *dense))


def groups_by_position(targets: Sequence[TargetLinear], recipe: Recipe) -> list[tuple[str, ...]]:
    """Groups of ``recipe.group_size`` neighbouring layers for every projection that may share.

    Layers with other settings (an override) do not share with those beside them; what is left over at the end makes a
    smaller group.

    Raises
    ------
    InputError
        The recipe wants groups and no projection may share.
    """
    if recipe.group_size == 1:
        return []
    return [
        tuple(run[i] for i in members)
        for run in sharing_runs(targets, recipe)
        for members in consecutive(len(run), recipe.group_size)
        if len(members) > 1
    ]


def sharing_runs(targets: Sequence[TargetLinear], recipe: Recipe) -> list[list[str]]:
    """Modules that may share dictionaries with one another: one projection in all layers with the same settings.

    Raises
    ------
    InputError
        There is none.
    """
    found = [
        target
        for target in targets
        if any(re.fullmatch(pattern, target.name) for pattern in recipe.group_targets)
        and not module_settings(target.name, recipe)[2]
    ]
    if not found:
        raise InputError(
            f"group_targets: {', '.join(recipe.group_targets)} matches none of the {len(targets)} linears"
        )
    runs: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for target in found:
        key = (target.projection, target.d_in, module_settings(target.name, recipe))
        runs[key].append(target.name)
    return list(runs.values())


def _dealt_ratios(targets: Sequence[TargetLinear], recipe: Recipe) -> dict[str, float]:
    """Removed shares of the linears without an override whose integers make up the recipe's ratio together."""
    own = without_override(targets, recipe)
    dealt = deal_bits([(t.d_in, t.d_out) for t in own], kept_bits(recipe.ratio))
    return {target.name: removed_share(bits) for target, bits in zip(own, dealt, strict=True)}


def _plan_group(
    members: Sequence[TargetLinear], recipe: Recipe, own_ratio: float | None
) -> dict[str, ModulePlan | Skipped]:
    first = members[0]
    ratio, k_over_s, is_dense = module_settings(first.name, recipe, own_ratio)

    def skip(reason: str) -> dict[str, ModulePlan | Skipped]:
        return {m.name: Skipped(m.name, (m.d_out, m.d_in), reason) for m in members}

    if is_dense:
        return skip("kept dense by an override")
    types = recipe.types_at(ratio, first.d_in)
    d_out = sum(member.d_out for member in members)
    limits: dict[str, Any] = {
        "k_over_s": k_over_s,
        "convention": recipe.ratio_convention,
        "widths": storage_widths(types),
        "learned_share": recipe.learned_share,
    }
    size = factor_size(recipe.method, first.d_in, d_out, ratio, dictionary=recipe.atoms, **limits)
    candidates: tuple[FactorSize, ...] = ()
    if recipe.atoms == "auto":
        candidates = candidate_sizes(first.d_in, d_out, ratio, **limits)
    if size.sparsity < 1:
        return skip(f"too small: nothing fits at ratio {ratio}")
    plans = [
        ModulePlan(
            name=member.name,
            layer_type=member.layer_type,
            d_in=member.d_in,
            d_out=member.d_out,
            bias=member.has_bias,
            n_atoms=size.n_atoms,
            sparsity=size.sparsity,
            support="full" if size.full_support else "mask",
            leader=first.name if size.n_atoms else member.name,
            n_identity=size.n_identity,
            dictionary_dtype=types.dictionary if size.n_atoms else "bfloat16",
            coeffs_dtype=types.coeffs,
            coeffs_group=types.coeffs_group,
            candidates=candidates,
        )
        for member in members
    ]
    stored = sum(plan.spec.stored_bits for plan in plans)
    # what stays dense is written in the storage type
    width = 8 * STORAGE_DTYPES[recipe.storage_dtype].itemsize / VALUE_BITS
    if stored >= width * sum(plan.spec.dense_bits for plan in plans):
        return skip(f"would not get smaller at ratio {ratio}")
    return {plan.name: plan for plan in plans}


def storage_widths(types: StorageTypes) -> StorageWidths:
    """Bits that storage types cost."""
    bits = {"bfloat14": 14, "float32": 32, **INTEGER_BITS}
    return StorageWidths(
        coeffs=bits.get(types.coeffs, 16),
        coeffs_scaled=types.coeffs in INTEGER_BITS,
        coeffs_group=types.coeffs_group,
        dictionary=bits.get(types.dictionary, 16),
        dictionary_scaled=types.dictionary in INTEGER_BITS,
    )


def module_settings(
    name: str, recipe: Recipe, own_ratio: float | None = None
) -> tuple[float, float, bool]:
    """Ratio, K / s, and whether it stays dense, of one module: the recipe's, or those of the last override."""
    ratio = recipe.ratio if own_ratio is None else own_ratio
    k_over_s, is_dense = recipe.rho, False
    for override in recipe.overrides:
        if _matches(override, name):
            ratio = override.ratio if override.ratio is not None else ratio
            k_over_s = override.k_over_s if override.k_over_s is not None else k_over_s
            is_dense = override.dense
    return ratio, k_over_s, is_dense


def without_override(targets: Sequence[TargetLinear], recipe: Recipe) -> list[TargetLinear]:
    """Targets that no override sets apart: they share the recipe's budget."""
    plain = module_settings("", replace(recipe, overrides=()))
    return [target for target in targets if module_settings(target.name, recipe) == plain]


def _matches(override: Override, name: str) -> bool:
    return re.fullmatch(override.match, name) is not None
