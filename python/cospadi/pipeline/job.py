"""The fits of one compression, in the order in which their statistics come."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cospadi.calibration.correction import choose_shrinkage, sequential_target
from cospadi.calibration.fisher import FisherStore
from cospadi.calibration.sequential import SequentialInput, collect_sequential
from cospadi.errors import FitError
from cospadi.factor import STORAGE_DTYPES, SparseFactor
from cospadi.learn.fit import FitInput, FitReport, FitSettings, fit
from cospadi.learn.methods import METHODS, FactorSize
from cospadi.learn.output_metric import OutputMetric
from cospadi.learn.whitening import Whitening, WhiteningError, identity_whitening, whiten_gram
from cospadi.model.discover import Skipped, TargetLinear, weight_of
from cospadi.model.layers import CospadiLinear, replace_modules
from cospadi.model.source import SourceModel
from cospadi.pipeline.events import EventLog
from cospadi.pipeline.grams import GramSource
from cospadi.pipeline.plan import ModulePlan, Plan
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.sensitivity import fisher_metrics
from cospadi.pipeline.workdir import WorkDir

HELD_BACK_SHARE = 8
"""One window in so many is held back to choose the shrinkage of sequential calibration."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What a module's fit needs to know about its input.

    Attributes
    ----------
    gram : torch.Tensor
        ``[d_in, d_in]`` float64 activation Gram of the original model, for the reported error.
    whitening : Whitening or WhiteningError
        Metric of the fit, or why there is none.
    target : torch.Tensor or None
        ``[d_out, d_in]`` weight to approximate in place of the module's own (sequential calibration).
    output : OutputMetric or None
        Metric of the outputs.
    """

    gram: torch.Tensor
    whitening: Whitening | WhiteningError
    target: torch.Tensor | None = None
    output: OutputMetric | None = None


class Job:
    """State of one run.

    Attributes
    ----------
    factors, reports : dict
        Finished modules by name; reports as plain data.
    failed : list of Skipped
        Modules that had to stay dense.
    calibration_seconds : float
        Time spent on activations, fits not counted.
    """

    def __init__(
        self,
        source: SourceModel,
        targets: dict[str, TargetLinear],
        plan: Plan,
        recipe: Recipe,
        grams: GramSource | None,
        fisher: FisherStore | None,
        work: WorkDir,
        log: EventLog,
    ) -> None:
        self.source = source
        self.targets = targets
        self.recipe = recipe
        self.grams = grams
        self.fisher = fisher
        self.work = work
        self.log = log
        self.planned = {module.name: module for module in plan.modules}
        self.groups = plan.groups
        self.factors: dict[str, SparseFactor] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.failed: list[Skipped] = []
        self.calibration_seconds = 0.0
        self._with_spectrum = _middle_block(targets)
        self._resumed: set[str] = set()
        self._waiting: dict[str, Statistics] = {}

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

    def _resume(self) -> None:
        """Take the groups all of whose members are finished; one member alone has no dictionary."""
        for leader, members in self.groups.items():
            stored = {member.name: self.work.load(member.name) for member in members}
            found = {name: result for name, result in stored.items() if result is not None}
            if len(found) < len(members):
                continue
            owner = found[leader][0]
            for name, (factor, report) in found.items():
                if name != leader:
                    factor = dataclasses.replace(
                        factor,
                        dictionary=owner.dictionary,
                        dictionary_scale=owner.dictionary_scale,
                    )
                self._resumed.add(name)
                self._accept(name, factor, report)
        if self._resumed:
            self.log.emit("resume", n_finished=len(self._resumed), n_modules=len(self.planned))

    def _run_without_text(self, pending: Sequence[TargetLinear]) -> None:
        for target in pending:
            eye = torch.eye(target.d_in, dtype=torch.float64)
            self._take(target.name, Statistics(eye, identity_whitening(target.d_in)))

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
            while items:
                # let go of each Gram as soon as its modules are done
                item = items.pop(next(iter(items)))
                metric: Whitening | WhiteningError = identity_whitening(item.gram.shape[0])
                if uses_text:
                    metric = _whiten(item.gram, item.members[0])
                for name in item.members:
                    self._take(name, self._statistics(name, item.gram, item.gram, metric))

    def _statistics(
        self,
        name: str,
        gram: torch.Tensor,
        fitted_gram: torch.Tensor,
        whitening: Whitening | WhiteningError,
        target: torch.Tensor | None = None,
    ) -> Statistics:
        """Statistics with what the gradients of the module's output say; the fit's metric is that of `fitted_gram`."""
        output = None
        if self.fisher is not None and isinstance(whitening, Whitening):
            whitening, output = fisher_metrics(
                self.fisher, self.targets[name], fitted_gram, whitening
            )
        return Statistics(gram, whitening, target, output)

    def _run_sequential(self, grams: GramSource) -> None:
        """Fit in the order of execution; what is finished runs in the compressed stream."""
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
                if name in self.factors:
                    model.set_submodule(name, self._layer(name))
        replace_modules(model, originals)

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
        metric = _whiten(moments.gram, item.members[0])
        return {
            name: self._statistics(
                name,
                moments.original_gram,
                moments.gram,
                metric,
                # one held-back window at least was asked for where nothing was given
                sequential_target(
                    weight, moments.gram, moments.cross, 1.0 if shrinkage is None else shrinkage
                ),
            )
            for name, weight in weights.items()
        }

    def _layer(self, name: str) -> CospadiLinear:
        return CospadiLinear.from_factor(
            self.factors[name], dtype=torch.float32, layer_type=self.planned[name].layer_type
        )

    def _weight(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return weight_of(self.source.model, self.targets[name])

    def _take(self, name: str, statistics: Statistics) -> None:
        """Fit the module's group once the statistics of all its members are there."""
        self._waiting[name] = statistics
        members = self.groups[self.planned[name].leader]
        if all(member.name in self._waiting for member in members):
            self._fit(members, [self._waiting.pop(member.name) for member in members])

    def _fit(self, members: Sequence[ModulePlan], statistics: Sequence[Statistics]) -> None:
        leader = members[0]
        try:
            joint = _joint_metric(leader.name, statistics)
            inputs = [
                self._fit_input(member.name, item)
                for member, item in zip(members, statistics, strict=True)
            ]
            results = fit(
                inputs,
                self._settings(leader),
                joint=joint,
                progress=lambda stats: self.log.progress(
                    "iteration", module=leader.name, **dataclasses.asdict(stats)
                ),
            )
        except (WhiteningError, FitError) as error:
            self._keep_dense(members, str(error))
            return
        for member, (factor, report) in zip(members, results, strict=True):
            data = _report_data(report)
            self.work.store(member.name, factor, data)
            self._accept(member.name, factor, data)

    def _fit_input(self, name: str, statistics: Statistics) -> FitInput:
        assert isinstance(statistics.whitening, Whitening)
        weight, bias = self._weight(name)
        return FitInput(
            name,
            weight,
            bias,
            statistics.gram,
            statistics.whitening,
            statistics.target,
            output=statistics.output,
            with_spectrum=name in self._with_spectrum,
        )

    def _settings(self, plan: ModulePlan) -> FitSettings:
        return FitSettings(
            method=self.recipe.method,
            size=FactorSize(plan.n_identity, plan.n_atoms, plan.sparsity),
            types=dataclasses.replace(plan.types, rounding=self.recipe.coeffs_rounding),
            options=self.recipe.learn_options(),
            refit=self.recipe.refit,
            objective=self.recipe.group_objective,
            bias_dtype=STORAGE_DTYPES[self.recipe.storage_dtype],
            candidates=plan.candidates,
        )

    def _accept(self, name: str, factor: SparseFactor, report: dict[str, Any]) -> None:
        plan, spec = self.planned[name], factor.spec
        self.factors[name] = factor
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

    def _keep_dense(self, members: Sequence[ModulePlan], reason: str) -> None:
        """A failed matrix never loses the run: its group stays dense, is reported, and the result is partial."""
        reason = reason.removeprefix(f"{members[0].name}: ")
        for plan in members:
            self.failed.append(Skipped(plan.name, (plan.d_out, plan.d_in), reason))
            self.log.emit("failed", module=plan.name, reason=reason, cost=plan.cost)


def _whiten(gram: torch.Tensor, name: str) -> Whitening | WhiteningError:
    try:
        return whiten_gram(gram, name)
    except WhiteningError as error:
        return error


def _joint_metric(name: str, statistics: Sequence[Statistics]) -> Whitening:
    """Metric of the members' mean Gram; of a single one its own."""
    for item in statistics:
        if isinstance(item.whitening, WhiteningError):
            raise item.whitening
    first = statistics[0].whitening
    assert isinstance(first, Whitening)
    if len(statistics) == 1 or first.kind == "identity":
        return first
    return whiten_gram(torch.stack([item.gram for item in statistics]).mean(0), name)


def _middle_block(targets: Mapping[str, TargetLinear]) -> frozenset[str]:
    """Modules whose spectrum the report keeps: one decoder block, or all where there are no blocks."""
    blocks = {target.block for target in targets.values() if target.block is not None}
    middle = sorted(blocks)[len(blocks) // 2] if blocks else None
    return frozenset(name for name, target in targets.items() if target.block == middle)


def _report_data(report: FitReport) -> dict[str, Any]:
    # JSON turns tuples into lists; do it here so that a resumed run holds equal data
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(report)))
    return plain
