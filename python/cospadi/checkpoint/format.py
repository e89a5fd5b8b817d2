"""The checkpoint format, version 1: ``quantization_config`` and the tensors that follow from it.

FORMAT.md is the specification; this module is its implementation for the config. A config comes
from outside, so every field is checked before anything is allocated from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from cospadi.checkpoint.strict_json import brief_text, check_plain
from cospadi.errors import CheckpointError, InputError
from cospadi.factor import STORAGE_DTYPES, FactorSpec, brief

FORMAT_VERSION = 1
"""Version that this code writes, and the newest that it reads."""

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
_OPTIONAL = ("dictionary_dtype", "coeffs_dtype", "layer_type", "dictionary", "n_identity")
_ENUMS: dict[str, tuple[str, ...]] = {
    "support": ("mask", "full"),
    "layer_type": ("linear", "conv1d"),
    "dictionary_dtype": tuple(STORAGE_DTYPES),
    "coeffs_dtype": tuple(STORAGE_DTYPES),
}
_TOP_LEVEL = ("quant_method", "format_version", "modules", "groups", "ratio", "producer", "note")


@dataclass(frozen=True)
class TensorSpec:
    """What a file must hold under one name.

    ``dtypes`` are the admitted types by torch's names, ``shape`` is exact.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModuleEntry:
    """One compressed module: its factor and the kind of layer it replaced.

    ``layer_type`` is ``"conv1d"`` where the dense weight lies as [d_in, d_out] (GPT-2); the stored
    factor is the same.
    """

    spec: FactorSpec
    layer_type: LayerType = "linear"

    @classmethod
    def parse(cls, value: object, name: str) -> ModuleEntry:
        """Check one value of ``modules``; `name` is its key.

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
        if leader != name:
            raise _newer(where, f"a dictionary shared with {brief(leader)}")
        n_identity = value.get("n_identity", 0)
        if isinstance(n_identity, bool) or not isinstance(n_identity, int):
            raise CheckpointError(
                f"{where}.n_identity: expected an integer, got {brief(n_identity)}"
            )
        if n_identity != 0:
            raise _newer(where, f"{brief(n_identity)} identity atoms")
        fields = {key: value[key] for key in _REQUIRED}
        fields |= {key: value[key] for key in _OPTIONAL[:2] if key in value}
        try:
            return cls(FactorSpec(**fields), cast("LayerType", layer_type))
        except InputError as error:
            raise CheckpointError(f"{where}.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        spec = self.spec
        return {
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

    def tensors(self) -> dict[str, TensorSpec]:
        """Return what the file holds for this module, by the last part of the tensor name."""
        spec = self.spec
        result = {
            SENTINEL: TensorSpec((spec.dictionary_dtype,), (0,)),
            "dictionary": TensorSpec((spec.dictionary_dtype,), (spec.d_in, spec.n_atoms)),
            "coeffs": TensorSpec((spec.coeffs_dtype,), (spec.d_out, spec.sparsity)),
        }
        if spec.support == "mask":
            result["mask"] = TensorSpec(("uint8",), (spec.d_out, spec.mask_row_bytes))
        if spec.bias:
            result["bias"] = TensorSpec(tuple(STORAGE_DTYPES), (spec.d_out,))
        return result


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
    groups : dict
        Reserved for shared dictionaries; empty in version 1.
    extra : dict
        Top-level keys that this version does not know; kept and written back.
    """

    modules: dict[str, ModuleEntry]
    ratio: dict[str, Any] = field(default_factory=dict)
    producer: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
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
        if objects["groups"]:
            raise _newer(f"{CONFIG_KEY}.groups", "shared dictionaries")
        extra = {key: item for key, item in value.items() if key not in _TOP_LEVEL}
        check_plain(extra, CONFIG_KEY)
        return cls(
            modules=_parse_modules(value.get("modules")),
            ratio=objects["ratio"],
            producer=objects["producer"],
            groups=objects["groups"],
            extra=extra,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `parse` of it gives an equal object."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
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

    def stored_bits(self) -> int:
        """Sum of `FactorSpec.stored_bits` over the modules."""
        return sum(entry.spec.stored_bits for entry in self.modules.values())

    def values_ratio(self) -> float:
        """Return the removed share of values over all compressed modules (mask not counted)."""
        specs = [entry.spec for entry in self.modules.values()]
        return 1.0 - sum(s.n_values for s in specs) / sum(s.d_in * s.d_out for s in specs)

    def stored_ratio(self) -> float:
        """Return the removed share of bytes over all compressed modules (mask counted)."""
        return 1.0 - self.stored_bits() / sum(e.spec.dense_bits for e in self.modules.values())


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


def _newer(where: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {what}: made by a newer version, this one reads format {FORMAT_VERSION}; "
        "upgrade cospadi"
    )
