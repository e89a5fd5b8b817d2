"""The checkpoint format, version 2: ``quantization_config`` and the tensors that follow from it.

FORMAT.md is the specification; this module is its implementation for the config. A config comes
from outside, so every field is checked before anything is allocated from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from cospadi.checkpoint.strict_json import brief_text, check_plain
from cospadi.errors import CheckpointError, InputError, NewerFormatError, brief
from cospadi.factor.spec import (
    COEFFS_DTYPES,
    DICTIONARY_DTYPES,
    STORAGE_DTYPES,
    FactorSpec,
    TensorSpec,
    removed_shares,
)

FORMAT_VERSION = 2
"""Version that this code writes, and the newest that it reads; it reads all earlier ones."""

QUANT_METHOD = "cospadi"

CONFIG_KEY = "quantization_config"

SENTINEL = "weight"
"""Name of the empty tensor in the dense weight's place.

Software that ignores ``quantization_config`` would otherwise find no weight and go on with random
numbers; the wrong shape makes it fail.
"""

NOTE = "Import cospadi.hf before AutoModelForCausalLM.from_pretrained, or use cospadi.load."

LayerType = Literal["linear", "conv1d"]

MAX_MODULES = 1 << 20
MAX_NAME_LENGTH = 512

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_][A-Za-z0-9_-]*)*", re.ASCII)
_REQUIRED = ("d_in", "d_out", "n_atoms", "sparsity", "support", "bias")
_SPEC_OPTIONAL = ("dictionary_dtype", "coeffs_dtype", "n_identity", "coeffs_group")
_OPTIONAL = (*_SPEC_OPTIONAL, "layer_type", "dictionary")
_ENUMS: dict[str, tuple[str, ...]] = {
    "support": ("mask", "full"),
    "layer_type": ("linear", "conv1d"),
    "dictionary_dtype": DICTIONARY_DTYPES,
    "coeffs_dtype": COEFFS_DTYPES,
}
_TOP_LEVEL = ("quant_method", "format_version", "modules", "groups", "ratio", "producer", "note")


@dataclass(frozen=True)
class ModuleEntry:
    """One compressed module: its factor, whose dictionary it uses, and the kind of layer it replaced.

    Parameters
    ----------
    spec : FactorSpec
        Shapes and storage types.
    layer_type : {"linear", "conv1d"}
        ``"conv1d"`` where the dense weight lies as [d_in, d_out] (GPT-2); the stored factor is the
        same.
    leader : str or None
        Name of the module that owns the dictionary; None where this one does.

    Raises
    ------
    InputError
        If `leader` and ``spec.owns_dictionary`` contradict each other.
    """

    spec: FactorSpec
    layer_type: LayerType = "linear"
    leader: str | None = None

    def __post_init__(self) -> None:
        if self.spec.owns_dictionary != (self.leader is None):
            raise InputError(
                "leader: expected a name for a spec that does not own its dictionary, and none for "
                f"one that does, got {brief(self.leader)}"
            )

    @classmethod
    def parse(cls, value: object, name: str) -> ModuleEntry:
        """Check one value of ``modules``; `name` is its key.

        What concerns several modules is left to `CospadiConfigData.check_sharing`.

        Raises
        ------
        CheckpointError
            Naming the module and the field.
        """
        where = f"{CONFIG_KEY}.modules.{name}"
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: expected an object, got {brief(value)}")
        for key in value:
            if key not in _REQUIRED and key not in _OPTIONAL:
                raise _newer(where, f"unknown key {brief(key)}")
        for key in _REQUIRED:
            if key not in value:
                raise CheckpointError(f"{where}: {key} is missing")
        for key, known in _ENUMS.items():
            if isinstance(value.get(key), str) and value[key] not in known:
                raise _newer(f"{where}.{key}", f"{brief(value[key])} is none of {', '.join(known)}")
        layer_type = value.get("layer_type", "linear")
        if not isinstance(layer_type, str):
            raise CheckpointError(f"{where}.layer_type: expected text, got {brief(layer_type)}")
        leader = value.get("dictionary", name)
        if not isinstance(leader, str):
            raise CheckpointError(f"{where}.dictionary: expected a name, got {brief(leader)}")
        fields = {key: value[key] for key in _REQUIRED}
        fields |= {key: value[key] for key in _SPEC_OPTIONAL if key in value}
        try:
            spec = FactorSpec(**fields, owns_dictionary=leader == name)
        except InputError as error:
            raise CheckpointError(f"{where}.{error}") from None
        return cls(spec, cast("LayerType", layer_type), None if spec.owns_dictionary else leader)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        spec = self.spec
        result: dict[str, Any] = {
            "d_in": spec.d_in,
            "d_out": spec.d_out,
            "n_atoms": spec.n_atoms,
            "sparsity": spec.sparsity,
            "support": spec.support,
            "bias": spec.bias,
            "dictionary_dtype": spec.dictionary_dtype,
            "coeffs_dtype": spec.coeffs_dtype,
            "layer_type": self.layer_type,
        }
        if spec.n_identity:
            result["n_identity"] = spec.n_identity
        if spec.coeffs_group:
            result["coeffs_group"] = spec.coeffs_group
        if self.leader is not None:
            result["dictionary"] = self.leader
        return result

    def tensors(self) -> dict[str, TensorSpec]:
        """Return what the file holds for this module, by the last part of the tensor name."""
        return {SENTINEL: TensorSpec(tuple(STORAGE_DTYPES), (0,)), **self.spec.tensors()}

    def factor_tensors(self, name: str) -> dict[str, str]:
        """Return the full tensor names of the factor of module `name`, by their names in `PARTS`.

        For a member that includes the dictionary of its leader.
        """
        owner = name if self.leader is None else self.leader
        dictionary = {part: f"{owner}.{part}" for part in self.spec.dictionary_tensors()}
        return dictionary | {
            part: f"{name}.{part}" for part in self.spec.tensors() if part not in dictionary
        }

    def version(self) -> int:
        """Return the first format version that can express this entry."""
        spec = self.spec
        is_first = (
            spec.owns_dictionary
            and spec.n_identity == 0
            and spec.coeffs_dtype in STORAGE_DTYPES
            and spec.dictionary_dtype in STORAGE_DTYPES
        )
        return 1 if is_first else 2


@dataclass
class CospadiConfigData:
    """The contents of ``quantization_config``.

    Parameters
    ----------
    modules : dict of str to ModuleEntry
        Compressed modules by their full name in the model.
    ratio, producer : dict
        Informative: what was reached (FORMAT.md defines the words) and what made the checkpoint.
        JSON types only.
    extra : dict
        Top-level keys that this version does not know; kept and written back.
    format_version : int
        Version that this was read from; `to_dict` always gives the newest.
    """

    modules: dict[str, ModuleEntry]
    ratio: dict[str, Any] = field(default_factory=dict)
    producer: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @classmethod
    def parse(cls, value: object) -> CospadiConfigData:
        """Check the ``quantization_config`` of an untrusted config.json.

        Parameters
        ----------
        value : object
            The parsed JSON value.

        Raises
        ------
        CheckpointError
            On the first field that is missing, of the wrong type, out of range or from a newer
            format.
        """
        if not isinstance(value, dict):
            raise CheckpointError(f"{CONFIG_KEY}: expected an object, got {brief(value)}")
        if value.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{CONFIG_KEY}.quant_method: expected {QUANT_METHOD!r}, "
                f"got {brief(value.get('quant_method'))}"
            )
        version = value.get("format_version")
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise CheckpointError(
                f"{CONFIG_KEY}.format_version: expected a positive integer, got {brief(version)}"
            )
        if version > FORMAT_VERSION:
            raise _newer(CONFIG_KEY, f"format_version {brief(version)}")
        objects: dict[str, dict[str, Any]] = {}
        for key in ("groups", "ratio", "producer"):
            item = value.get(key, {})
            if not isinstance(item, dict):
                raise CheckpointError(f"{CONFIG_KEY}.{key}: expected an object, got {brief(item)}")
            check_plain(item, f"{CONFIG_KEY}.{key}")
            objects[key] = item
        extra = {key: item for key, item in value.items() if key not in _TOP_LEVEL}
        check_plain(extra, CONFIG_KEY)
        data = cls(
            modules=_parse_modules(value.get("modules")),
            ratio=objects["ratio"],
            producer=objects["producer"],
            extra=extra,
            format_version=version,
        )
        data.check_sharing()
        _check_groups(objects["groups"], data.groups)
        for name, entry in data.modules.items():
            if entry.version() > version:
                raise CheckpointError(
                    f"{CONFIG_KEY}.modules.{name}: needs format_version {entry.version()}, "
                    f"got {version}"
                )
        return data

    @property
    def groups(self) -> dict[str, list[str]]:
        """Members of every shared dictionary by the name of its leader, in module order."""
        result: dict[str, list[str]] = {}
        for name, entry in self.modules.items():
            if entry.leader is not None:
                result.setdefault(entry.leader, []).append(name)
        return result

    def check_sharing(self) -> None:
        """Check that the leader of every member is there, leads itself and has what members expect.

        Raises
        ------
        CheckpointError
            Naming the member.
        """
        for name, entry in self.modules.items():
            if entry.leader is None:
                continue
            where = f"{CONFIG_KEY}.modules.{name}.dictionary"
            leader = self.modules.get(entry.leader)
            if leader is None:
                raise CheckpointError(f"{where}: {brief(entry.leader)} is no compressed module")
            if leader.leader is not None:
                raise CheckpointError(
                    f"{where}: {entry.leader} has no dictionary of its own, "
                    f"it uses that of {brief(leader.leader)}"
                )
            for key in ("d_in", "n_atoms", "n_identity", "dictionary_dtype"):
                ours, theirs = getattr(entry.spec, key), getattr(leader.spec, key)
                if ours != theirs:
                    raise CheckpointError(
                        f"{where}: {key} is {ours} here and {theirs} in {entry.leader}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form in the newest version; `parse` of it gives an equal object but for that."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "modules": {name: entry.to_dict() for name, entry in self.modules.items()},
            "groups": self.groups,
            "ratio": self.ratio,
            "producer": self.producer,
            "note": NOTE,
            **self.extra,
        }

    def expected_tensors(self) -> dict[str, TensorSpec]:
        """Return every tensor of the compressed modules by its full name."""
        return {
            f"{name}.{part}": spec
            for name, entry in self.modules.items()
            for part, spec in entry.tensors().items()
        }

    def removed_shares(self) -> dict[str, float]:
        """Return the removed share over all compressed modules in every convention (FORMAT.md §6)."""
        return removed_shares(entry.spec for entry in self.modules.values())

    def stored_bits(self) -> int:
        """Sum of `FactorSpec.stored_bits` over the modules."""
        return sum(entry.spec.stored_bits for entry in self.modules.values())

    def values_ratio(self) -> float:
        """Return the removed share of values over all compressed modules (mask not counted)."""
        return self.removed_shares()["values"]

    def stored_ratio(self) -> float:
        """Return the removed share of bytes over all compressed modules (mask counted)."""
        return self.removed_shares()["stored"]


def _check_groups(stated: dict[str, Any], groups: dict[str, list[str]]) -> None:
    """Check that ``groups`` says the same as the entries of the modules."""
    where = f"{CONFIG_KEY}.groups"
    for leader, members in stated.items():
        if not isinstance(members, list) or not all(isinstance(name, str) for name in members):
            raise CheckpointError(f"{where}.{brief_text(leader)}: expected a list of names")
    for leader in {**groups, **stated}:
        is_same = leader in groups and leader in stated
        if not is_same or sorted(groups[leader]) != sorted(stated[leader]):
            raise CheckpointError(
                f"{where}: contradicts the modules about the members of {brief_text(leader)}"
            )


def _parse_modules(value: object) -> dict[str, ModuleEntry]:
    where = f"{CONFIG_KEY}.modules"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected an object, got {brief(value)}")
    if not 0 < len(value) <= MAX_MODULES:
        raise CheckpointError(f"{where}: expected 1 to {MAX_MODULES} modules, got {len(value)}")
    for name in value:
        if (
            not isinstance(name, str)
            or len(name) > MAX_NAME_LENGTH
            or _NAME.fullmatch(name) is None
        ):
            raise CheckpointError(
                f"{where}: {brief(name)} is no module name (letters, digits, _ and - between dots)"
            )
    for name in value:
        parent = name
        while "." in parent:
            parent = parent.rpartition(".")[0]
            if parent in value:
                raise CheckpointError(
                    f"{where}: {brief_text(name)} lies inside {brief_text(parent)}"
                )
    return {name: ModuleEntry.parse(item, name) for name, item in value.items()}


def _newer(where: str, what: str) -> NewerFormatError:
    return NewerFormatError(
        f"{where}: {what}: made by a newer version, this one reads format {FORMAT_VERSION}; "
        "upgrade cospadi"
    )
