"""What a folder may hold that makes transformers load something else than the checkpoint that was read."""

from __future__ import annotations

import re

from cospadi.checkpoint.reader import CompressedCheckpoint
from cospadi.checkpoint.strict_json import brief_text
from cospadi.errors import CheckpointError, brief

_DEPTH_KEY = re.compile(r"(num_.*(layers|blocks)|n_?layers?|n_blocks)", re.ASCII)


def check_hazards(checkpoint: CompressedCheckpoint) -> None:
    """Raise CheckpointError for what makes transformers read other files, or build layers that no file vouches for."""
    config, folder = checkpoint.config, checkpoint.path
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: adapter_config.json would load another base model")
    if "transformers_weights" in config:
        raise CheckpointError(f"{folder}: transformers_weights in config.json names other weights")
    for key, value in config.items():
        if _DEPTH_KEY.fullmatch(key) is None or isinstance(value, bool):
            continue
        # Every layer owns a tensor; layers are built before their absence is noticed.
        if isinstance(value, (int, float)) and value > len(checkpoint.tensors):
            raise CheckpointError(
                f"{folder}: {brief_text(key)} = {brief(value)} in config.json exceeds "
                f"the {len(checkpoint.tensors)} tensors of the checkpoint"
            )
