"""Where a job's activation Grams come from: the model, or a folder that keeps those of earlier runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cospadi.calibration.cache import collect_cached_grams
from cospadi.calibration.data import CalibrationSet
from cospadi.calibration.placement import placed
from cospadi.calibration.statistics import GramPass, collect_grams
from cospadi.calibration.streamed import collect_streamed_grams
from cospadi.model.discover import TargetLinear
from cospadi.model.source import SourceModel
from cospadi.model.streamed import StreamedSource
from cospadi.pipeline.events import EventLog
from cospadi.pipeline.fit_task import CPU
from cospadi.pipeline.memory import Layout
from cospadi.pipeline.recipe import Recipe


@dataclass(frozen=True, eq=False)
class GramSource:
    """Grams of one model over one calibration set.

    Attributes
    ----------
    source : SourceModel
        The original model.
    calibration : CalibrationSet
        Token windows.
    recipe : Recipe
        Batch size and memory bound.
    folder : Path or None
        Keeps the Grams for later runs.
    log : EventLog
        Receives progress, and a warning for every stored Gram that cannot be used.
    layout : Layout or None
        How a streamed model is run.
    spill : Path or None
        Folder for hidden states of the calibration pass; None keeps them in memory.
    work : Path or None
        Folder for what a streamed model needs to run backwards.
    device : torch.device
        Where activations, gradients and fits are computed. Grams come on the CPU, where the model lies.
    fits_bytes : int or None
        Room for fits at a time, see `cospadi.pipeline.side_by_side.SideBySide`.
    """

    source: SourceModel | StreamedSource
    calibration: CalibrationSet
    recipe: Recipe
    folder: Path | None
    log: EventLog
    layout: Layout | None = None
    spill: Path | None = None
    device: torch.device = CPU
    work: Path | None = None
    fits_bytes: int | None = None

    @contextmanager
    def running_model(self) -> Iterator[nn.Module | StreamedSource]:
        """The model on `device`, as a whole or block by block; of a streamed one the source."""
        if isinstance(self.source, StreamedSource):
            yield self.source
            return
        with placed(self.source.model, self.device):
            yield self.source.model

    def progress(self, done: int, total: int) -> None:
        """Report calibration batches."""
        self.log.progress("calibration", done=done, total=total)

    def collect(self, targets: Sequence[TargetLinear]) -> Iterator[GramPass]:
        """Yield the Grams of the targets' inputs, see `cospadi.calibration.statistics.collect_grams`.

        NaN where inputs are not finite.
        """
        limit = self.recipe.max_gram_gb
        max_gram_bytes = None if limit is None else int(limit * 2**30)
        if isinstance(self.source, StreamedSource):
            if self.layout is not None and self.layout.max_gram_bytes is not None:
                max_gram_bytes = self.layout.max_gram_bytes
            return collect_streamed_grams(
                self.source,
                targets,
                self.calibration.ids,
                batch_size=self.recipe.batch_size,
                max_gram_bytes=max_gram_bytes,
                folder=self.spill,
                progress=self.progress,
                keep_going=True,
            )
        if self.folder is None:
            return collect_grams(
                self.source.model,
                targets,
                self.calibration.ids,
                batch_size=self.recipe.batch_size,
                max_gram_bytes=max_gram_bytes,
                progress=self.progress,
                device=self.device,
                keep_going=True,
            )
        return collect_cached_grams(
            self.source.model,
            targets,
            self.calibration.ids,
            folder=self.folder,
            weights=self.source.fingerprint,
            report=lambda text: self.log.emit("warning", text=text),
            batch_size=self.recipe.batch_size,
            max_gram_bytes=max_gram_bytes,
            progress=self.progress,
            device=self.device,
            keep_going=True,
        )
