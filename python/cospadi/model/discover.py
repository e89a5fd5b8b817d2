"""Finding the linear layers to compress, and saying what is left out and why.

A target is an ``nn.Linear`` or a GPT-2 style ``Conv1D`` inside a decoder block. Embeddings, the output head (tied or
not) and norms are never targets. Matrices in the blocks that are no linear layers, such as the fused expert tensors of
mixture-of-experts models, are reported as `Skipped`.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from cospadi.errors import InputError

LayerType = Literal["linear", "conv1d"]

# Sibling projections that every known model family feeds with one tensor. Only a forecast for plans made without
# running the model: at calibration time the identity of the tensor decides.
_INPUT_FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# Gates and routers: a factor of so small a matrix saves nothing and errors in it change the routing.
_SMALLEST_SIDE = 16


@dataclass(frozen=True)
class TargetLinear:
    """One linear layer to compress.

    Attributes
    ----------
    name
        Module name in the model, for example ``model.layers.0.self_attn.q_proj``.
    layer_type
        ``"linear"``: weight stored as [d_out, d_in]; ``"conv1d"``: weight stored as [d_in, d_out].
    d_in, d_out
        Number of input and output features.
    has_bias
        Whether the layer adds a bias (kept as it is).
    input_group
        Name of the first module that is expected to see the same input; its own name if alone.
    block
        Index of the decoder block, None outside the blocks.
    projection
        Name within the block, for example ``self_attn.q_proj``: equal for the same layer of every block.
    n_readers
        Linears that are expected to see the same input, this one and those that are no targets included.
    """

    name: str
    layer_type: LayerType
    d_in: int
    d_out: int
    has_bias: bool
    input_group: str
    block: int | None
    projection: str
    n_readers: int = 1


@dataclass(frozen=True)
class Skipped:
    """A matrix in the decoder blocks that stays dense, and the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str


def discover(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> tuple[list[TargetLinear], list[Skipped]]:
    """List the linear layers to compress, in module order, and the matrices that are left out.

    Parameters
    ----------
    model
        Causal language model; may lie on the meta device.
    targets
        Regular expressions, each matched against whole module names (``re.fullmatch``). None means every linear
        layer inside the decoder blocks; given patterns may also name linear layers outside the blocks.
    ignore
        Regular expressions of modules to leave dense, applied after `targets`.

    Returns
    -------
    targets, skipped
        `skipped` holds what a reader of `targets` could expect and will miss: fused expert tensors and other
        matrices in the blocks, layers matched by `ignore`, and layers with a side below 16 features.

    Raises
    ------
    InputError
        A pattern is no regular expression or matches no linear layer (near names are listed), or nothing is left
        to compress.
    """
    blocks = decoder_blocks(model)
    candidates = {name: module for name, module in _linears(model) if not _is_head(model, module)}
    skipped = list(_other_matrices(blocks))
    if targets is None:
        chosen = {name for name in candidates if _block_of(name, blocks) is not None}
        for name in sorted(chosen, key=list(candidates).index):
            d_in, d_out = _features(candidates[name])
            if min(d_in, d_out) < _SMALLEST_SIDE:
                chosen.discard(name)
                reason = f"too small to gain from a factorisation (a side below {_SMALLEST_SIDE})"
                skipped.append(Skipped(name, (d_out, d_in), reason))
    else:
        chosen = set()
        for pattern in targets:
            chosen.update(match_names(pattern, candidates, argument="targets"))
    for pattern in ignore or ():
        for name in match_names(pattern, candidates, argument="ignore"):
            if name in chosen:
                chosen.discard(name)
                d_in, d_out = _features(candidates[name])
                skipped.append(
                    Skipped(name, (d_out, d_in), f"matched by ignore pattern {pattern!r}")
                )
    if not chosen:
        left_out = (
            f"; {len(skipped)} matrices skipped, first {skipped[0].name}: {skipped[0].reason}"
            if skipped
            else ""
        )
        raise InputError(
            f"nothing to compress: no linear layer of {type(model).__name__}'s decoder blocks is selected{left_out}"
        )
    found = [_describe(name, candidates[name], blocks) for name in candidates if name in chosen]
    readers = Counter(_family(name, _features(module)[0]) for name, module in candidates.items())
    return _with_input_groups(found, readers), skipped


def match_names(pattern: str, names: Iterable[str], *, argument: str) -> list[str]:
    """Return the names that a pattern matches completely.

    Parameters
    ----------
    pattern
        Regular expression for `re.fullmatch`.
    names
        Names to choose from.
    argument
        Name of the setting the pattern came from, for the error message.

    Raises
    ------
    InputError
        The pattern is no regular expression, or matches nothing; the message lists near names.
    """
    try:
        expression = re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise InputError(
            f"{argument} pattern {pattern!r} is not a regular expression: {error}"
        ) from error
    names = list(names)
    matched = [name for name in names if expression.fullmatch(name)]
    if not matched:
        raise InputError(
            f"{argument} pattern {pattern!r} matches no linear layer: {_nearest(expression, names)}"
        )
    return matched


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return name and module of each decoder block in order.

    The blocks are the outermost ``nn.ModuleList`` of the model's decoder that holds most parameters: this is what
    every decoder of transformers has, whatever it calls it.

    Raises
    ------
    InputError
        There is no such list.
    """
    prefix, decoder = _decoder(model)
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in decoder.named_modules(prefix=prefix):
        inside_another = any(name.startswith(outer + ".") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not inside_another:
            lists.append((name, module))
    if not lists:
        raise InputError(
            f"nothing to compress: {type(model).__name__} has no list of decoder blocks"
        )
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks)]


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """What turns token ids into hidden states; None where the model does not say."""
    find = getattr(model, "get_input_embeddings", None)
    found = find() if callable(find) else None
    return found if isinstance(found, nn.Module) else None


def weight_of(model: nn.Module, target: TargetLinear) -> tuple[Tensor, Tensor | None]:
    """Return a target's weight in torch orientation, and its bias.

    Returns
    -------
    weight
        [d_out, d_in], float32, contiguous, detached. It may share memory with the model: do not write to it.
    bias
        [d_out], float32, or None.
    """
    module = model.get_submodule(target.name)
    weight = module.get_parameter("weight").detach()
    if target.layer_type == "conv1d":
        weight = weight.T
    bias = module.get_parameter("bias").detach().float() if target.has_bias else None
    return weight.to(torch.float32).contiguous(), bias


def _decoder(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the part of the model below the head, with its module name."""
    find = getattr(model, "get_decoder", None)
    decoder = find() if callable(find) else None
    if isinstance(decoder, nn.Module):
        for name, module in model.named_modules():
            if module is decoder:
                return name, module
    return "", model


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or _is_conv1d(module):
            yield name, module


def _is_head(model: nn.Module, module: nn.Module) -> bool:
    """Tell whether a linear layer is the output head, or holds the embedding's weight."""
    for getter in ("get_output_embeddings", "get_input_embeddings"):
        find = getattr(model, getter, None)
        embeddings = find() if callable(find) else None
        if embeddings is module:
            return True
        weight = getattr(embeddings, "weight", None)
        if weight is not None and weight is getattr(module, "weight", None):
            return True
    return False


def _features(module: nn.Module) -> tuple[int, int]:
    """Return d_in, d_out."""
    first, second = module.get_parameter("weight").shape
    return (first, second) if _is_conv1d(module) else (second, first)


def _block_of(name: str, blocks: Sequence[tuple[str, nn.Module]]) -> int | None:
    for i, (prefix, _) in enumerate(blocks):
        if name.startswith(prefix + "."):
            return i
    return None


def _describe(
    name: str, module: nn.Module, blocks: Sequence[tuple[str, nn.Module]]
) -> TargetLinear:
    d_in, d_out = _features(module)
    block = _block_of(name, blocks)
    return TargetLinear(
        name=name,
        layer_type="conv1d" if _is_conv1d(module) else "linear",
        d_in=d_in,
        d_out=d_out,
        has_bias=getattr(module, "bias", None) is not None,
        input_group=name,
        block=block,
        projection=name if block is None else name[len(blocks[block][0]) + 1 :],
    )


_Family = tuple[str, int | str, int]


def _family(name: str, d_in: int) -> _Family:
    """What siblings with one input have in common; a linear without siblings has its own."""
    parent, _, last = name.rpartition(".")
    number = next((n for n, family in enumerate(_INPUT_FAMILIES) if last in family), None)
    return (parent, last if number is None else number, d_in)


def _with_input_groups(
    found: Sequence[TargetLinear], readers: Mapping[_Family, int]
) -> list[TargetLinear]:
    leaders: dict[_Family, str] = {}
    grouped = []
    for target in found:
        family = _family(target.name, target.d_in)
        leader = leaders.setdefault(family, target.name)
        grouped.append(replace(target, input_group=leader, n_readers=readers[family]))
    return grouped


def _other_matrices(blocks: Sequence[tuple[str, nn.Module]]) -> Iterator[Skipped]:
    """Report the matrices in the blocks that belong to no linear layer."""
    for prefix, block in blocks:
        for name, module in block.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear) or _is_conv1d(module):
                continue
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2:
                    continue
                kind = type(module).__name__
                if parameter.ndim == 3 and not isinstance(module, nn.modules.conv._ConvNd):
                    reason = f"fused 3-D tensor of {kind} (experts): not supported yet, stays dense"
                else:
                    reason = f"{kind} is not a linear layer, stays dense"
                yield Skipped(f"{name}.{parameter_name}", tuple(parameter.shape), reason)


def _nearest(expression: re.Pattern[str], names: Sequence[str]) -> str:
    """Say what the writer of a pattern without a match may have meant."""
    inside = [name for name in names if expression.search(name)]
    if inside and expression.pattern:
        return (
            f"it must match the whole name, such as {inside[0]!r}; try '.*{expression.pattern}.*'"
        )
    # compare without the regular expression's own characters, with whole names and with their last parts
    plain = re.sub(r"[^\w.]+", "", expression.pattern.replace("\\", "").replace(".*", "")).strip(
        "."
    )
    by_text = {name.rpartition(".")[2]: name for name in reversed(names)} | {
        name: name for name in names
    }
    near = [by_text[text] for text in difflib.get_close_matches(plain, by_text, n=3, cutoff=0.6)]
    listed = ", ".join(repr(name) for name in dict.fromkeys(near or names[:3]))
    return f"{'near names' if near else 'names look like'}: {listed}"
