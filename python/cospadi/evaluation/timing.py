"""How speed is measured: contenders in turn, medians and quartiles, next to the machine's own peaks.

Contenders run round after round, so that a slow phase of the machine meets all of them. Work of one thread is timed by
that thread's CPU time, work of several by the wall clock: on a machine that others use, only the former means anything.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from cospadi.native.support import torch_threads


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes
    ----------
    median, lower_quartile, upper_quartile, best : float
        Seconds.
    n : int
        Rounds measured, after one call to warm up.
    clock : str
        ``thread_cpu`` or ``wall``.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    best: float
    n: int
    clock: str


def clock_of(threads: int) -> str:
    """Return the clock for work of so many threads."""
    return "thread_cpu" if threads == 1 else "wall"


def measure_in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    clock: str = "thread_cpu",
    burst: int = 1,
) -> dict[str, Timing]:
    """Time competing functions round by round.

    Parameters
    ----------
    calls : mapping
        Name to function without arguments; each is called once more to warm up.
    repeats : int
        Rounds.
    clock : {"thread_cpu", "wall"}
        ``thread_cpu`` counts only the calling thread: for single-thread work.
    burst : int
        Calls of one function after another in every round, timed together. One alone finds the caches, page tables and
        the interpreter as its rivals left them, which a call of tens of microseconds notices.

    Returns
    -------
    dict
        Name to `Timing`, in seconds per call.
    """
    now = time.thread_time if clock == "thread_cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = now()
            for _ in range(burst):
                call()
            seconds[name].append((now() - start) / burst)
    return {name: summarise(values, clock) for name, values in seconds.items()}


def measure(call: Callable[[], object], *, repeats: int = 7, clock: str = "thread_cpu") -> Timing:
    """Time one function; see `measure_in_turn`."""
    return measure_in_turn({"call": call}, repeats=repeats, clock=clock)["call"]


def summarise(seconds: list[float], clock: str) -> Timing:
    """Return median and quartiles of measured seconds."""
    if len(seconds) == 1:
        lower = median = upper = seconds[0]
    else:
        lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper, min(seconds), len(seconds), clock)


def gemm_peak(dtype: torch.dtype, threads: int, size: int = 1024) -> float:
    """Return the flop/s of torch's dense product at this thread count, best of several."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    with torch_threads(threads):
        timing = measure(lambda: a @ b, clock=clock_of(threads))
    return 2.0 * size**3 / timing.best


def copy_peak(threads: int, megabytes: int = 128) -> float:
    """Return the bytes/s (read plus written) of a copy that fits in no cache."""
    source = torch.zeros(megabytes << 18)
    target = torch.empty_like(source)
    with torch_threads(threads):
        timing = measure(lambda: target.copy_(source), repeats=5, clock="wall")
    return 2.0 * source.numel() * 4 / timing.best


def read_peak(threads: int, megabytes: int = 256) -> float:
    """Return the bytes/s of reading memory once, best of several."""
    source = torch.ones(megabytes << 17, dtype=torch.float64)
    with torch_threads(threads):
        return source.nbytes / measure(source.sum, clock=clock_of(threads)).best
