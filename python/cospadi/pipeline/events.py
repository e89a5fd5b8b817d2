"""Events of a running job: one JSON line each, the same data for the live table and the log file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from cospadi.errors import InputError

Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """Appends every event to a JSON-lines file and hands it to a listener.

    Events carry ``event`` (start, calibration, module, dense, warning, done) and ``time_s`` since the start.
    """

    def __init__(self, path: Path, listener: Listener | None) -> None:
        self._start = time.perf_counter()
        self._listener = listener
        try:
            self._sink: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None

    def emit(self, event: str, **data: Any) -> None:  # noqa: ANN401
        """Write one event and pass it on."""
        record: Event = {
            "event": event,
            "time_s": round(time.perf_counter() - self._start, 3),
            **data,
        }
        try:
            self._sink.write(json.dumps(record) + "\n")
            self._sink.flush()
        except OSError as error:  # a full disk
            raise InputError(
                f"{self._sink.name}: cannot be written: {error.strerror or error}"
            ) from None
        if self._listener is not None:
            self._listener(record)

    def progress(self, event: str, **data: Any) -> None:  # noqa: ANN401
        """Pass an event on without writing it: progress within a step."""
        if self._listener is not None:
            self._listener({"event": event, **data})

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # what could not be written has been said
            self._sink.close()
