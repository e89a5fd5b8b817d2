"""The recipe: every setting of a compression, and which go together (`cospadi.pipeline.recipe_file` reads them)."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import yaml

from cospadi.errors import InputError
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.learn.allocation import HIGHEST, LOWEST
from cospadi.learn.budget import RatioConvention, check_ratio
from cospadi.learn.coding import Solver
from cospadi.learn.group import GroupObjective
from cospadi.learn.methods import METHODS, DictionaryKind
from cospadi.learn.options import Init, LearnOptions, Unused, Update
from cospadi.learn.quantize import INTEGER_BITS, Rounding, StorageTypes
from cospadi.learn.widths import AUTO, LOWEST_BITS, integer_types, kept_bits, removed_share
from cospadi.model.discover import TargetLinear

RECIPE_VERSION = 1

Grouping = Literal["position", "similarity"]

OutputMetricKind = Literal["none", "diagonal", "fisher"]

Allocation = Literal["uniform", "loss"]

Reconstruction = Literal["none", "blockwise"]

SHARED_PROJECTIONS = (
    r".*\.(q_proj|k_proj|v_proj|qkv_proj|query_key_value|c_attn|gate_proj|up_proj|gate_up_proj|c_fc|fc1)",
)
"""Projections that share a dictionary where nothing else is asked for: those that read the residual stream, as in Basis
Sharing (arXiv 2410.03765). Those that write to it (o, down) do not share."""

LEARNED_ONLY = (
    "solver",
    "iterations",
    "power_iterations",
    "init",
    "block_size",
    "sweeps",
    "unused",
    "tolerance",
    "update",
    "coding_batch",
    "k_over_s",
)
"""Settings of the alternation for dictionaries without identity atoms. Giving one asks for such a dictionary."""

BUDGETS = ("ratio", "bits", "target_size")
"""Settings that say how large the result may be: one of them at a time."""

_SETTING_OF_TYPE = {
    "dictionary": "dictionary_dtype",
    "coeffs": "coeffs_dtype",
    "rounding": "coeffs_rounding",
}
"""Settings by the names that `StorageTypes` has for them."""

NO_CALIBRATION = "none"
"""The data-free mode: every input direction counts alike."""


class SettingError(InputError):
    """A setting that cannot be used.

    Attributes
    ----------
    path : tuple of str and int
        Its key; for a part of a list also the place in the list, and the key there.
    """

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class Override:
    """Settings for the modules whose full name matches ``match`` (a regular expression).

    Later overrides win. ``dense=True`` leaves the modules as they are.
    """

    match: str
    ratio: float | None = None
    k_over_s: float | None = None
    dense: bool = False


@dataclass(frozen=True)
class Recipe:
    """Settings of one compression. Field names are the YAML keys and the names `--set` takes.

    Attributes
    ----------
    method : str
        How weights are approximated: the paper's way and what grew from it, or a baseline.
    ratio : float
        Removed share of the compressed linears, in (0, 1). Methods without a ratio ignore it.
    ratio_convention : {"stored", "nominal"}
        Whether ``ratio`` counts stored bytes (mask included) or values only (the papers).
    k_over_s : float or None
        Atoms per coefficient of a column; None: 2.5 where the method ``cospadi`` counts stored bytes, which has the
        least error there, and else 2, as in the papers.
    dictionary : {"learned", "identity", "augmented", "auto"} or None
        Atoms of the method ``cospadi``: learned ones (the paper), the inputs themselves, both, or, for every linear,
        whichever of these, several shares of learned atoms and a truncated SVD has the least error at its bytes
        (`cospadi.learn.choice`; several times the time of ``augmented``). None: both, but learned ones where a setting
        of their alternation is given (`LEARNED_ONLY`), and the inputs alone beside integer coefficients, unless groups
        or a type of dictionaries are asked for.
    learned_share : float
        Part of the budget that an augmented dictionary spends on learned atoms.
    allocation : {"uniform", "loss"}
        Every linear loses the same share, or shares are chosen so that the measured loss of the model is least
        (`cospadi.pipeline.allocation`; dictionaries with identity atoms only).
    allocation_reach : float
        How far a linear's share may lie from `ratio`.
    output_metric : {"none", "diagonal", "fisher"} or None
        How errors of different outputs of a layer count: alike, or by what they do to the model's prediction
        (`cospadi.learn.output_metric`; dictionaries with identity atoms only). ``diagonal``: each output by itself,
        which costs the fits nothing; ``fisher``: together, but where floating-point weights have more outputs than
        inputs. None: ``diagonal`` where there are identity atoms and calibration text, and where the model can run
        backwards; a model that cannot is fitted without, and the log says so.
    backward_samples : int or None
        Calibration windows that are also run backwards, for the output metric and for the allocation. None: 32, or 8
        where only the diagonal of the metric is wanted.
    reconstruction : {"none", "blockwise"}
        After the fits, tune coefficients and atoms of each decoder block together, supports kept, towards the original
        block's output (`cospadi.calibration.reconstruction`; floating-point coefficients and dictionaries only).
    reconstruction_epochs : int
        Passes over the calibration windows per block.
    reconstruction_rate : float
        Largest step as a share of the values' root mean square.
    solver, iterations, power_iterations, update, init, block_size, sweeps, unused, tolerance, coding_batch,
    first_penalty, penalty_growth
        See `cospadi.learn.options.LearnOptions`.
    refit : bool
        Least-squares refit of what is not rounded yet while factors are rounded, integers with error feedback; the
        paper does neither.
    group_size : int
        Consecutive layers whose projections of one kind share a dictionary; 1: none share.
    group_targets : tuple of str
        Regular expressions on full module names: which projections may share.
    group_objective : {"averaged", "exact"}
        One Gram for the group (the paper), or every layer's own.
    grouping : {"position", "similarity"}
        Neighbouring layers, or the ones that are most alike.
    calibration : str
        ``builtin``, a text, JSON-lines or safetensors file, a folder of text, a hub data set, any of them with a range
        of documents (``file.jsonl[:800]``), or ``none`` for the data-free mode.
    samples, sequence_length : int
        Calibration windows and tokens per window.
    batch_size : int
        Windows per forward pass.
    measure_on_calibration : bool
        Run the calibration text also for a method that does not use it, so that its errors are those of activations.
    sequential : bool
        Calibrate each layer on the outputs of the compressed layers before it; targets stay the original outputs.
    shrinkage : float or None
        With ``sequential``: share of the original weight in the target, 0 to 1; None chooses it per input on held-back
        windows.
    seed : int
        Of the calibration sample and the random inits.
    targets, ignore : tuple of str
        Regular expressions on full module names; no targets means every linear of the decoder blocks.
    overrides : tuple of Override
        Per-module settings.
    storage_dtype : {"bfloat16", "float16", "float32"}
        Type of all stored numbers that nothing else is said about.
    coeffs_dtype : str or None
        Type of the stored coefficients: a floating type, ``bfloat14``, ``int8``, ``int4``; None: `storage_dtype`.
        ``auto``: every linear keeps its weights as integers of the width that its share of the bytes allows, below 4
        bits a part of them (`cospadi.learn.widths`); atoms are the inputs then, and another `dictionary` is refused.
    target_size : int or None
        Bytes that all weights of the result may take, those outside the compressed linears included. Sets `ratio` once
        the model is known.
    coeffs_group : int
        Coefficients that share a scale (integer types); 0: one scale per output.
    coeffs_rounding : {"nearest", "truncate"}
        Of ``bfloat14``; the paper truncates.
    dictionary_dtype : str or None
        Type of the stored dictionary: a floating type or ``int8``; None: `storage_dtype`.
    max_gram_gb : float or None
        Bound on the memory of activation Grams; more passes over the text if they do not fit.
    """

    method: str = "cospadi"
    ratio: float = 0.2
    ratio_convention: RatioConvention = "stored"
    k_over_s: float | None = None
    dictionary: DictionaryKind | None = None
    learned_share: float = 0.2
    allocation: Allocation = "uniform"
    allocation_reach: float = 0.4
    output_metric: OutputMetricKind | None = None
    backward_samples: int | None = None
    reconstruction: Reconstruction = "none"
    reconstruction_epochs: int = 4
    reconstruction_rate: float = 0.003
    solver: Solver = "auto"
    iterations: int = 8
    power_iterations: int = 1
    init: Init = "svd"
    block_size: int = 64
    sweeps: int = 3
    unused: Unused = "skip"
    tolerance: float = 2e-3
    update: Update = "ksvd"
    coding_batch: int = 0
    first_penalty: float = 0.005
    penalty_growth: float = 1.2
    refit: bool = True
    group_size: int = 1
    group_targets: tuple[str, ...] = SHARED_PROJECTIONS
    group_objective: GroupObjective = "exact"
    grouping: Grouping = "position"
    calibration: str = "builtin"
    samples: int = 64
    sequence_length: int = 1024
    batch_size: int = 4
    measure_on_calibration: bool = False
    sequential: bool = False
    shrinkage: float | None = None
    seed: int = 42
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = field(default=())
    storage_dtype: str = "bfloat16"
    coeffs_dtype: str | None = None
    coeffs_group: int = 0
    coeffs_rounding: Rounding = "nearest"
    dictionary_dtype: str | None = None
    max_gram_gb: float | None = 8.0
    target_size: int | None = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        _check_choice("method", self.method, tuple(METHODS))
        _check_choice("ratio_convention", self.ratio_convention, get_args(RatioConvention))
        _check_choice("storage_dtype", self.storage_dtype, tuple(STORAGE_DTYPES))
        if self.dictionary is not None:
            _check_choice("dictionary", self.dictionary, get_args(DictionaryKind))
        if self.output_metric is not None:
            _check_choice("output_metric", self.output_metric, get_args(OutputMetricKind))
        for name, kind in (
            ("group_objective", GroupObjective),
            ("grouping", Grouping),
            ("allocation", Allocation),
            ("reconstruction", Reconstruction),
        ):
            _check_choice(name, getattr(self, name), get_args(kind))
        if not 0.0 < self.learned_share < 1.0:
            raise InputError(
                f"learned_share: expected a share between 0 and 1, got {self.learned_share!r}"
            )
        for name in ("refit", "measure_on_calibration", "sequential"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        for name in (
            "samples",
            "sequence_length",
            "batch_size",
            "group_size",
            "backward_windows",
            "reconstruction_epochs",
        ):
            value = getattr(self, name)
            name = {"backward_windows": "backward_samples"}.get(name, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
        if self.sequence_length < 2:
            raise InputError("sequence_length: expected at least 2 tokens")
        if (
            not isinstance(self.seed, int)
            or isinstance(self.seed, bool)
            or not 0 <= self.seed < 2**63
        ):
            raise InputError(f"seed: expected an integer in [0, 2^63), got {self.seed!r}")
        if not isinstance(self.calibration, str) or not self.calibration:
            raise InputError(f"calibration: expected a name or a path, got {self.calibration!r}")
        for name in ("targets", "ignore", "group_targets"):
            for i, pattern in enumerate(getattr(self, name)):
                _check_pattern(pattern, name, i)
        for i, override in enumerate(self.overrides):
            _check_pattern(override.match, "overrides", i, "match")
            _check_override(override, i)
        if self.max_gram_gb is not None and not self.max_gram_gb > 0.0:
            raise InputError(f"max_gram_gb: expected more than 0, got {self.max_gram_gb!r}")
        if self.target_size is not None and (
            not isinstance(self.target_size, int)
            or isinstance(self.target_size, bool)
            or self.target_size < 1
        ):
            raise InputError(f"target_size: expected a number of bytes, got {self.target_size!r}")
        self._check_combinations()
        self.learn_options()  # checks the rest

    def _check_combinations(self) -> None:
        method = METHODS[self.method]
        if self.coeffs_dtype == AUTO:
            self._check_auto()
        if self.group_size > 1 and not method.can_share:
            able = ", ".join(name for name, entry in METHODS.items() if entry.can_share)
            raise InputError(f"group_size: {self.method} shares no dictionaries; {able} can")
        if self.sequential and self.group_size > 1:
            raise InputError(
                "sequential: a group's layers are fitted together, before the later one's inputs are known; "
                "use group_size 1"
            )
        if self.sequential and (not method.uses_calibration or self.calibration == NO_CALIBRATION):
            raise InputError("sequential: needs calibration text and a method that uses it")
        if self.shrinkage is not None and not 0.0 <= self.shrinkage <= 1.0:
            raise InputError(f"shrinkage: expected 0 to 1, got {self.shrinkage!r}")
        if self.atoms != "learned" and self.method != "cospadi":
            raise InputError(
                f"dictionary: {self.method} has its own, expected learned, got {self.dictionary}"
            )
        if (
            self.method == "cospadi"
            and self.atoms not in ("learned", "auto")
            and self._of_alternation()
        ):
            raise not_learned(self._of_alternation()[0], self.atoms, self.coeffs_dtype)
        if self.atoms == "auto" and self.group_size > 1:
            raise InputError("dictionary: auto works with group_size 1, a choice for every linear")
        for name, value, off in (
            ("output_metric", self.metric, "none"),
            ("allocation", self.allocation, "uniform"),
        ):
            if value == off:
                continue
            if self.atoms == "learned":
                raise InputError(
                    f"{name}: {value} needs identity atoms: --dictionary augmented or identity"
                )
            if self.calibration == NO_CALIBRATION:
                raise InputError(f"{name}: {value} needs calibration text")
        if self.allocation != "uniform" and self.group_size > 1:
            raise InputError("allocation: loss works without groups")
        if self.allocation != "uniform" and not LOWEST <= self.ratio <= HIGHEST:
            raise InputError(
                f"ratio: allocation by loss works from {LOWEST} to {HIGHEST}, got {self.ratio}"
            )
        if not 0.0 < self.allocation_reach <= 1.0:
            raise InputError(
                f"allocation_reach: expected a share above 0 and up to 1, got {self.allocation_reach!r}"
            )
        if self.reconstruction != "none":
            self._check_reconstruction()
        if self.coeffs_dtype == AUTO:
            return
        types = self.storage_types()
        if method.form == "rounded" and types.coeffs not in INTEGER_BITS:
            raise InputError(
                f"coeffs_dtype: {self.method} needs an integer type, got {types.coeffs}"
            )

    def _check_reconstruction(self) -> None:
        if self.calibration == NO_CALIBRATION or not METHODS[self.method].uses_calibration:
            raise InputError("reconstruction: needs calibration text and a method that uses it")
        if self.samples < 2:
            raise InputError("reconstruction: needs two samples at least, one of them to judge")
        if not 0.0 < self.reconstruction_rate < 1.0:
            raise InputError(
                f"reconstruction_rate: expected a share between 0 and 1, got {self.reconstruction_rate!r}"
            )
        kinds = {AUTO} if self.coeffs_dtype == AUTO else set(self._stored_kinds())
        packed = sorted(kinds - STORAGE_DTYPES.keys())
        if packed:
            raise InputError(
                f"reconstruction: moves floating-point values only, and {packed[0]} was asked for: leave it out, or "
                "store coefficients and dictionaries in a 16-bit type"
            )

    def _stored_kinds(self) -> tuple[str, str]:
        types = self.storage_types()
        return types.coeffs, types.dictionary

    def _check_auto(self) -> None:
        for name, value, expected in (
            ("method", self.method, "cospadi"),
            ("ratio_convention", self.ratio_convention, "stored"),
            ("group_size", self.group_size, 1),
            ("coeffs_group", self.coeffs_group, 0),
        ):
            if value != expected:
                raise InputError(f"coeffs_dtype: auto works with {name} {expected}, got {value}")
        if self.dictionary not in (None, "identity"):
            raise InputError(
                f"dictionary: {self.dictionary} does not go with coeffs_dtype auto, which --bits and --target-size "
                "stand for: the inputs alone are atoms then; leave --dictionary out or give identity, or give --ratio "
                "with --coeffs-dtype"
            )
        if kept_bits(self.ratio) < LOWEST_BITS:
            raise InputError(
                f"ratio: coeffs_dtype auto keeps at least {LOWEST_BITS} bits per weight (ratio "
                f"{removed_share(LOWEST_BITS):.4f}), asked for are {kept_bits(self.ratio):.3g} (ratio {self.ratio:.4g})"
            )

    @property
    def uses_calibration(self) -> bool:
        """Whether any calibration text is run through the model."""
        wanted = METHODS[self.method].uses_calibration or self.measure_on_calibration
        return wanted and self.calibration != NO_CALIBRATION

    @property
    def uses_gradients(self) -> bool:
        """Whether calibration text is run backwards."""
        wanted = self.metric != "none" or self.allocation == "loss"
        return wanted and self.uses_calibration

    @property
    def metric(self) -> OutputMetricKind:
        """`output_metric`, or what the other settings allow."""
        if self.output_metric is not None:
            return self.output_metric
        has_inputs = self.method == "cospadi" and self.atoms != "learned"
        return "diagonal" if has_inputs and self.calibration != NO_CALIBRATION else "none"

    def weighs_outputs(self, target: TargetLinear) -> bool:
        """Whether gradients at the target's output enter its fit.

        With the diagonal alone not for weights that write to the residual stream, which it does not help: those are
        told by being the only reader of their input (q, k, v share theirs, gate and up do) and having no more outputs
        than inputs.
        """
        if self.metric == "diagonal":
            return target.n_readers > 1 or target.d_out > target.d_in
        return self.metric == "fisher"

    @property
    def backward_windows(self) -> int:
        """`backward_samples`, or the default that fits what they are for."""
        if self.backward_samples is not None:
            return self.backward_samples
        return 8 if self.metric != "fisher" and self.allocation == "uniform" else 32

    @property
    def rho(self) -> float:
        """`k_over_s`, or the default of the method and the convention."""
        if self.k_over_s is not None:
            return self.k_over_s
        stored = self.method == "cospadi" and self.ratio_convention == "stored"
        return 2.5 if stored else 2.0

    @property
    def atoms(self) -> DictionaryKind:
        """Atoms of the method: `dictionary`, but the inputs where integers are chosen by budget."""
        if self.coeffs_dtype == AUTO:
            return "identity"
        if self.dictionary is not None:
            return self.dictionary
        if self.method != "cospadi" or self._of_alternation():
            return "learned"
        wants_dictionary = self.dictionary_dtype is not None or self.group_size > 1
        if self.coeffs_dtype in INTEGER_BITS and not wants_dictionary:
            return "identity"
        return "augmented"

    def _of_alternation(self) -> list[str]:
        """Settings of the alternation that do not have their default value."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = [name for name in LEARNED_ONLY if getattr(self, name) != defaults[name]]
        if any(override.k_over_s is not None for override in self.overrides):
            changed.append("overrides.k_over_s")
        return changed

    def types_at(self, ratio: float, d_in: int) -> StorageTypes:
        """How dictionary and coefficients of a linear are stored that loses the share ``ratio``."""
        if self.coeffs_dtype == AUTO:
            return integer_types(kept_bits(ratio), d_in)
        return self.storage_types()

    def storage_types(self) -> StorageTypes:
        """How dictionaries and coefficients are stored where that does not depend on the linear."""
        default = "int8" if METHODS[self.method].form == "rounded" else self.storage_dtype
        try:
            return StorageTypes(
                dictionary=self.dictionary_dtype or self.storage_dtype,
                coeffs=self.coeffs_dtype or default,
                coeffs_group=self.coeffs_group,
                rounding=self.coeffs_rounding,
            )
        except InputError as error:
            name, colon, text = str(error).partition(":")
            raise InputError(f"{_SETTING_OF_TYPE.get(name, name)}{colon}{text}") from None

    def learn_options(self) -> LearnOptions:
        """The learner's part of the recipe."""
        names = [f.name for f in dataclasses.fields(LearnOptions) if f.name != "products"]
        return LearnOptions(**{name: getattr(self, name) for name in names})

    def to_mapping(self) -> dict[str, Any]:
        """Plain data for YAML and JSON; `cospadi.pipeline.recipe_file.recipe_from_mapping` reads it back."""
        data = dataclasses.asdict(self)
        # a written recipe says what was chosen
        data["dictionary"] = self.atoms
        data["k_over_s"] = self.rho if self.atoms in ("learned", "auto") else None
        data["output_metric"] = self.metric
        data["backward_samples"] = self.backward_windows
        data["targets"] = list(self.targets)
        data["ignore"] = list(self.ignore)
        data["group_targets"] = list(self.group_targets)
        data["overrides"] = [
            {k: v for k, v in dataclasses.asdict(o).items() if v not in (None, False)}
            for o in self.overrides
        ]
        return {"recipe_version": RECIPE_VERSION, **data}

    def to_yaml(self) -> str:
        """YAML text of the recipe."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False)


def not_learned(name: str, atoms: str, coeffs_dtype: str | None) -> SettingError:
    """What is said about a setting of `LEARNED_ONLY` beside other atoms."""
    way = "--ratio and --coeffs-dtype with " if coeffs_dtype == AUTO else ""
    return SettingError(
        f"{name}: belongs to learned dictionaries, not to {atoms} ones; leave it out or give {way}--dictionary learned",
        *name.split("."),
    )


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _check_override(override: Override, place: int) -> None:
    def refuse(key: str, text: str) -> SettingError:
        return SettingError(f"overrides, {override.match!r}: {text}", "overrides", place, key)

    if not isinstance(override.dense, bool):
        raise refuse("dense", f"dense: expected true or false, got {override.dense!r}")
    for name in ("ratio", "k_over_s"):
        value = getattr(override, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise refuse(name, f"{name}: expected a number, got {value!r}")
    if override.ratio is not None:
        try:
            check_ratio(override.ratio)
        except InputError as error:
            raise refuse("ratio", str(error)) from None
    if override.k_over_s is not None and not 1.0 <= override.k_over_s < float("inf"):
        text = f"k_over_s: expected a number of at least 1, got {override.k_over_s!r}"
        raise refuse("k_over_s", text)
    if override.dense and (override.ratio is not None or override.k_over_s is not None):
        raise refuse("dense", "a layer that stays dense has no ratio and no k_over_s")
    if not override.dense and override.ratio is None and override.k_over_s is None:
        raise refuse("match", "sets nothing: give ratio, k_over_s or dense")


def _check_pattern(pattern: object, *path: str | int) -> None:
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError) as error:
        name = ".".join(part for part in path if isinstance(part, str))
        raise SettingError(
            f"{name}: {pattern!r} is not a regular expression: {error}", *path
        ) from None
