"""A copy of a model with its weights taken off the grid of an earlier quantisation, for honest tests of few bits.

Models that come as 4-bit GGUF files hold weights on a grid of 4 bits: rounding to a similar grid looks better on them
than it is. Every linear's weights are moved by a seeded uniform dither of plus or minus half a step, the step of a
block of 32 inputs being its range / 15. The copy's own perplexity is the base of a comparison.

    python bench/compare/off_grid.py MODEL OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cospadi.model.discover import discover
from cospadi.model.source import open_source

BLOCK = 32
LEVELS = 15


def dithered(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``[d_out, d_in]`` weight with dither; ``d_in`` a multiple of the block."""
    blocks = weight.float().reshape(weight.shape[0], -1, BLOCK)
    step = (blocks.amax(2, keepdim=True) - blocks.amin(2, keepdim=True)) / LEVELS
    moved = blocks + (torch.rand(blocks.shape, generator=generator) - 0.5) * step
    return moved.reshape(weight.shape)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    generator = torch.Generator().manual_seed(arguments.seed)
    targets, _ = discover(source.model)
    for target in targets:
        weight = source.model.get_submodule(target.name).weight
        with torch.no_grad():
            weight.copy_(dithered(weight, generator))
    source.model.to(torch.bfloat16).save_pretrained(arguments.out)
    source.tokenizer.save_pretrained(arguments.out)
    print(f"{arguments.out}: {len(targets)} linears dithered")


if __name__ == "__main__":
    main()
