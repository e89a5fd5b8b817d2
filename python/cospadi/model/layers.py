"""The compressed linear layer, and putting it in the place of a dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from cospadi import ops
from cospadi.checkpoint.format import (
    CONFIG_KEY,
    SENTINEL,
    CospadiConfigData,
    LayerType,
    ModuleEntry,
)
from cospadi.errors import CheckpointError, InputError
from cospadi.factor import STORAGE_DTYPES, FactorSpec, SparseFactor, dtype_name


class CospadiLinear(nn.Module):
    """A projection ``y = (x @ dictionary) @ S + bias`` with a sparse code S.

    Parameters
    ----------
    spec : FactorSpec
        Shapes. ``spec.coeffs_dtype`` is the type that the coefficients are kept in; the kernel
        takes them as they are stored, whatever type it computes with.
    device : torch.device or str, optional
        Where the (uninitialised) tensors lie; ``"meta"`` allocates nothing.
    dtype : torch.dtype, optional
        Type of the dictionary and the bias, which is the type of the activations. By default the
        stored type of the dictionary. With full support the coefficients follow, because a dense
        product takes one type only.
    layer_type : {"linear", "conv1d"}
        Kind of the dense layer that this one replaces; only `dense` export needs it.

    Notes ----- State dict: ``dictionary`` [d_in, K], ``coeffs`` [d_out, s], ``mask`` uint8 [d_out,
    ceil(K / 8)] unless the support is full, ``bias`` [d_out] if there is one, and the empty
    ``weight`` [0] (see `cospadi.checkpoint.format.SENTINEL`).
    """

    dictionary: nn.Parameter
    coeffs: nn.Parameter
    bias: nn.Parameter | None
    mask: torch.Tensor | None
    weight: torch.Tensor

    def __init__(
        self,
        spec: FactorSpec,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        layer_type: LayerType = "linear",
    ) -> None:
        super().__init__()
        dtype = STORAGE_DTYPES[spec.dictionary_dtype] if dtype is None else dtype
        full = spec.support == "full"
        coeffs_dtype = dtype if full else STORAGE_DTYPES[spec.coeffs_dtype]
        self.in_features = spec.d_in
        self.out_features = spec.d_out
        self.layer_type: LayerType = layer_type
        self.dictionary = _frozen(torch.empty(spec.d_in, spec.n_atoms, device=device, dtype=dtype))
        self.coeffs = _frozen(
            torch.empty(spec.d_out, spec.sparsity, device=device, dtype=coeffs_dtype)
        )
        mask_shape = (spec.d_out, spec.mask_row_bytes)
        self.register_buffer(
            "mask", None if full else torch.empty(mask_shape, device=device, dtype=torch.uint8)
        )
        self.register_buffer(SENTINEL, torch.empty(0, device=device, dtype=dtype))
        bias = torch.empty(spec.d_out, device=device, dtype=dtype) if spec.bias else None
        self.register_parameter("bias", None if bias is None else _frozen(bias))

    @classmethod
    def from_factor(
        cls,
        factor: SparseFactor,
        *,
        dtype: torch.dtype | None = None,
        layer_type: LayerType = "linear",
    ) -> CospadiLinear:
        """Build the layer around the tensors of a factor.

        Parameters
        ----------
        factor : SparseFactor
            Its tensors are shared where they have the right type already.
        dtype : torch.dtype, optional
            Type of the activations, as in the constructor: a factor rounded to its stored type
            computes in a float32 model with ``dtype=torch.float32``.
        layer_type : {"linear", "conv1d"}
            As in the constructor.
        """
        layer = cls(factor.spec, device="meta", dtype=dtype, layer_type=layer_type)
        dtype = layer.dictionary.dtype
        layer.dictionary = _frozen(factor.dictionary.to(dtype))
        layer.coeffs = _frozen(factor.coeffs.to(layer.coeffs.dtype))
        layer.mask = factor.mask
        layer.weight = layer.dictionary.new_empty(0)
        layer.bias = None if factor.bias is None else _frozen(factor.bias.to(dtype))
        return layer

    def factor(self) -> SparseFactor:
        """Return the layer's tensors, shared."""
        return SparseFactor(
            dictionary=self.dictionary.detach(),
            mask=self.mask,
            coeffs=self.coeffs.detach(),
            bias=None if self.bias is None else self.bias.detach(),
        )

    @property
    def spec(self) -> FactorSpec:
        """Shapes and types of the tensors as they are now."""
        return self.factor().spec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `x` [..., d_in]; returns [..., d_out] in the type of `x`."""
        z = x @ self.dictionary  # [..., K]
        if self.mask is None:
            return F.linear(z, self.coeffs, self.bias)
        return ops.sparse_gemm(z, self.mask, self.coeffs, self.bias)

    def freeze(self) -> None:
        """Exclude the tensors from gradients; transformers' loader makes trainable ones."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def extra_repr(self) -> str:
        """Describe sizes for ``print(model)``."""
        n_atoms, sparsity = self.dictionary.shape[1], self.coeffs.shape[1]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_atoms={n_atoms}, "
            f"sparsity={sparsity}, bias={self.bias is not None}"
        )


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
        Type of dictionaries and biases; by default that of the replaced weight.

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
    layers: dict[str, nn.Module] = {}
    entries: dict[str, ModuleEntry] = {}
    for stored_name, entry in data.modules.items():
        name, dense = _find(model, stored_name)
        weight = _checked_weight(dense, entry, stored_name)
        entries[name] = entry
        layers[name] = CospadiLinear(
            entry.spec,
            device=weight.device,
            dtype=weight.dtype if dtype is None else dtype,
            layer_type=entry.layer_type,
        )
    replace_modules(model, layers)
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
        Storage type of dictionaries and coefficients; by default the type that they have in memory.
    ratio, producer : dict, optional
        Informative parts of the config.

    Raises
    ------
    InputError
        If nothing in the model is compressed.
    """
    layers = compressed_modules(model)
    if not layers:
        raise InputError("the model holds no compressed layer")
    entries = {name: ModuleEntry(m.spec, m.layer_type) for name, m in layers.items()}
    if dtype is not None:
        stored = dtype_name(dtype)
        for name, entry in entries.items():
            spec = replace(entry.spec, dictionary_dtype=stored, coeffs_dtype=stored)
            entries[name] = replace(entry, spec=spec)
    return CospadiConfigData(entries, ratio=ratio or {}, producer=producer or {})


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


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
