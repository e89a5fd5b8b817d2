"""Calls that take one thread each, side by side in this process, as many as there are threads and memory for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, TypeVar

import torch

from cospadi.pipeline.memory import available_bytes, fit_bytes

_Result = TypeVar("_Result")


class CallEnded(Exception):
    """Raised within a call whose result nobody waits for any more."""


class SideBySide:
    """Runs fits, or what takes as much memory; results are handed on in the thread that submits.

    Parameters
    ----------
    most_bytes : int, optional
        Memory of all calls at a time; one runs in any case. None: half of what is available when the first begins.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self._most_bytes = most_bytes
        self._n_threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._running: dict[Future[Any], tuple[int, Callable[[Any], None]]] = {}
        self._is_ending = False

    def submit(
        self,
        call: Callable[[], _Result],
        done: Callable[[_Result], None],
        *,
        shape: tuple[int, int],
        on_one_thread: bool,
    ) -> None:
        """Make a call as soon as there is room for it; the others' results are handed on meanwhile.

        Parameters
        ----------
        call : callable
            Sets its own threads. What it raises comes out of the `submit` or `drain` that would hand its result on.
        done : callable
            Receives the result.
        shape : tuple of int
            Inputs and outputs of the fit, for its memory.
        on_one_thread : bool
            Whether others may run beside it.
        """
        if self._n_threads == 1 or not on_one_thread:
            self.drain()
            done(call())
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._n_threads, thread_name_prefix="fit")
            if self._most_bytes is None:
                self._most_bytes = available_bytes() // 2
        n_bytes = fit_bytes(*shape)
        while self._running and not self._has_room(n_bytes):
            self._collect()
        self._running[self._pool.submit(call)] = n_bytes, done

    def drain(self) -> None:
        """Wait for all calls."""
        while self._running:
            self._collect()

    def check(self) -> None:
        """For calls, now and then.

        Raises
        ------
        CallEnded
            After `close`.
        """
        if self._is_ending:
            raise CallEnded

    def close(self) -> None:
        """End calls that still run, at their next `check`."""
        self._is_ending = True
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            # the calls set this for their own threads, and torch for all that begin later
            torch.set_num_threads(self._n_threads)

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _has_room(self, n_bytes: int) -> bool:
        assert self._most_bytes is not None
        taken = sum(size for size, _ in self._running.values())
        return len(self._running) < self._n_threads and taken + n_bytes <= self._most_bytes

    def _collect(self) -> None:
        """Wait until a call is finished and hand its result on."""
        finished, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in finished:
            _, done = self._running.pop(future)
            done(future.result())
