"""The fits of one compression, in the order in which their statistics come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cospadi.calibration.correction import choose_shrinkage, sequential_target
from cospadi.calibration.fisher import FisherStore
from cospadi.calibration.placement import placed
from cospadi.calibration.reconstruction import dense_linear
from cospadi.calibration.sequential import SequentialInput, collect_sequential
from cospadi.errors import InputError
from cospadi.factor.spec import STORAGE_DTYPES, FactorSpec
from cospadi.learn.fit import FitSettings
from cospadi.learn.methods import METHODS, FactorSize
from cospadi.learn.precision import Products
from cospadi.learn.whitening import count_dead_inputs
from cospadi.model.discover import Skipped, TargetLinear
from cospadi.model.layers import CospadiLinear, replace_modules
from cospadi.model.source import SourceModel
from cospadi.model.streamed import StreamedSource
from cospadi.pipeline.coverage import Coverage, coverage_event, coverage_warnings
from cospadi.pipeline.events import EventLog
from cospadi.pipeline.executor import Executor, Outcome
from cospadi.pipeline.fit_task import (
    CPU,
    FitTask,
    InputMetric,
    Statistics,
    TaskMember,
    fits_one_thread,
)
from cospadi.pipeline.grams import GramSource
from cospadi.pipeline.outliers import outlier_warning
from cospadi.pipeline.plan import ModulePlan, Plan
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.sensitivity import fisher_grams
from cospadi.pipeline.stored_factors import StoredFactors
from cospadi.pipeline.workdir import WorkDir

HELD_BACK_SHARE = 8
"""One window in so many is held back to choose the shrinkage of sequential calibration."""


class Job:
    """State of one run.

    Attributes
    ----------
    factors : StoredFactors
        Finished modules by name; they lie in the work directory.
    reports : dict
        Of the finished modules, as plain data.
    failed : list of Skipped
        Modules that had to stay dense.
    calibration_seconds : float
        Time spent on activations, fits not counted.
    device : torch.device
        Where the fits run. Finished factors lie on the CPU, as the model does.
    products : {"float32", "tf32x3", "tf32"}
        See `cospadi.learn.options.LearnOptions`.
    """

    def __init__(
        self,
        source: SourceModel | StreamedSource,
        targets: dict[str, TargetLinear],
        plan: Plan,
        recipe: Recipe,
        grams: GramSource | None,
        fisher: FisherStore | None,
        work: WorkDir,
        log: EventLog,
        executor: Executor,
        *,
        device: torch.device = CPU,
        products: Products = "float32",
    ) -> None:
        self.source = source
        self.targets = targets
        self.recipe = recipe
        self.grams = grams
        self.fisher = fisher
        self.work = work
        self.log = log
        self.device = device
        self.products: Products = products
        self.planned = {module.name: module for module in plan.modules}
        self.groups = plan.groups
        self.executor = executor
        self.factors = StoredFactors(work, {name: m.leader for name, m in self.planned.items()})
        self.reports: dict[str, dict[str, Any]] = {}
        self.failed: list[Skipped] = []
        self.calibration_seconds = 0.0
        self._with_spectrum = _middle_block(targets)
        self._resumed: set[str] = set()
        self._waiting: dict[str, Statistics] = {}
        self._coverage: list[Coverage] = []
        self._overflowed: list[str] = []  # modules whose input is not finite

    @property
    def n_resumed(self) -> int:
        """Modules that an earlier process finished."""
        return len(self._resumed)

    def run(self) -> None:
        """Fit every planned module that is not finished yet."""
        self._resume()
        pending = [self.targets[name] for name in self.planned if name not in self.factors]
        if not pending:
            return
        if self.grams is None:
            self._run_without_text(pending)
        elif self.recipe.sequential:
            self._run_sequential(self.grams)
        else:
            self._run_one_shot(pending, self.grams)
        self.executor.drain()
        # in the order of the model, whoever finished first: equal results are equal files
        self.reports = {name: self.reports[name] for name in self.planned if name in self.reports}
        order = {name: index for index, name in enumerate(self.planned)}
        self.failed.sort(key=lambda item: order[item.name])
        if self._overflowed:
            largest = {name: float(self._weight(name)[0].abs().max()) for name in self.planned}
            first = min(self._overflowed, key=order.__getitem__)
            n_more = len(self._overflowed) - 1
            self.log.emit("warning", text=outlier_warning(first, n_more, largest))

    def _resume(self) -> None:
        """Take the groups all of whose members are finished; one member alone has no dictionary."""
        for members in self.groups.values():
            stored = {member.name: self.work.entry(member.name) for member in members}
            found = {name: result for name, result in stored.items() if result is not None}
            if len(found) < len(members):
                continue
            for name, (spec, report) in found.items():
                self._resumed.add(name)
                self._accept(name, spec, report)
        if self._resumed:
            self.log.emit("resume", n_finished=len(self._resumed), n_modules=len(self.planned))

    def _run_without_text(self, pending: Sequence[TargetLinear]) -> None:
        for target in pending:
            self._take(target.name, Statistics(None, InputMetric(target.name, None)))

    def _run_one_shot(self, pending: Sequence[TargetLinear], grams: GramSource) -> None:
        uses_text = METHODS[self.recipe.method].uses_calibration
        for finished in grams.collect(pending):
            items = finished.grams
            self.calibration_seconds += finished.seconds
            self.log.emit(
                "calibrated",
                index=finished.index,
                n_passes=finished.n_passes,
                n_grams=len(items),
                seconds=round(finished.seconds, 2),
            )
            for item in items.values():
                self._note_coverage(item.members, item.gram, item.n_tokens)
                if not bool(torch.isfinite(item.gram.diagonal()).all()):
                    self._overflowed.extend(item.members)
            if finished.index == finished.n_passes - 1:
                self._report_coverage()
            while items:
                # let go of each Gram as soon as its modules are done
                item = items.pop(next(iter(items)))
                metric = InputMetric(item.members[0], item.gram if uses_text else None)
                for name in item.members:
                    shape = self._shape(name)
                    self.executor.make_room(*shape, self._is_for_one_thread(*shape))
                    self._take(name, self._statistics(name, item.gram, metric, item.n_tokens))
            self.executor.free_cores()  # for the next pass

    def _statistics(
        self,
        name: str,
        gram: torch.Tensor,
        metric: InputMetric,
        n_tokens: int,
        target: torch.Tensor | None = None,
    ) -> Statistics:
        """Statistics with what the gradients of the module's output say."""
        output = None
        if self.fisher is not None and metric.gram is not None:
            weighted, output = fisher_grams(
                self.fisher, self.targets[name], metric.gram, self.recipe
            )
            if weighted is not None:
                metric = InputMetric(name, metric.gram, weighted)
        return Statistics(gram, metric, target, output, n_tokens)

    def _note_coverage(self, members: Sequence[str], gram: torch.Tensor, n_tokens: int) -> None:
        """Remember how well an input was seen."""
        n_dead = count_dead_inputs(gram)
        self._coverage.append(Coverage(tuple(members), gram.shape[0], n_tokens, n_dead))

    def _report_coverage(self) -> None:
        """Say how well all inputs were seen, and warn of what the text lacks."""
        if self._coverage:
            self.log.emit("coverage", **coverage_event(self._coverage))
        for text in coverage_warnings(self._coverage):
            self.log.emit("warning", text=text)

    def _run_sequential(self, grams: GramSource) -> None:
        """Fit in the order of execution; what is finished runs in the compressed stream."""
        with placed(self.source.model, self.device, whole=True):
            self._run_sequential_here(grams)

    def _run_sequential_here(self, grams: GramSource) -> None:
        ids = grams.calibration.ids
        chooses = self.recipe.shrinkage is None
        held_back = max(1, ids.shape[0] // HELD_BACK_SHARE) if chooses else 0
        finished = {name: self._layer(name) for name in self.factors}
        stream = collect_sequential(
            self.source.model,
            [self.targets[name] for name in self.planned],
            ids,
            batch_size=self.recipe.batch_size,
            held_back=min(held_back, ids.shape[0] - 1),
            finished=finished,
            progress=grams.progress,
        )
        model = self.source.model
        originals = {name: model.get_submodule(name) for name in self.planned}
        for item in stream:
            for name, statistics in self._sequential_statistics(item).items():
                self._take(name, statistics)
            self.executor.drain()  # what comes next sees these
            for name in item.members:
                if name in self.factors:
                    model.set_submodule(name, self._layer(name))
        replace_modules(model, originals)
        self._report_coverage()

    def _sequential_statistics(self, item: SequentialInput) -> dict[str, Statistics]:
        weights = {name: self._weight(name)[0] for name in item.members}
        shrinkage, moments = self.recipe.shrinkage, item.moments
        if item.held_back is not None:
            choice = choose_shrinkage(list(weights.values()), item.moments, item.held_back)
            moments = item.moments.joined(item.held_back)
            shrinkage = choice.shrinkage
            self.log.emit(
                "shrinkage",
                modules=item.members,
                shrinkage=shrinkage,
                held_back_errors={str(key): value for key, value in choice.errors.items()},
            )
        metric = InputMetric(item.members[0], moments.gram)
        self._note_coverage(item.members, moments.original_gram, moments.n_tokens)
        return {
            name: self._statistics(
                name,
                moments.original_gram,
                metric,
                moments.n_tokens,
                # one held-back window at least was asked for where nothing was given
                sequential_target(
                    weight, moments.gram, moments.cross, 1.0 if shrinkage is None else shrinkage
                ),
            )
            for name, weight in weights.items()
        }

    def _layer(self, name: str) -> torch.nn.Module:
        if self.device != CPU:
            # thousands of tokens: the dense product is the fast one
            return dense_linear(self.factors[name], self.device)
        return CospadiLinear.from_factor(
            self.factors[name], dtype=torch.float32, layer_type=self.planned[name].layer_type
        )

    def _weight(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.source.weight(self.targets[name])

    def _take(self, name: str, statistics: Statistics) -> None:
        """Fit the module's group once the statistics of all its members are there."""
        self._waiting[name] = statistics
        members = self.groups[self.planned[name].leader]
        if all(member.name in self._waiting for member in members):
            self._submit(members)

    def _submit(self, members: Sequence[ModulePlan]) -> None:
        task = FitTask(
            tuple(
                TaskMember(
                    member.name,
                    *self._weight(member.name),
                    self._waiting.pop(member.name),
                    with_spectrum=member.name in self._with_spectrum,
                )
                for member in members
            ),
            self._settings(members[0]),
            sum(member.cost for member in members),
            self._is_for_one_thread(*self._shape(members[0].name)),
        )
        self.executor.submit(task, self._finish)

    def _shape(self, name: str) -> tuple[int, int]:
        """Inputs, and outputs of all that are fitted with a module."""
        members = self.groups[self.planned[name].leader]
        return members[0].d_in, sum(member.d_out for member in members)

    def _is_for_one_thread(self, d_in: int, d_out: int) -> bool:
        # sequential calibration waits for every fit before the next: nothing can run beside them
        is_alone = self.device != CPU or self.recipe.sequential
        return not is_alone and fits_one_thread(d_in, d_out)

    def _finish(self, outcome: Outcome) -> None:
        """Take the results of a task, or leave its modules dense: a failed matrix never loses the run."""
        if outcome.failure is not None:
            for name in outcome.names:
                plan = self.planned[name]
                self.failed.append(Skipped(name, (plan.d_out, plan.d_in), outcome.failure))
                self.log.emit("failed", module=name, reason=outcome.failure, cost=plan.cost)
            return
        for name in outcome.names:
            stored = self.work.entry(name)
            if stored is None:
                raise InputError(f"{self.work.path}: the result of {name} was changed or removed")
            self._accept(name, *stored)

    def _settings(self, plan: ModulePlan) -> FitSettings:
        return FitSettings(
            method=self.recipe.method,
            size=FactorSize(plan.n_identity, plan.n_atoms, plan.sparsity),
            types=dataclasses.replace(plan.types, rounding=self.recipe.coeffs_rounding),
            options=dataclasses.replace(self.recipe.learn_options(), products=self.products),
            refit=self.recipe.refit,
            objective=self.recipe.group_objective,
            bias_dtype=STORAGE_DTYPES[self.recipe.storage_dtype],
            candidates=plan.candidates,
        )

    def _accept(self, name: str, spec: FactorSpec, report: dict[str, Any]) -> None:
        plan = self.planned[name]
        self.factors.add(name, spec)
        self.reports[name] = report
        self.log.emit(
            "module",
            module=name,
            index=len(self.factors) + len(self.failed),
            total=len(self.planned),
            d_in=spec.d_in,
            d_out=spec.d_out,
            n_identity=spec.n_identity,
            n_atoms=spec.n_atoms,
            sparsity=spec.sparsity,
            leader=plan.leader,
            cost=plan.cost,
            resumed=name in self._resumed,
            **{key: value for key, value in report.items() if key != "spectrum"},
        )


def _middle_block(targets: Mapping[str, TargetLinear]) -> frozenset[str]:
    """Modules whose spectrum the report keeps: one decoder block, or all where there are no blocks."""
    blocks = {target.block for target in targets.values() if target.block is not None}
    middle = sorted(blocks)[len(blocks) // 2] if blocks else None
    return frozenset(name for name, target in targets.items() if target.block == middle)
