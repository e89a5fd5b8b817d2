"""Writing a compressed checkpoint as an ONNX model that ONNX Runtime runs with our operator library.

torch traces the model; every compressed layer becomes one node ``CospadiLinear`` of domain ``cospadi``, whose tensors
are initialisers in the form that the checkpoint has them in (FORMAT.md sections 4 and 5).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cospadi.checkpoint.atomic import check_vacant, new_folder
from cospadi.checkpoint.load import load
from cospadi.errors import InputError, install_command
from cospadi.factor.spec import dtype_name
from cospadi.model.layers import CospadiLinear, compressed_modules, replace_modules

OPERATOR = "cospadi::CospadiLinear"
OPSET = 1
MODEL_FILE = "model.onnx"

INPUTS = ("coeffs", "mask", "coeffs_scale", "dictionary", "dictionary_scale", "bias")
"""Inputs of a node after the activations; those that a layer does not have are left out."""

_HALVES = (torch.bfloat16, torch.float16)
_LEAST_WEIGHT = 1024
"""Weights with fewer elements stay as they are: a node more costs as much as half of their bytes."""


def export_onnx(path: str | Path, out_dir: str | Path) -> Path:
    """Write ``model.onnx``, its weights beside it, and the tokenizer.

    The model maps ``input_ids`` int64 [batch, sequence] to ``logits`` float32 [batch, sequence, vocabulary], for any
    batch and sequence, all tokens of a row attended causally: without padding and without a cache of keys and values.
    It computes in float32. Weights are stored as in the checkpoint: in 16 bits where that loses nothing.

    Parameters
    ----------
    path : str or Path
        The compressed checkpoint.
    out_dir : str or Path
        Must not exist or be an empty folder.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be loaded.
    InputError
        If the folder is taken or unwritable, a package is missing, or torch cannot export this architecture.

    Notes
    -----
    Needs the packages onnx and onnxscript (the extra ``onnx``). Memory: the model in float32, and its compressed layers
    a second time.
    """
    check_vacant(out_dir)
    _check_packages()
    model, tokenizer = load(path, dtype=torch.float32)
    program = _trace(model, str(path))
    _narrow_weights(program.model)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with the paths of this machine
    with new_folder(out_dir) as folder:
        program.save(folder / MODEL_FILE, external_data=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(out_dir)


class OnnxLinear(nn.Module):
    """A compressed layer while it is traced: a call of our operator, with tensors in their stored types.

    Parameters
    ----------
    layer : CospadiLinear
        The layer, in float32.
    stored : dict
        Tensors in their stored types by the address of the tensors that layers hold, so that a shared dictionary stays
        one tensor.
    """

    def __init__(self, layer: CospadiLinear, stored: dict[int, torch.Tensor]) -> None:
        super().__init__()
        spec = layer.spec
        owner = layer.leader
        for part in INPUTS:
            tensor = getattr(owner if part.startswith("dictionary") else layer, part)
            self.register_buffer(part, None if tensor is None else _stored(tensor, stored))
        coeffs_dtype = (
            spec.coeffs_dtype
            if spec.is_packed
            else dtype_name(cast("torch.Tensor", self.coeffs).dtype)
        )
        dictionary = cast("torch.Tensor | None", self.dictionary)
        self.d_out = spec.d_out
        self.attributes: dict[str, Any] = {
            "d_in": spec.d_in,
            "d_out": spec.d_out,
            "n_atoms": spec.n_atoms,
            "n_identity": spec.n_identity,
            "sparsity": spec.sparsity,
            "support": spec.support,
            "coeffs_dtype": coeffs_dtype,
            "coeffs_group": spec.coeffs_group,
            "dictionary_dtype": "bfloat16" if dictionary is None else dtype_name(dictionary.dtype),
            "bias": int(spec.bias),
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Stand for the projection of `x` [..., d_in]: right shape and type, no values."""
        result: torch.Tensor = torch.onnx.ops.symbolic(
            OPERATOR,
            [x, *(getattr(self, part) for part in INPUTS)],
            attrs=self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.d_out),
            version=OPSET,
        )
        return result


class _Logits(nn.Module):
    """A causal language model as a function of token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"export --onnx: {' and '.join(missing)} not installed; {install_command('onnx')}"
        )


def _stored(tensor: torch.Tensor, stored: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return `tensor` in the 16 bits it came from, where that loses nothing; one result per tensor."""
    if id(tensor) not in stored:
        stored[id(tensor)] = _narrowed(tensor.detach())
    return stored[id(tensor)]


def _narrowed(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.float32:
        return tensor
    for dtype in _HALVES:
        half = tensor.to(dtype)
        if torch.equal(half.float(), tensor):
            return half
    return tensor


def _trace(model: nn.Module, name: str) -> Any:  # noqa: ANN401
    """Return torch's ONNX program of a model, whose compressed layers are replaced in place."""
    stored: dict[int, torch.Tensor] = {}
    layers = compressed_modules(model)
    replace_modules(model, {key: OnnxLinear(layer, stored) for key, layer in layers.items()})
    # Sizes of 1 would be taken for constants.
    example = torch.zeros(2, 5, dtype=torch.int64)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    try:
        with torch.no_grad(), _quiet():
            return torch.onnx.export(
                _Logits(model).eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=(dynamic,),
                input_names=["input_ids"],
                output_names=["logits"],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        first = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"{name}: torch cannot export {type(model).__name__} to ONNX ({first}); "
            "the dense export (--dense) works for every architecture"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what torch's exporter says of packages that it could use and of its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _narrow_weights(model: Any) -> None:  # noqa: ANN401
    """Store the float32 weights of ordinary operators in 16 bits and cast them, where that loses nothing.

    ONNX Runtime computes the casts once, when it loads the model.
    """
    import onnx_ir as ir

    graph = model.graph
    for value in list(graph.initializers.values()):
        uses = value.uses()
        if (
            value.dtype != ir.DataType.FLOAT
            or value.const_value.size < _LEAST_WEIGHT
            or any(use.node.domain == "cospadi" for use in uses)
        ):
            continue
        tensor = torch.from_numpy(value.const_value.numpy().copy())
        half = _narrowed(tensor)
        if half.dtype == torch.float32:
            continue
        constant = ir.tensor(half, name=f"{value.name}.stored")
        stored = ir.Value(
            name=constant.name,
            type=ir.TensorType(constant.dtype),
            shape=constant.shape,
            const_value=constant,
        )
        cast_node = ir.node("Cast", [stored], attributes={"to": int(ir.DataType.FLOAT)})
        result = cast_node.outputs[0]
        result.name, result.type, result.shape = f"{value.name}.float", value.type, value.shape
        for use in uses:
            use.node.replace_input_with(use.idx, result)
        del graph.initializers[value.name]
        graph.initializers[stored.name] = stored
        graph.insert_before(next(iter(graph)), cast_node)
