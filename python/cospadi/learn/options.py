"""Options of the learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cospadi.errors import InputError

Solver = Literal["omp", "ormp"]
Init = Literal["svd", "columns", "random"]
Unused = Literal["skip", "reseed"]

SOLVERS: tuple[Solver, ...] = ("omp", "ormp")
INITS: tuple[Init, ...] = ("svd", "columns", "random")


@dataclass(frozen=True)
class LearnOptions:
    """How one dictionary is learned (CoSpaDi Algorithm 1 and the departures from it).

    Attributes
    ----------
    solver : {"omp", "ormp"}
        Greedy selection: by correlation (the paper), or by correlation over projected norm, which is as
        cheap and better on coherent dictionaries.
    iterations : int
        Alternations of coding and atom update (T in the paper, which uses 60).
    power_iterations : int
        Power iterations per atom (the paper: 8). They start from the current code, so one is enough.
    init : {"svd", "columns", "random"}
        Leading singular vectors of the whitened weight; random columns of it (the paper); Gaussian.
    block_size : int
        Atoms updated together from one residual (Jacobi); 1 is the paper's strictly sequential K-SVD.
    sweeps : int
        Passes of the atom update per coding. A sweep costs a small part of a coding.
    unused : {"skip", "reseed"}
        What happens to an atom no signal uses: the paper keeps it; or the worst-coded signal replaces it.
    tolerance : float
        Stop when the relative error falls by less than this share in one iteration; 0 runs all.
    seed : int
        Of the random inits.
    """

    solver: Solver = "omp"
    iterations: int = 8
    power_iterations: int = 1
    init: Init = "svd"
    block_size: int = 64
    sweeps: int = 3
    unused: Unused = "skip"
    tolerance: float = 2e-3
    seed: int = 42

    def __post_init__(self) -> None:
        for name, allowed in (("solver", SOLVERS), ("init", INITS), ("unused", ("skip", "reseed"))):
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        for name, low in (
            ("iterations", 0),
            ("power_iterations", 1),
            ("block_size", 1),
            ("sweeps", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise InputError(f"{name}: expected an integer of at least {low}, got {value!r}")
        if not 0.0 <= self.tolerance < 1.0:
            raise InputError(f"tolerance: expected a share in [0, 1), got {self.tolerance!r}")
