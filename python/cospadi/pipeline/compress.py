"""The main job: dense checkpoint in, smaller checkpoint out."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from cospadi import native
from cospadi.calibration.blockwise import BlockwiseError
from cospadi.calibration.data import CalibrationSet, load_calibration
from cospadi.calibration.ids import check_ids
from cospadi.checkpoint.format import FORMAT_VERSION
from cospadi.errors import CospadiError, FitError, InputError
from cospadi.factor.spec import removed_shares
from cospadi.learn.precision import PRODUCTS, Products
from cospadi.model.discover import Skipped, TargetLinear, discover
from cospadi.model.locate import resolve
from cospadi.model.source import SourceModel, open_source, source_shapes
from cospadi.model.streamed import (
    StreamedSource,
    StreamingUnsupported,
    check_streamable,
    open_streamed,
)
from cospadi.native.heap import bound_heap, trim_heap
from cospadi.pipeline.allocation import Allocation, allocate_ratios
from cospadi.pipeline.available_memory import available_bytes
from cospadi.pipeline.device import CUDA, checked_device, visible_gpus
from cospadi.pipeline.disk import shortage
from cospadi.pipeline.events import EventLog, Listener
from cospadi.pipeline.executor import (
    Executor,
    InProcess,
    QueueExecutor,
    worker_threads,
)
from cospadi.pipeline.finalize import write_output
from cospadi.pipeline.grams import GramSource
from cospadi.pipeline.job import Job
from cospadi.pipeline.memory import Needs, choose_layout
from cospadi.pipeline.plan import Plan, make_plan
from cospadi.pipeline.queue_bound import disk_share
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.recipe_file import parse_size, recipe_from_mapping
from cospadi.pipeline.reconstruction import check_blockwise, reconstruct
from cospadi.pipeline.sensitivity import prepare_fisher
from cospadi.pipeline.similarity import groups_by_similarity
from cospadi.pipeline.stages import Stages
from cospadi.pipeline.target_size import with_ratio_for_size
from cospadi.pipeline.workdir import WorkDir, recorded_threads, run_settings
from cospadi.versions import versions

ExecutorKind = Literal["local", "ray"]

MOST_WORKERS = 1024
_AMPLE_BYTES = 4 << 30
"""Memory beside the model that is enough for fits and gradients of what fits three times: no need to plan."""


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
    calibration_seconds : float
        Part of it that went into activations.
    ratio : dict
        Removed shares of what was written, see `cospadi.factor.spec.removed_shares`.
    dense_bytes, stored_bytes : int
        The compressed linears in bfloat16, and as written.
    allocation : Allocation or None
        How the budget was divided; None: evenly.
    reconstruction : list of dict or None
        What block-wise reconstruction gained, see `cospadi.pipeline.reconstruction.reconstruct`; None without it.
    stages : dict
        Seconds by stage, in order; what is written after the report has none.
    n_resumed : int
        Linears that an earlier process finished; its time is not in `stages`.
    """

    out_dir: Path
    plan: Plan
    reports: dict[str, dict[str, Any]]
    dense: tuple[Skipped, ...]
    failed: tuple[str, ...]
    seconds: float
    calibration_seconds: float
    ratio: dict[str, float]
    dense_bytes: int
    stored_bytes: int
    allocation: Allocation | None = None
    reconstruction: list[dict[str, Any]] | None = None
    stages: dict[str, float] = field(default_factory=dict)
    n_resumed: int = 0

    def __repr__(self) -> str:
        """One line: the tables are long."""
        return (
            f"CompressResult({str(self.out_dir)!r}, {len(self.reports)} linears, {self.dense_bytes} -> "
            f"{self.stored_bytes} bytes, {len(self.failed)} failed, {self.seconds:.0f} s)"
        )


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "cpu",
    products: str = "float32",
    num_threads: int | None = None,
    workers: int | None = None,
    executor: ExecutorKind = "local",
    max_memory: str | int | None = None,
    spill: bool = False,
    gram_cache: str | Path | None = None,
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
        All settings; or give single ones as keywords (``ratio=0.3``, ``bits=4.25``, ``preset="best"``).
    device : {"cpu", "cuda"}
        Where activations, gradients and fits are computed. The model and everything finished stay on the CPU; what is
        needed of them is moved. Rounding to integers with feedback runs on the CPU always. A resumed run may change it.
    products : {"float32", "tf32x3", "tf32"}
        On a CUDA device, arithmetic of the largest products of a fit (`cospadi.learn.precision`).
    num_threads : int, optional
        Threads of torch and of the native kernels, in every process. All cores by default, divided among `workers`;
        a run that is resumed keeps its threads. Results depend on them (the order of sums in matrix products), and on
        nothing else that is said here.
    workers : int, optional
        Processes on this machine that fit, with ``device="cuda"`` each on a GPU of its own; None: this one alone.
        Beside them, or with 0 in their place, ``cospadi worker <out>.work`` may run on any machine that sees the
        directory.
    executor : {"local", "ray"}
        Who starts the workers: this process, or a Ray cluster (`workers` then bounds the fits at a time).
    max_memory : str or int, optional
        Bound on the memory of this process and of its workers, interpreter and libraries (about 380 MB) included, such
        as ``"2GB"``. Without it, a model that does not fit what is available is streamed as well.
    spill : bool
        Keep hidden states in a file, which streams the model.
    gram_cache : str or Path, optional
        Folder that keeps activation Grams, for several compressions of one model with one calibration set.
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
    recipe = _with_settings(recipe, settings)
    place = checked_device(device)
    if products not in PRODUCTS:
        raise InputError(f"products: expected one of {', '.join(PRODUCTS)}, got {products!r}")
    out_dir = check_output(out)
    if Path(model).is_dir() and Path(model).resolve() in out_dir.resolve().parents:
        raise InputError(f"{out_dir}: lies inside the model's own folder; choose another --out")
    _check_workers(workers, executor, place)
    if place.type != "cpu" and (max_memory is not None or spill):
        raise InputError(
            "max_memory, spill: a streamed model runs on the CPU; give device cuda without them"
        )
    work_dir = out_dir.with_name(out_dir.name + ".work")
    _set_threads(num_threads, work_dir, workers)

    if listener is not None:
        listener({"event": "loading", "model": str(model)})
    needs = None
    if place.type == "cpu":
        needs = plan_run(
            model,
            recipe,
            max_memory=max_memory,
            spill=spill,
            workers=workers,
            cached=gram_cache is not None,
        )
    source: SourceModel | StreamedSource
    if needs is not None and needs.layout.is_streamed:
        bound_heap()
        source = open_streamed(model)
        recipe = dataclasses.replace(recipe, batch_size=needs.layout.batch_size)
    else:
        source = open_source(model)
    # what can be refused is refused before anything is written
    recipe = with_ratio_for_size(source.model, *_plan_inputs(source, recipe), recipe)
    calibration = _load_calibration(recipe, source)
    if isinstance(source, StreamedSource):
        trim_heap()
    work = WorkDir(work_dir, _run_settings(source, calibration, recipe))
    log_file = out_dir.with_name(out_dir.name + ".log.jsonl")
    had_log = log_file.exists()
    try:
        with EventLog(log_file, listener) as log:
            with closing(_executor(executor, workers, work, log, place, needs)) as runner:
                result = _run(
                    source,
                    calibration,
                    recipe,
                    work,
                    log,
                    runner,
                    out_dir,
                    gram_cache,
                    start,
                    needs,
                    place,
                    products,
                )
            work.remove()
            log.emit("done", seconds=round(result.seconds, 2), failed=list(result.failed))
    except CospadiError:
        # Refused input must not stand in the way of the corrected command.
        if work.is_empty:
            work.remove()
            if not had_log:
                log_file.unlink(missing_ok=True)
        raise
    finally:
        work.close()
    return result


def _run(
    source: SourceModel | StreamedSource,
    calibration: CalibrationSet | None,
    recipe: Recipe,
    work: WorkDir,
    log: EventLog,
    executor: Executor,
    out_dir: Path,
    gram_cache: str | Path | None,
    start: float,
    needs: Needs | None,
    device: torch.device,
    products: Products,
) -> CompressResult:
    grams, groups, fisher, allocation = None, None, None, None
    if needs is not None:
        log.emit("memory", peak_bytes=needs.peak_bytes, **vars(needs.layout))
        if needs.peak_bytes > needs.bound_bytes:
            log.emit(
                "warning",
                text=f"memory: {needs.peak_bytes / 1e6:.0f} MB planned at the least and {needs.bound_bytes / 1e6:.0f} "
                "MB to be had: the system may kill this run (finished fits are kept, the same command goes on)",
            )
        _warn_of_disk(log, work, needs.work_disk_bytes + needs.output_bytes)
    stages = Stages(start)
    stages.end("opening the model and the text")
    by_similarity = recipe.group_size > 1 and recipe.grouping == "similarity"
    if calibration is not None:
        # the search for similar layers and the allocation read all Grams, the fits read them again
        reads_twice = by_similarity or recipe.allocation == "loss"
        folder = gram_cache or (work.path / "grams" if reads_twice else None)
        layout = needs.layout if needs is not None else None
        spill = work.path if layout is not None and layout.is_spilled else None
        grams = GramSource(
            source,
            calibration,
            recipe,
            folder and Path(folder),
            log,
            layout,
            spill,
            device,
            work.path,
            None if needs is None else needs.fits_bytes,
        )
        if recipe.reconstruction == "blockwise":
            check_blockwise(grams)
    targets, skipped = _plan_inputs(source, recipe)
    if by_similarity:
        groups = groups_by_similarity(source, targets, recipe, grams)
        stages.end("search for similar layers")
    if grams is not None and recipe.metric != "none":
        try:
            fisher = prepare_fisher(grams, targets, Path(gram_cache or work.path / "fisher"))
        except (InputError, BlockwiseError) as error:
            if recipe.output_metric is not None:
                raise
            log.emit("warning", text=f"errors of all outputs count alike, no gradients: {error}")
            recipe = dataclasses.replace(recipe, output_metric="none")
            grams = dataclasses.replace(grams, recipe=recipe)
        stages.end("gradients of the outputs")
    if grams is not None and recipe.allocation == "loss":
        allocation = allocate_ratios(grams, fisher, targets, work)
        stages.end("division of the budget")
    plan = make_plan(
        targets, skipped, recipe, groups=groups, ratios=allocation.ratios if allocation else None
    )
    log.emit("start", model=source.name, out=str(out_dir), **_describe(plan, calibration, recipe))
    for note in source.notes:
        log.emit("warning", text=note)
    dtype = stored_dtype(source)
    if dtype not in (None, recipe.storage_dtype):
        log.emit(
            "note",
            text=f"the source is {dtype}; what is not compressed is stored as {recipe.storage_dtype} "
            "(setting storage_dtype)",
        )
    if needs is None:
        _warn_of_disk(log, work, 2 * plan.stored_bits // 8)
    for item in plan.dense:
        log.emit("dense", module=item.name, reason=item.reason)
    job = Job(
        source,
        {t.name: t for t in targets},
        plan,
        recipe,
        grams,
        fisher,
        work,
        log,
        executor,
        device=device,
        products=products,
    )
    job.run()
    executor.close()  # what follows has the memory of the workers
    if recipe.sequential:
        stages.end("calibration and fits")
    else:
        stages.end("fits", apart=("calibration", job.calibration_seconds))
    if not job.factors:
        raise FitError(f"every layer would have to stay dense; the first: {job.failed[0].reason}")
    blocks = None
    if grams is not None and recipe.reconstruction == "blockwise":
        blocks = reconstruct(job, grams)
        stages.end("block-wise reconstruction")
    specs = job.factors.specs
    result = CompressResult(
        out_dir=out_dir,
        plan=plan,
        reports=job.reports,
        dense=(*plan.dense, *job.failed),
        failed=tuple(item.name for item in job.failed),
        seconds=time.perf_counter() - start,
        calibration_seconds=job.calibration_seconds,
        ratio=removed_shares(specs.values()),
        dense_bytes=sum(spec.dense_bits for spec in specs.values()) // 8,
        stored_bytes=sum(spec.stored_bytes for spec in specs.values()),
        allocation=allocation,
        reconstruction=blocks,
        stages=stages.seconds,
        n_resumed=job.n_resumed,
    )
    write_output(source, job.factors, result, recipe, calibration, versions())
    return result


def _warn_of_disk(log: EventLog, work: WorkDir, n_bytes: int) -> None:
    text = shortage(work.path, n_bytes)
    if text is not None:
        log.emit("warning", text=text)


def plan_run(
    model: str | Path,
    recipe: Recipe,
    *,
    max_memory: str | int | None = None,
    spill: bool = False,
    workers: int | None = None,
    cached: bool = False,
) -> Needs | None:
    """Choose how a compression is run, from the model's configuration and file sizes alone.

    Returns
    -------
    Needs or None
        None where nothing was asked for and the model has room to spare.

    Raises
    ------
    InputError
        `max_memory` does not suffice, or the model cannot be planned.
    """
    limit = None if max_memory is None else parse_size(max_memory, "max_memory")
    location = resolve(model, gguf_file=None, revision=None, with_weights=True)
    files = list(location.folder.glob("*.safetensors")) if location.gguf_file is None else []
    stored = sum(file.stat().st_size for file in files)
    ample = 3 * stored + _AMPLE_BYTES < available_bytes()
    if limit is None and not spill and (not stored or ample):
        return None
    if limit is not None or not ample:
        bound_heap()
    shapes = source_shapes(model).model
    targets, skipped = discover(
        shapes, targets=recipe.targets or None, ignore=recipe.ignore or None
    )
    recipe = with_ratio_for_size(shapes, targets, skipped, recipe)
    trim_heap()  # what remains is what the run begins with
    can_stream = bool(files) and not cached
    if can_stream:
        try:
            check_streamable(model)
        except StreamingUnsupported:
            can_stream = False
    return choose_layout(
        shapes,
        targets,
        make_plan(targets, skipped, recipe),
        recipe,
        limit=limit,
        spill=spill,
        can_stream=can_stream,
        workers=workers,
    )


def _check_workers(workers: int | None, executor: str, device: torch.device) -> None:
    if executor not in get_args(ExecutorKind):
        raise InputError(f"executor: expected local or ray, got {executor!r}")
    if workers is None:
        return
    if (
        isinstance(workers, bool)
        or not isinstance(workers, int)
        or not 0 <= workers <= MOST_WORKERS
    ):
        raise InputError(f"workers: expected 0 to {MOST_WORKERS}, got {workers!r}")
    if executor == "ray" and workers < 1:
        raise InputError("workers: expected at least 1 with ray, got 0")
    if executor == "local" and device.type == CUDA and workers > len(visible_gpus()):
        raise InputError(
            f"workers: each has a GPU to itself; expected at most {len(visible_gpus())} on this machine, got {workers}"
        )


def _set_threads(num_threads: int | None, work_dir: Path, workers: int | None) -> None:
    if num_threads is None:
        num_threads = recorded_threads(work_dir)
    if num_threads is None and workers is not None and workers > 1:
        num_threads = worker_threads(workers)
    if num_threads is None:
        num_threads = torch.get_num_threads()
    if num_threads < 1:
        raise InputError(f"threads: expected at least 1, got {num_threads}")
    # Also where nothing was asked: torch then forbids its product library to take fewer threads than that, so that
    # every process is in the same state, whether or not its count was ever set.
    torch.set_num_threads(num_threads)


def _executor(
    kind: ExecutorKind,
    workers: int | None,
    work: WorkDir,
    log: EventLog,
    device: torch.device,
    needs: Needs | None,
) -> Executor:
    if kind == "ray":
        from cospadi.pipeline.ray_executor import RayExecutor

        return RayExecutor(work, log, workers, device)
    if workers is None:
        most_bytes = None if needs is None else needs.fits_bytes
        return InProcess(work, log, device, most_bytes=most_bytes)
    return QueueExecutor(work, log, workers, device=device, most_bytes=disk_share(work.path))


def stored_dtype(source: SourceModel | StreamedSource) -> str | None:
    """Type that the source's own config names; None where it names none (GGUF files)."""
    config = source.path / "config.json"
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    value = data.get("dtype", data.get("torch_dtype")) if isinstance(data, dict) else None
    return value if isinstance(value, str) else None


def _plan_inputs(
    source: SourceModel | StreamedSource, recipe: Recipe
) -> tuple[list[TargetLinear], list[Skipped]]:
    return discover(source.model, targets=recipe.targets or None, ignore=recipe.ignore or None)


def _with_settings(recipe: Recipe | None, settings: dict[str, Any]) -> Recipe:
    if recipe is None:
        return recipe_from_mapping(settings, source="compress")
    for key in settings:
        if key not in recipe.to_mapping():
            raise InputError(
                f"compress: unknown setting {key!r} beside a recipe; see cospadi.pipeline.recipe.Recipe"
            )
    return dataclasses.replace(recipe, **settings)


def check_output(out: str | Path) -> Path:
    """Refuse an output that holds something or cannot be written, before any work is done."""
    if not str(out):
        raise InputError("--out: is empty; it must name a new or empty directory")
    out_dir = Path(out)
    if out_dir.is_symlink():
        raise InputError(f"{out_dir}: is a link; --out must name a new or empty directory itself")
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir}: is a file; --out must name a new or empty directory")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise InputError(f"{out_dir}: is not empty; --out must name a new or empty directory")
    for parent in out_dir.parents:
        if parent.exists() and not parent.is_dir():
            raise InputError(f"{out_dir}: cannot be written: {parent} is a file")
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        probe = out_dir.parent / f".{out_dir.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{out_dir}: cannot be written: {error.strerror or error}") from None
    return out_dir


def _load_calibration(
    recipe: Recipe, source: SourceModel | StreamedSource
) -> CalibrationSet | None:
    """Calibration windows that fit the model; None where nothing uses them."""
    if not recipe.uses_calibration:
        return None
    calibration = load_calibration(
        recipe.calibration,
        source.tokenizer,
        n_samples=recipe.samples,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
    )
    try:
        check_ids(source.model, calibration.ids, length=calibration.ids.shape[1])
    except InputError as error:
        hint = "; see --sequence-length" if "context" in str(error) else ""
        raise InputError(f"calibration: {error}{hint}") from None
    return calibration


def _run_settings(
    source: SourceModel | StreamedSource, calibration: CalibrationSet | None, recipe: Recipe
) -> dict[str, Any]:
    return {
        "weights": source.fingerprint,
        "calibration_ids": calibration.sha256 if calibration else None,
        "format_version": FORMAT_VERSION,
        **run_settings(),
        **recipe.to_mapping(),
    }


def _describe(plan: Plan, calibration: CalibrationSet | None, recipe: Recipe) -> dict[str, Any]:
    return {
        "method": recipe.method,
        "dictionary": recipe.atoms,
        "ratio": recipe.ratio,
        "ratio_convention": recipe.ratio_convention,
        "n_modules": len(plan.modules),
        "removed": plan.ratio,
        "total_cost": sum(module.cost for module in plan.modules),
        "calibration": calibration.description if calibration else "none",
        "calibration_sha256": calibration.sha256 if calibration else None,
        "threads": torch.get_num_threads(),
        "isa": native.runtime_info()["isa"],
        "versions": versions(),
    }
