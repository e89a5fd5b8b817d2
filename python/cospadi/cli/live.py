"""Progress of a running compression: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import typer

Event = dict[str, Any]
VISIBLE_ROWS = 12


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def atoms_text(sizes: Mapping[str, Any]) -> str:
    """Learned atoms K; where the inputs are atoms as well, their number and K."""
    n_identity, n_atoms = sizes["n_identity"], sizes["n_atoms"]
    return f"{n_identity}+{n_atoms}" if n_identity else str(n_atoms)


class Eta:
    """Remaining time from the planned cost of what is done, resumed modules not counted.

    By the clock, since fits may run side by side; calibration passes between them do not count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = 0.0
        self._done = 0.0
        self._fresh = 0.0
        self._begun: float | None = None

    def start(self, total_cost: float) -> None:
        """Set the planned cost of all modules."""
        self._total = total_cost

    def add(self, event: Event) -> None:
        """Account for one finished module."""
        self._done += event["cost"]
        if not event.get("resumed"):
            self._fresh += event["cost"]
            if self._begun is None:
                self._begun = self._clock() - event.get("seconds", 0.0)

    def pause(self, seconds: float) -> None:
        """Leave out time in which nothing was fitted."""
        if self._begun is not None:
            self._begun += seconds

    def text(self) -> str:
        """Remaining time, or ``-`` while unknown."""
        if self._begun is None or self._fresh <= 0.0:
            return "-"
        spent = self._clock() - self._begun
        return duration(max(0.0, self._total - self._done) * spent / self._fresh)


class PlainListener:
    """One line per module."""

    def __init__(self) -> None:
        self._eta = Eta()
        self._last_tenth: dict[str, int] = {}
        self._stages: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> PlainListener:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Nothing to release."""

    def handle(self, event: Event) -> None:
        """Print what the event says."""
        handler: Callable[[Event], None] | None = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_loading(self, event: Event) -> None:
        typer.echo(f"loading {event['model']}")

    def _on_start(self, event: Event) -> None:
        self._eta.start(event["total_cost"])
        typer.echo(describe_start(event))

    def _on_resume(self, event: Event) -> None:
        typer.echo(f"resuming: {event['n_finished']} of {event['n_modules']} matrices are finished")

    def _on_dense(self, event: Event) -> None:
        typer.echo(f"left dense: {event['module']}: {event['reason']}")

    def _on_note(self, event: Event) -> None:
        typer.echo(f"note: {event['text']}")

    def _on_warning(self, event: Event) -> None:
        typer.echo(f"warning: {event['text']}", err=True)

    def _on_calibrated(self, event: Event) -> None:
        self._eta.pause(event["seconds"])

    def _on_failed(self, event: Event) -> None:
        self._eta.add(event)
        typer.echo(f"FAILED, left dense: {event['module']}: {event['reason']}", err=True)

    def _on_calibration(self, event: Event) -> None:
        self._step(event, f"calibration: {event['done']} of {event['total']} batches")

    def _on_backward(self, event: Event) -> None:
        self._step(event, f"backward passes: {event['done']} of {event['total']}")

    def _on_coarse(self, event: Event) -> None:
        self._step(event, f"coarse fits: {event['done']} of {event['total']} linears")

    def _on_coverage(self, event: Event) -> None:
        self._say(f"calibration: {event['text']}")

    def _on_reconstruction(self, event: Event) -> None:
        self._step(event, f"block-wise reconstruction: {event['done']} of {event['total']} steps")

    def _on_reconstructed(self, event: Event) -> None:
        self._say(describe_block(event))

    def _on_resume_reconstruction(self, event: Event) -> None:
        self._say(f"resuming: {event['n_blocks']} blocks are reconstructed")

    def _say(self, text: str) -> None:
        typer.echo(text)

    def _with_time_left(self, event: Event, text: str) -> str:
        """The text with the time that the rest of a stage will take, once it is known."""
        now = time.perf_counter()
        start, first = self._stages.setdefault(event["event"], (now, event["done"]))
        if event["done"] <= first:
            return text
        left = (now - start) * (event["total"] - event["done"]) / (event["done"] - first)
        return f"{text}, {duration(left)} left"

    def _step(self, event: Event, text: str) -> None:
        """Show progress within a stage, here once per tenth of it."""
        text = self._with_time_left(event, text)
        tenth = 10 * event["done"] // max(1, event["total"])
        if tenth != self._last_tenth.get(event["event"]):
            self._last_tenth[event["event"]] = tenth
            typer.echo(text)

    def _on_allocated(self, event: Event) -> None:
        typer.echo(describe_allocation(event))

    def _on_module(self, event: Event) -> None:
        self._eta.add(event)
        if event["resumed"]:
            return
        typer.echo(
            f"[{event['index']}/{event['total']}] {event['module']} {event['d_in']}x{event['d_out']} "
            f"k={atoms_text(event)} s={event['sparsity']} error={event['relative_error']:.4f} "
            f"{event['seconds']:.1f} s, {self._eta.text()} left"
        )


class LiveListener(PlainListener):
    """A table that redraws in place: the last modules, and what is left."""

    def __init__(self) -> None:
        super().__init__()
        from rich.live import Live

        self._rows: deque[Event] = deque(maxlen=VISIBLE_ROWS)
        self._status = "loading"
        self._current = ""
        self._live = Live(get_renderable=self._render, refresh_per_second=4, transient=False)

    def __enter__(self) -> LiveListener:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._current = ""
        self._live.__exit__(kind, error, traceback)

    def _on_loading(self, event: Event) -> None:
        self._status = f"loading {event['model']}"

    def _print(self, text: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(text))

    def _on_start(self, event: Event) -> None:
        self._eta.start(event["total_cost"])
        self._print(describe_start(event))

    def _on_resume(self, event: Event) -> None:
        self._print(
            f"resuming: {event['n_finished']} of {event['n_modules']} matrices are finished"
        )

    def _on_dense(self, event: Event) -> None:
        self._print(f"left dense: {event['module']}: {event['reason']}")

    def _on_note(self, event: Event) -> None:
        self._print(f"note: {event['text']}")

    def _on_warning(self, event: Event) -> None:
        self._print(f"warning: {event['text']}")

    def _on_failed(self, event: Event) -> None:
        self._eta.add(event)
        self._print(f"FAILED, left dense: {event['module']}: {event['reason']}")

    def _say(self, text: str) -> None:
        self._print(text)

    def _step(self, event: Event, text: str) -> None:
        self._status = self._with_time_left(event, text)

    def _on_allocated(self, event: Event) -> None:
        self._print(describe_allocation(event))

    def _on_iteration(self, event: Event) -> None:
        self._current = f"{event['module']}: iteration {event['iteration']}, error {event['error_after_update']:.4f}"

    def _on_module(self, event: Event) -> None:
        self._eta.add(event)
        self._current = ""
        self._rows.append(event)
        self._status = f"{event['index']} of {event['total']} done, {self._eta.text()} left"

    def _on_done(self, event: Event) -> None:
        self._status = f"done in {duration(event['seconds'])}"

    def _render(self) -> Any:  # noqa: ANN401
        from rich.table import Table

        table = Table(caption=f"{self._status}  {self._current}", caption_justify="left")
        table.add_column("module", no_wrap=True)
        for title in ("shape", "k", "s", "error", "seconds"):
            table.add_column(title, justify="right")
        for event in self._rows:
            table.add_row(
                event["module"],
                f"{event['d_in']}x{event['d_out']}",
                atoms_text(event),
                str(event["sparsity"]),
                f"{event['relative_error']:.4f}",
                "resumed" if event["resumed"] else f"{event['seconds']:.1f}",
            )
        return table


def describe_start(event: Event) -> str:
    """One line about what is going to happen."""
    method = event["method"]
    if method == "cospadi":
        method += f" ({event['dictionary']} dictionaries)"
    return (
        f"{event['model']}: {method}, {event['n_modules']} linears, removing "
        f"{event['removed']['stored']:.1%} of their bytes ({event['removed']['values']:.1%} of values); "
        f"calibration: {event['calibration']}; {event['threads']} threads, {event['isa']}"
    )


def describe_allocation(event: Event) -> str:
    """One line about how the budget was divided."""
    shares = event["ratios"].values()
    return (
        f"allocation: {min(shares):.0%} to {max(shares):.0%} of single linears; expected loss "
        f"{event['predicted_loss']:.4f} nats per token, {event['predicted_uniform']:.4f} if uniform"
    )


def describe_block(event: Event) -> str:
    """One line about a reconstructed block."""
    change = f"error {event['before']:.2e} -> {event['after']:.2e}"
    kept = "" if event["is_kept"] else ", no gain on held-back windows: left as it was"
    return f"block {event['block']}: {change}{kept}, {event['seconds']:.0f} s"


def make_listener() -> PlainListener:
    """The live table on a terminal, plain lines elsewhere."""
    return LiveListener() if sys.stdout.isatty() else PlainListener()
