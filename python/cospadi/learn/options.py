"""Options of the learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cospadi.errors import InputError
from cospadi.learn.coding import SOLVERS, Solver
from cospadi.learn.precision import PRODUCTS, Products

Init = Literal["svd", "columns", "random"]
Unused = Literal["skip", "reseed"]
Update = Literal["ksvd", "mod"]

INITS: tuple[Init, ...] = ("svd", "columns", "random")
UPDATES: tuple[Update, ...] = ("ksvd", "mod")


@dataclass(frozen=True)
class LearnOptions:
    """How one dictionary is learned (CoSpaDi Algorithm 1 and the departures from it).

    Attributes
    ----------
    solver : {"auto", "omp", "ormp", "obs", "niht", "htp", "admm"}
        Sparse coder, see `cospadi.learn.coding.encode`. ``omp`` is the paper's; ``ormp`` selects by projected norm,
        which is as cheap and better on coherent dictionaries; the others are made of matrix products.
    iterations : int
        Alternations of coding and atom update (T in the paper, which uses 60).
    update : {"ksvd", "mod"}
        How the dictionary follows the code: atom by atom together with its coefficients (the paper), or all atoms at
        once by least squares with the code kept (an ablation of the paper, Table 2).
    power_iterations : int
        Of ``ksvd``: power iterations per atom (the paper: 8). They start from the current code, so one is enough. 0:
        the exact best rank-1 term (an ablation of the paper).
    init : {"svd", "columns", "random"}
        Leading singular vectors of the whitened weight; random columns of it (the paper); Gaussian.
    block_size : int
        Of ``ksvd``: atoms updated together from one residual (Jacobi); 1 is the paper's strictly sequential K-SVD.
    sweeps : int
        Of ``ksvd``: passes of the atom update per coding. A sweep costs a small part of a coding.
    unused : {"skip", "reseed"}
        What happens to an atom no signal uses: the paper keeps it; or the worst-coded signal replaces it.
    tolerance : float
        Stop when the relative error falls by less than this share in one iteration; 0 runs all.
    coding_batch : int
        Signals coded per call of the greedy coders (the paper: 8192); 0: all. Bounds the memory of the correlations;
        the result is the same to the bit.
    first_penalty, penalty_growth : float
        Of augmented dictionaries (`cospadi.learn.augmented`): the penalty rises from the first value by this factor per
        step. Slower is better and takes longer.
    seed : int
        Of the random inits.
    products : {"float32", "tf32x3", "tf32"}
        On a CUDA device, of the largest product in a step of the rise of augmented dictionaries, see
        `cospadi.learn.precision`. A run's choice and no setting of recipes.
    """

    solver: Solver = "auto"
    iterations: int = 8
    update: Update = "ksvd"
    power_iterations: int = 1
    init: Init = "svd"
    block_size: int = 64
    sweeps: int = 3
    unused: Unused = "skip"
    tolerance: float = 2e-3
    coding_batch: int = 0
    first_penalty: float = 0.005
    penalty_growth: float = 1.2
    seed: int = 42
    products: Products = "float32"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("solver", SOLVERS),
            ("init", INITS),
            ("update", UPDATES),
            ("unused", ("skip", "reseed")),
            ("products", PRODUCTS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        for name, low in (
            ("iterations", 0),
            ("power_iterations", 0),
            ("block_size", 1),
            ("sweeps", 1),
            ("coding_batch", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InputError(f"{name}: expected an integer of at least {low}, got {value!r}")
        if not (isinstance(self.first_penalty, float) and 0.0 < self.first_penalty <= 1.0):
            raise InputError(
                f"first_penalty: expected a number above 0 and up to 1, got {self.first_penalty!r}"
            )
        if not (isinstance(self.penalty_growth, float) and 1.01 <= self.penalty_growth <= 2.0):
            raise InputError(
                f"penalty_growth: expected a number of 1.01 to 2, got {self.penalty_growth!r}"
            )
        if not 0.0 <= self.tolerance < 1.0:
            raise InputError(f"tolerance: expected a share in [0, 1), got {self.tolerance!r}")
