"""The main job: dense checkpoint in, smaller checkpoint out."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cospadi import __version__, native
from cospadi.calibration.data import CalibrationSet, load_calibration
from cospadi.calibration.statistics import ActivationGram, collect_grams
from cospadi.checkpoint.format import FORMAT_VERSION
from cospadi.errors import CudaUnavailableError, FitError, InputError
from cospadi.factor import STORAGE_DTYPES, SparseFactor
from cospadi.learn.fit import FitReport, fit_module
from cospadi.learn.whitening import Whitening, WhiteningError, identity_whitening, whiten_gram
from cospadi.model.discover import Skipped, TargetLinear, discover, weight_of
from cospadi.model.source import SourceModel, open_source
from cospadi.pipeline.events import EventLog, Listener
from cospadi.pipeline.finalize import write_output
from cospadi.pipeline.plan import ModulePlan, Plan, make_plan
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.workdir import WorkDir
from cospadi.versions import versions


@dataclass(frozen=True)
class CompressResult:
    """What came out.

    Attributes
    ----------
    out_dir : Path
        The checkpoint.
    plan : Plan
        Sizes of every module.
    reports : dict
        Per compressed module: the `FitReport` as plain data.
    dense : tuple of Skipped
        Linears that stayed dense, with the reason.
    failed : tuple of str
        Names among them that should have been compressed: the result is partial.
    seconds : float
        Wall time of the whole job.
    """

    out_dir: Path
    plan: Plan
    reports: dict[str, dict[str, Any]]
    dense: tuple[Skipped, ...]
    failed: tuple[str, ...]
    seconds: float


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    num_threads: int | None = None,
    listener: Listener | None = None,
    **settings: Any,  # noqa: ANN401
) -> CompressResult:
    """Compress a causal language model.

    Parameters
    ----------
    model : str or Path
        Hugging Face folder, hub id, or GGUF file (which is dequantised).
    out : str or Path
        Directory of the result; must not exist, or be empty. Beside it appear ``<out>.log.jsonl`` and, while the
        job runs, ``<out>.work`` with the finished matrices; the same call resumes from it.
    recipe : Recipe, optional
        All settings; or give single ones as keywords (``ratio=0.3``).
    device : {"cpu", "cuda"}
        Where the fits run. This version computes on the CPU.
    num_threads : int, optional
        Threads of torch and of the native kernels.
    listener : callable, optional
        Receives every event as a dict (see `cospadi.pipeline.events`).

    Returns
    -------
    CompressResult

    Raises
    ------
    InputError
        A setting, the model or the calibration text is unusable; nothing was written.
    """
    start = time.perf_counter()
    recipe = (
        dataclasses.replace(recipe or Recipe(), **settings) if settings else (recipe or Recipe())
    )
    _check_device(device)
    out_dir = check_output(Path(out))
    if num_threads is not None:
        if num_threads < 1:
            raise InputError(f"threads: expected at least 1, got {num_threads}")
        torch.set_num_threads(num_threads)

    source = open_source(model)
    targets, skipped = discover(
        source.model, targets=recipe.targets or None, ignore=recipe.ignore or None
    )
    plan = make_plan(targets, skipped, recipe)
    calibration = _load_calibration(recipe, source)
    work = WorkDir(
        out_dir.with_name(out_dir.name + ".work"), _run_settings(source, calibration, recipe)
    )
    with EventLog(out_dir.with_name(out_dir.name + ".log.jsonl"), listener) as log:
        log.emit(
            "start", model=source.name, out=str(out_dir), **_describe(plan, calibration, recipe)
        )
        for item in plan.dense:
            log.emit("dense", module=item.name, reason=item.reason)
        job = _Job(source, {t.name: t for t in targets}, plan, recipe, calibration, work, log)
        job.run()
        result = CompressResult(
            out_dir=out_dir,
            plan=plan,
            reports=job.reports,
            dense=(*plan.dense, *job.failed),
            failed=tuple(item.name for item in job.failed),
            seconds=time.perf_counter() - start,
        )
        write_output(source, job.factors, result, recipe, calibration, versions())
        work.remove()
        log.emit("done", seconds=round(result.seconds, 2), failed=list(result.failed))
    return result


def check_output(out_dir: Path) -> Path:
    """Refuse an output that holds something or cannot be written, before any work is done."""
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir}: is a file; --out must name a new or empty directory")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise InputError(f"{out_dir}: is not empty; --out must name a new or empty directory")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        probe = out_dir.parent / f".{out_dir.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out_dir}: cannot be written: {error.strerror or error}") from None
    return out_dir


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise InputError(f"device: expected cpu or cuda, got {device!r}")
    if device == "cuda":
        info = native.runtime_info()
        reason = "the CUDA kernels are not part of this version; use --device cpu"
        if not info["cuda_built"]:
            reason = "this build has no CUDA; install a wheel with CUDA or use --device cpu"
        raise CudaUnavailableError(f"device cuda: {reason}")


def _load_calibration(recipe: Recipe, source: SourceModel) -> CalibrationSet | None:
    """Calibration windows; None for the data-free method, whose reported errors need no text either."""
    if recipe.method == "svd":
        return None
    return load_calibration(
        recipe.calibration,
        source.tokenizer,
        n_samples=recipe.samples,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
    )


def _run_settings(
    source: SourceModel, calibration: CalibrationSet | None, recipe: Recipe
) -> dict[str, Any]:
    return {
        "weights": source.fingerprint,
        "calibration_ids": calibration.sha256 if calibration else None,
        "format_version": FORMAT_VERSION,
        "cospadi": __version__,
        **recipe.to_mapping(),
    }


def _describe(plan: Plan, calibration: CalibrationSet | None, recipe: Recipe) -> dict[str, Any]:
    return {
        "method": recipe.method,
        "ratio": recipe.ratio,
        "ratio_convention": recipe.ratio_convention,
        "n_modules": len(plan.modules),
        "stored_ratio": plan.stored_ratio,
        "values_ratio": plan.values_ratio,
        "total_cost": sum(module.cost for module in plan.modules),
        "calibration": calibration.description if calibration else "none",
        "calibration_sha256": calibration.sha256 if calibration else None,
        "threads": torch.get_num_threads(),
        "isa": native.runtime_info()["isa"],
        "versions": versions(),
    }


class _Job:
    """State of one run: the fits, in the order the Grams come."""

    def __init__(
        self,
        source: SourceModel,
        targets: dict[str, TargetLinear],
        plan: Plan,
        recipe: Recipe,
        calibration: CalibrationSet | None,
        work: WorkDir,
        log: EventLog,
    ) -> None:
        self.source = source
        self.targets = targets
        self.recipe = recipe
        self.calibration = calibration
        self.work = work
        self.log = log
        self.planned = {module.name: module for module in plan.modules}
        self.factors: dict[str, SparseFactor] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.failed: list[Skipped] = []
        self._finished: dict[str, tuple[SparseFactor, dict[str, Any]]] = {}

    def run(self) -> None:
        """Fit every planned module that is not finished yet."""
        for name in self.planned:
            stored = self.work.load(name)
            if stored is not None:
                self._finished[name] = stored
        if self._finished:
            self.log.emit("resume", n_finished=len(self._finished), n_modules=len(self.planned))
        for name, (factor, report) in self._finished.items():
            self._accept(name, factor, report)
        for statistics in self._statistics():
            whitening = self._whiten(statistics)
            for name in statistics.members:
                self._fit(self.planned[name], statistics, whitening)

    def _statistics(self) -> Iterator[ActivationGram]:
        pending = [self.targets[name] for name in self.planned if name not in self._finished]
        if not pending:
            return
        if self.calibration is None:
            for target in pending:
                eye = torch.eye(target.d_in, dtype=torch.float64)
                yield ActivationGram(gram=eye, n_tokens=0, n_nonfinite=0, members=[target.name])
            return
        limit = self.recipe.max_gram_gb
        passes = collect_grams(
            self.source.model,
            pending,
            self.calibration.ids,
            batch_size=self.recipe.batch_size,
            max_gram_bytes=None if limit is None else int(limit * 2**30),
            progress=lambda done, total: self.log.progress("calibration", done=done, total=total),
        )
        for finished in passes:
            grams = finished.grams
            self.log.emit(
                "calibrated",
                index=finished.index,
                n_passes=finished.n_passes,
                n_grams=len(grams),
                seconds=round(finished.seconds, 2),
            )
            while grams:
                # let go of each Gram as soon as its modules are done
                yield grams.pop(next(iter(grams)))

    def _whiten(self, statistics: ActivationGram) -> Whitening | WhiteningError:
        name = statistics.members[0]
        if self.calibration is None:
            return identity_whitening(statistics.gram.shape[0])
        try:
            return whiten_gram(statistics.gram, name)
        except WhiteningError as error:
            return error

    def _fit(
        self, plan: ModulePlan, statistics: ActivationGram, whitening: Whitening | WhiteningError
    ) -> None:
        if isinstance(whitening, WhiteningError):
            self._keep_dense(plan, str(whitening))
            return
        target = self.targets[plan.name]
        weight, bias = weight_of(self.source.model, target)
        try:
            factor, report = fit_module(
                plan.name,
                weight,
                bias,
                statistics.gram,
                whitening,
                method=self.recipe.method,
                n_atoms=plan.n_atoms,
                sparsity=plan.sparsity,
                options=self.recipe.learn_options(),
                storage_dtype=STORAGE_DTYPES[self.recipe.storage_dtype],
                progress=lambda stats: self.log.progress(
                    "iteration", module=plan.name, **dataclasses.asdict(stats)
                ),
            )
        except FitError as error:
            self._keep_dense(plan, str(error))
            return
        data = _report_data(report)
        self.work.store(plan.name, factor, data)
        self._accept(plan.name, factor, data)

    def _accept(self, name: str, factor: SparseFactor, report: dict[str, Any]) -> None:
        plan = self.planned[name]
        self.factors[name] = factor
        self.reports[name] = report
        self.log.emit(
            "module",
            module=name,
            index=len(self.factors) + len(self.failed),
            total=len(self.planned),
            d_in=plan.d_in,
            d_out=plan.d_out,
            n_atoms=plan.n_atoms,
            sparsity=plan.sparsity,
            cost=plan.cost,
            resumed=name in self._finished,
            **report,
        )

    def _keep_dense(self, plan: ModulePlan, reason: str) -> None:
        """A failed matrix never loses the run: it stays dense, is reported, and the result is partial."""
        self.failed.append(Skipped(plan.name, (plan.d_out, plan.d_in), reason))
        self.log.emit("failed", module=plan.name, reason=reason, cost=plan.cost)


def _report_data(report: FitReport) -> dict[str, Any]:
    data = dataclasses.asdict(report)
    # JSON turns tuples into lists; do it here so that a resumed run holds equal data
    plain: dict[str, Any] = json.loads(json.dumps(data))
    return plain
