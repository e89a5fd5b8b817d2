"""Where the time of a job goes."""

from __future__ import annotations

import time


class Stages:
    """Wall time of consecutive stages.

    Attributes
    ----------
    seconds : dict
        By stage, in order.
    """

    def __init__(self, start: float) -> None:
        self._last = start
        self.seconds: dict[str, float] = {}

    def end(self, stage: str, *, apart: tuple[str, float] | None = None) -> None:
        """All time since the last stage ended belongs to this one, but for a part that has a name of its own."""
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        if apart is not None:
            name, part = apart
            self.seconds[name] = round(part, 2)
            spent -= part
        self.seconds[stage] = round(max(spent, 0.0), 2)
