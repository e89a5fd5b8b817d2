"""Calls that take one thread each, side by side in this process, as many as there are threads and memory for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, TypeVar

import torch

from cospadi.pipeline.available_memory import available_bytes
from cospadi.pipeline.memory import fit_bytes

_Result = TypeVar("_Result")


_DELIVERY_S = 0.25
"""Messages wait no longer than that while results are waited for."""


class CallEnded(Exception):
    """Raised within a call whose result nobody waits for any more."""


class SideBySide:
    """Runs fits, or what takes as much memory; results and messages are handed on in the thread that submits.

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
        self._messages: SimpleQueue[Callable[[], None]] = SimpleQueue()
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
        self.make_room(shape=shape, on_one_thread=on_one_thread)
        if self._n_threads == 1 or not on_one_thread:
            done(call())
            self._deliver()
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._n_threads, thread_name_prefix="fit")
        self._running[self._pool.submit(call)] = fit_bytes(*shape), done

    def make_room(self, *, shape: tuple[int, int], on_one_thread: bool) -> None:
        """Wait until a call could begin at once; before its inputs are made, so that they do not come on top."""
        if self._n_threads == 1 or not on_one_thread:
            self.drain()
            return
        if self._most_bytes is None:
            self._most_bytes = available_bytes() // 2
        while self._running and not self._has_room(fit_bytes(*shape)):
            self._collect()

    def drain(self) -> None:
        """Wait for all calls."""
        while self._running:
            self._collect()
        self._deliver()
        self._restore_threads()

    def report(self, message: Callable[[], None]) -> None:
        """For calls, now and then: something to call in the thread that submits, as soon as it waits.

        Raises
        ------
        CallEnded
            After `close`.
        """
        if self._is_ending:
            raise CallEnded
        self._messages.put(message)

    def close(self) -> None:
        """End calls that still run, at their next `check`."""
        self._is_ending = True
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._restore_threads()

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
        """Wait for a call to finish, not for long, and hand on what there is."""
        finished, _ = wait(self._running, timeout=_DELIVERY_S, return_when=FIRST_COMPLETED)
        self._deliver()
        for future in finished:
            entry = self._running.pop(future, None)
            if entry is not None:  # what is done with another result may wait, too
                entry[1](future.result())

    def _deliver(self) -> None:
        with suppress(Empty):
            while True:
                self._messages.get_nowait()()

    def _restore_threads(self) -> None:
        """Calls set threads for their own thread of Python, and torch for all that begin later."""
        if self._pool is not None:
            torch.set_num_threads(self._n_threads)
