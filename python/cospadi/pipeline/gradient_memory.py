"""What running calibration text backwards takes, from shapes: parts of `cospadi.pipeline.memory`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from cospadi.calibration.backward import BATCH_TOKENS, HEAD_TOKENS, HEAD_VALUES, LARGE_VOCABULARY
from cospadi.calibration.probe import PROBE_BYTES
from cospadi.model.discover import TargetLinear, decoder_blocks, input_embeddings
from cospadi.pipeline.costs import SLOPE_RATIOS, embedding_width
from cospadi.pipeline.recipe import Recipe


def backward_batch(recipe: Recipe) -> int:
    """Windows of a backward pass."""
    return min(max(1, BATCH_TOKENS // recipe.sequence_length), recipe.backward_windows)


def depth_bytes(
    model: nn.Module, targets: Sequence[TargetLinear], recipe: Recipe, n_windows: int
) -> int:
    """Hidden states of windows between all blocks."""
    n_depths = len(decoder_blocks(model)) + 1
    n_tokens = min(n_windows, recipe.samples) * recipe.sequence_length
    return 4 * n_depths * n_tokens * embedding_width(model, targets)


def gradient_bytes(model: nn.Module, targets: Sequence[TargetLinear], recipe: Recipe) -> int:
    """What one batch takes backwards in a decoder block, attention scores not counted."""
    widest = max(max(t.d_in, t.d_out) for t in targets)
    tokens = backward_batch(recipe) * recipe.sequence_length
    return 4 * tokens * (24 * embedding_width(model, targets) + 10 * widest)


def head_bytes(model: nn.Module) -> int:
    """What the logits of a chunk of tokens take with labels drawn from them and gradients."""
    vocabulary = int(getattr(input_embeddings(model), "num_embeddings", LARGE_VOCABULARY))
    # logits with probabilities and their running sum in float64, or with three more on the way back
    return 4 * 4 * max(HEAD_VALUES, HEAD_TOKENS * vocabulary)


def gradient_matrix_bytes(
    targets: Sequence[TargetLinear], recipe: Recipe, *, by_block: bool
) -> int:
    """Sums over gradients that are held at a time, and changes of weights whose losses are measured."""
    sums: dict[int | None, int] = defaultdict(int)
    changes: dict[int | None, int] = defaultdict(int)
    largest = 0
    for target in targets:
        block = target.block if by_block else None
        size = 4 * target.d_in**2  # the Gram of its input with weighted tokens
        if recipe.metric == "fisher":
            size += 4 * target.d_out**2
        sums[block] += size if recipe.weighs_outputs(target) else 0
        largest = max(largest, size)
        if recipe.allocation == "loss":
            changes[block] += 2 * SLOPE_RATIOS * target.d_in * target.d_out
    held = max(sums.values())
    if recipe.max_gram_gb is not None:
        held = min(held, max(2 * int(recipe.max_gram_gb * 2**30), largest))
    # of a matrix that is measured: the change in float32 and its products with the batch
    return max(held, min(max(changes.values(), default=0), PROBE_BYTES + (256 << 20)))
