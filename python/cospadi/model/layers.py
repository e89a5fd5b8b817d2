"""The compressed linear layer, and putting it in the place of a dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from cospadi.checkpoint.format import (
    CONFIG_KEY,
    SENTINEL,
    CospadiConfigData,
    LayerType,
    ModuleEntry,
)
from cospadi.errors import CheckpointError, InputError
from cospadi.factor.sparse_factor import Packing, SparseFactor
from cospadi.factor.spec import PARTS, STORAGE_DTYPES, FactorSpec, dtype_name
from cospadi.linear_op import linear

SCALES = ("dictionary_scale", "coeffs_scale")
"""Tensors that casts of a model leave alone: float16 would lose small scales."""


class CospadiLinear(nn.Module):
    """A projection ``y = z S + bias`` with a sparse code S, and ``z = x D`` or ``[x ; x D]``.

    Parameters
    ----------
    spec : FactorSpec
        Shapes and storage types. Coefficients are kept in ``spec.coeffs_dtype``, packed ones as they
        lie in the file: the kernels take them so, whatever type they compute with.
    device : torch.device or str, optional
        Where the (uninitialised) tensors lie; ``"meta"`` allocates nothing.
    dtype : torch.dtype, optional
        Type of a floating-point dictionary and of the bias, which is the type of the activations. By
        default the stored type of the dictionary, or of the coefficients where there is no
        dictionary; bfloat16 if those are integers. With full support floating-point coefficients
        follow, because a dense product takes one type only.
    layer_type : {"linear", "conv1d"}
        Kind of the dense layer that this one replaces; only `dense` export needs it.
    leader : CospadiLinear, optional
        The layer that owns the dictionary, for a spec that does not own it.

    Raises
    ------
    InputError
        If a member has no leader or one with another dictionary, or an owner has a leader.

    Notes
    -----
    State dict: the tensors of ``spec.tensors()`` under their names, and the empty ``weight`` [0] (see
    `cospadi.checkpoint.format.SENTINEL`). Floating-point dictionaries, coefficients and biases are
    parameters; masks, integers and scales are buffers, which casts of the model leave alone.

    A member has no dictionary of its own. It holds its leader outside of the module tree and reads
    the leader's tensors in every forward, so that a model's state dict has them once, and loading,
    casting, moving and copying the model need no care.
    """

    dictionary: torch.Tensor | None
    dictionary_scale: torch.Tensor | None
    mask: torch.Tensor | None
    coeffs: torch.Tensor
    coeffs_scale: torch.Tensor | None
    bias: nn.Parameter | None
    weight: torch.Tensor

    def __init__(
        self,
        spec: FactorSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layer_type: LayerType = "linear",
        leader: CospadiLinear | None = None,
    ) -> None:
        super().__init__()
        _check_leader(spec, leader)
        dtype = _activation_dtype(spec) if dtype is None else dtype
        self.in_features = spec.d_in
        self.out_features = spec.d_out
        self.n_identity = spec.n_identity
        self.packing = (
            Packing(spec.coeffs_dtype, spec.sparsity, spec.coeffs_group) if spec.is_packed else None
        )
        self.layer_type: LayerType = layer_type
        # In a tuple, since a module as an attribute would become a submodule with a second name.
        self._leader = () if leader is None else (leader,)
        tensors = spec.tensors()
        follows = {"dictionary", "bias"} | ({"coeffs"} if spec.support == "full" else set())
        for part in PARTS:
            expected = tensors.get(part)
            if expected is None:
                self.register_parameter(part, None)
                continue
            stored = getattr(torch, expected.dtypes[0])
            part_dtype = dtype if part in follows and stored.is_floating_point else stored
            self._place(part, torch.empty(expected.shape, device=device, dtype=part_dtype))
        self.register_buffer(SENTINEL, torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def from_factor(
        cls,
        factor: SparseFactor,
        *,
        dtype: torch.dtype | None = None,
        layer_type: LayerType = "linear",
        leader: CospadiLinear | None = None,
    ) -> CospadiLinear:
        """Build the layer around the tensors of a factor.

        Parameters
        ----------
        factor : SparseFactor
            Its tensors are shared where they have the right type already. The dictionary of a member
            is not taken: that of `leader` is used.
        dtype : torch.dtype, optional
            Type of the activations, as in the constructor: a factor rounded to its stored type
            computes in a float32 model with ``dtype=torch.float32``.
        layer_type : {"linear", "conv1d"}
            As in the constructor.
        leader : CospadiLinear, optional
            As in the constructor.

        Raises
        ------
        InputError
            As in the constructor.
        """
        layer = cls(factor.spec, device="meta", dtype=dtype, layer_type=layer_type, leader=leader)
        tensors = factor.tensors()
        for part in factor.spec.tensors():
            tensor = tensors[part]
            if tensor.is_floating_point() and part not in SCALES:
                tensor = tensor.to(getattr(layer, part).dtype)
            layer._place(part, tensor)
        layer.weight = torch.empty(0, dtype=layer.weight.dtype, device=factor.coeffs.device)
        return layer

    def _place(self, part: str, tensor: torch.Tensor) -> None:
        if tensor.is_floating_point() and part not in SCALES:
            self.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(part, tensor)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> CospadiLinear:
        """Move or cast, as all of `torch.nn.Module`'s ways do; scales keep their type and value."""
        scales = {part: t for part in SCALES if (t := self._buffers.get(part)) is not None}
        super()._apply(fn, recurse)
        for part, scale in scales.items():
            moved = cast("torch.Tensor", self._buffers[part])
            if moved.dtype != scale.dtype:
                self._buffers[part] = scale.to(moved.device)
        return self

    @property
    def leader(self) -> CospadiLinear:
        """The layer that owns the dictionary: this one, unless it is a member."""
        return self._leader[0] if self._leader else self

    def factor(self) -> SparseFactor:
        """Return the layer's tensors, shared; for a member with its leader's dictionary."""
        owner = self.leader
        return SparseFactor(
            dictionary=None if owner.dictionary is None else owner.dictionary.detach(),
            mask=self.mask,
            coeffs=self.coeffs.detach(),
            bias=None if self.bias is None else self.bias.detach(),
            dictionary_scale=owner.dictionary_scale,
            coeffs_scale=self.coeffs_scale,
            packing=self.packing,
            n_identity=self.n_identity,
            owns_dictionary=not self._leader,
        )

    @property
    def spec(self) -> FactorSpec:
        """Shapes and types of the tensors as they are now."""
        return self.factor().spec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `x` [..., d_in]; returns [..., d_out] in the type of `x`."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:  # the operator knows no layer
            got = "a scalar" if x.dim() == 0 else x.shape[-1]
            raise InputError(
                f"x: expected {self.in_features} features in the last dimension, got {got}"
            )
        dictionary, dictionary_scale = self._dictionary_on(x.device)
        packing = self.packing
        if packing is None:
            form: tuple[int, str | None, int] = (self.coeffs.shape[1], None, 0)
        else:
            form = (packing.sparsity, packing.dtype, packing.group)
        sparsity, code_format, group = form
        return linear(
            x,
            dictionary,
            dictionary_scale,
            self.n_identity > 0,
            self.mask,
            self.coeffs,
            sparsity,
            code_format,
            self.coeffs_scale,
            group,
            self.bias,
        )

    def _dictionary_on(
        self, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        owner = self.leader
        dictionary, scale = owner.dictionary, owner.dictionary_scale
        # Layers of a model may be spread over devices, and then a member over its leader's.
        if self._leader and dictionary is not None and dictionary.device != device:
            if dictionary.is_meta:
                raise InputError(
                    "a shared dictionary is off-loaded while a layer on another device uses it: "
                    "put all layers that share it on one device of the device_map"
                )
            dictionary = dictionary.to(device)
            scale = None if scale is None else scale.to(device)
        return dictionary, scale

    def freeze(self) -> None:
        """Exclude the tensors from gradients; transformers' loader makes trainable ones."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def extra_repr(self) -> str:
        """Describe sizes for ``print(model)``."""
        spec = self.spec
        text = (
            f"in_features={spec.d_in}, out_features={spec.d_out}, n_atoms={spec.n_atoms}, "
            f"sparsity={spec.sparsity}, bias={spec.bias}"
        )
        if spec.n_identity:
            text += f", n_identity={spec.n_identity}"
        if spec.is_packed:
            text += f", coeffs={spec.coeffs_dtype}"
        return text if spec.owns_dictionary else f"{text}, shared dictionary"


def build_layers(
    factors: Mapping[str, SparseFactor],
    leaders: Mapping[str, str],
    *,
    layer_types: Mapping[str, LayerType] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, CospadiLinear]:
    """Build the layers of several factors, members with their leaders.

    Parameters
    ----------
    factors : mapping of str to SparseFactor
        By module name.
    leaders : mapping of str to str
        Name of the leader by that of each member.
    layer_types : mapping of str to str, optional
        As in `CospadiLinear`; ``"linear"`` where a name is missing.
    dtype : torch.dtype, optional
        As in `CospadiLinear.from_factor`.

    Returns
    -------
    dict of str to CospadiLinear
        In the order of `factors`.

    Raises
    ------
    InputError
        If a leader is missing, is a member itself, or has another dictionary than its member expects.
    """
    for name, leader in leaders.items():
        if leader not in factors or leader in leaders:
            raise InputError(f"{name}: its leader {leader} owns no dictionary among the factors")
    layers: dict[str, CospadiLinear] = {}
    for name in sorted(factors, key=leaders.__contains__):  # leaders first
        layers[name] = CospadiLinear.from_factor(
            factors[name],
            dtype=dtype,
            layer_type=(layer_types or {}).get(name, "linear"),
            leader=layers[leaders[name]] if name in leaders else None,
        )
    return {name: layers[name] for name in factors}


def compressed_modules(model: nn.Module) -> dict[str, CospadiLinear]:
    """Return the compressed layers of a model by name, in module order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CospadiLinear)}


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of those with the same names, in `model` itself.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    modules : mapping of str to torch.nn.Module
        New modules by full name.

    Raises
    ------
    InputError
        If the model has no module of that name; nothing has been replaced then.
    """
    parents = {name: _parent(model, name) for name in modules}
    for name, module in modules.items():
        module.train(model.training)
        setattr(parents[name], name.rpartition(".")[2], module)


def convert_to_compressed(
    model: nn.Module,
    data: CospadiConfigData,
    *,
    dtype: torch.dtype | None = None,
) -> CospadiConfigData:
    """Replace the dense layers that `data` names by uninitialised compressed ones.

    Parameters
    ----------
    model : torch.nn.Module
        A dense model, usually on the meta device; each new layer is made on the device of the old
        one.
    data : CospadiConfigData
        Names, sizes and kinds. A name also matches with the model's ``base_model_prefix`` removed
        or added, so that the headless model of an architecture loads as well.
    dtype : torch.dtype, optional
        Type of floating-point dictionaries and biases; by default that of the replaced weight.

    Returns
    -------
    CospadiConfigData
        `data` with the names that this model uses.

    Raises
    ------
    CheckpointError
        If a named module is absent, is not a linear layer, or has other sizes; nothing has been
        replaced then.
    """
    found = {stored: _find(model, stored) for stored in data.modules}
    weights = {
        stored: _checked_weight(dense, data.modules[stored], stored)
        for stored, (_, dense) in found.items()
    }
    layers: dict[str, CospadiLinear] = {}
    for stored in sorted(data.modules, key=lambda name: data.modules[name].leader is not None):
        entry, weight = data.modules[stored], weights[stored]
        layers[stored] = CospadiLinear(
            entry.spec,
            device=weight.device,
            dtype=weight.dtype if dtype is None else dtype,
            layer_type=entry.layer_type,
            leader=None if entry.leader is None else layers[entry.leader],
        )
    replace_modules(model, {found[stored][0]: layer for stored, layer in layers.items()})
    entries = {
        found[stored][0]: replace(
            entry, leader=None if entry.leader is None else found[entry.leader][0]
        )
        for stored, entry in data.modules.items()
    }
    return replace(data, modules=entries)


def describe_modules(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    ratio: dict[str, Any] | None = None,
    producer: dict[str, Any] | None = None,
) -> CospadiConfigData:
    """Make the config of a model from the compressed layers that it holds.

    Parameters
    ----------
    model : torch.nn.Module
        A model with at least one `CospadiLinear`.
    dtype : torch.dtype, optional
        Storage type of floating-point dictionaries and coefficients; by default the type that they
        have in memory. Integers and packed coefficients stay as they are.
    ratio, producer : dict, optional
        Informative parts of the config.

    Raises
    ------
    InputError
        If nothing in the model is compressed, or a member's leader is not in the model.
    """
    layers = compressed_modules(model)
    if not layers:
        raise InputError("the model holds no compressed layer")
    names = {layer: name for name, layer in layers.items()}
    entries: dict[str, ModuleEntry] = {}
    for name, layer in layers.items():
        if layer.leader not in names:
            raise InputError(f"{name}: the layer that owns its dictionary is not in the model")
        spec = layer.spec
        if dtype is not None:
            spec = _stored_in(spec, dtype_name(dtype))
        leader = None if spec.owns_dictionary else names[layer.leader]
        entries[name] = ModuleEntry(spec, layer.layer_type, leader)
    return CospadiConfigData(entries, ratio=ratio or {}, producer=producer or {})


def _stored_in(spec: FactorSpec, dtype: str) -> FactorSpec:
    """Return `spec` with another floating-point type of dictionary and coefficients."""
    has_float_atoms = spec.n_atoms > 0 and spec.dictionary_dtype in STORAGE_DTYPES
    return replace(
        spec,
        dictionary_dtype=dtype if has_float_atoms else spec.dictionary_dtype,
        coeffs_dtype=spec.coeffs_dtype if spec.is_packed else dtype,
    )


def _activation_dtype(spec: FactorSpec) -> torch.dtype:
    stored = spec.dictionary_dtype if spec.n_atoms else spec.coeffs_dtype
    return STORAGE_DTYPES.get(stored, torch.bfloat16)


def _check_leader(spec: FactorSpec, leader: CospadiLinear | None) -> None:
    if spec.owns_dictionary != (leader is None):
        raise InputError(
            "leader: expected the layer that owns the dictionary for a spec that does not own it, "
            f"and None for one that does, got {'None' if leader is None else 'a layer'}"
        )
    if leader is None:
        return
    theirs = leader.spec
    if not theirs.owns_dictionary:
        raise InputError("leader: expected the layer that owns the dictionary, got a member")
    for key in ("d_in", "n_atoms", "n_identity"):
        if getattr(spec, key) != getattr(theirs, key):
            raise InputError(
                f"leader: expected {key} = {getattr(spec, key)}, got {getattr(theirs, key)}"
            )
    if spec.dictionary_dtype != theirs.dictionary_dtype and not (
        spec.dictionary_dtype in STORAGE_DTYPES and theirs.dictionary_dtype in STORAGE_DTYPES
    ):
        raise InputError(
            f"leader: expected a dictionary of {spec.dictionary_dtype}, "
            f"got {theirs.dictionary_dtype}"
        )


def _parent(model: nn.Module, name: str) -> nn.Module:
    prefix, _, last = name.rpartition(".")
    try:
        parent = model.get_submodule(prefix)
        parent.get_submodule(last)
    except AttributeError:
        raise InputError(f"{name}: the model has no such module") from None
    return parent


def _find(model: nn.Module, stored_name: str) -> tuple[str, nn.Module]:
    prefix = getattr(model, "base_model_prefix", "")
    names = [stored_name]
    if isinstance(prefix, str) and prefix:
        names += [stored_name.removeprefix(f"{prefix}."), f"{prefix}.{stored_name}"]
    for name in names:
        try:
            return name, model.get_submodule(name)
        except AttributeError:
            continue
    raise CheckpointError(
        f"{stored_name}: {type(model).__name__} has no such module; "
        "config.json describes another architecture"
    )


def _checked_weight(dense: nn.Module, entry: ModuleEntry, name: str) -> torch.Tensor:
    spec = entry.spec
    # By class name, because torch alone must suffice here; Conv1D is transformers' transposed
    # linear layer of GPT-2.
    kind = "conv1d" if type(dense).__name__ == "Conv1D" else "linear"
    if kind == "linear" and not isinstance(dense, nn.Linear):
        raise CheckpointError(
            f"{name}: expected a linear layer, the model has {type(dense).__name__}"
        )
    if kind != entry.layer_type:
        raise CheckpointError(
            f"{name}: config.json says layer_type {entry.layer_type}, the model has {kind}"
        )
    weight = cast("torch.Tensor", dense.weight)
    expected = (spec.d_in, spec.d_out) if kind == "conv1d" else (spec.d_out, spec.d_in)
    if tuple(weight.shape) != expected:
        raise CheckpointError(
            f"{name}: the model's weight is {list(weight.shape)}, "
            f"{CONFIG_KEY} gives {list(expected)}"
        )
    if (dense.bias is not None) != spec.bias:
        raise CheckpointError(
            f"{name}: the model has {'a' if dense.bias is not None else 'no'} bias, "
            f"{CONFIG_KEY} says bias = {str(spec.bias).lower()}"
        )
    return weight
