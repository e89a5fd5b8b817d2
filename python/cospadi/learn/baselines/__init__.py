"""Other methods, written from their papers, in the terms of this project: what CoSpaDi is compared with.

Every function takes a torch weight ``[d_out, d_in]`` and returns a `cospadi.learn.result.FloatFactor` (the two that
round adding their integers), so that all methods are stored, loaded and evaluated alike.
"""

from cospadi.learn.baselines.basis_sharing import basis_sharing
from cospadi.learn.baselines.compot import compot
from cospadi.learn.baselines.gptq import gptq
from cospadi.learn.baselines.low_rank import low_rank
from cospadi.learn.baselines.magnitude import magnitude
from cospadi.learn.baselines.rocket import rocket
from cospadi.learn.baselines.round_to_nearest import round_to_nearest
from cospadi.learn.baselines.sparsegpt import sparsegpt
from cospadi.learn.baselines.wanda import wanda

__all__ = [
    "basis_sharing",
    "compot",
    "gptq",
    "low_rank",
    "magnitude",
    "rocket",
    "round_to_nearest",
    "sparsegpt",
    "wanda",
]
