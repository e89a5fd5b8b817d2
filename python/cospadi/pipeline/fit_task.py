"""One fit as a unit of work: everything it needs and nothing else, so that any process may run it with equal bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock

import torch

from cospadi.errors import CospadiError
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.learn.fit import FitInput, FitReport, FitSettings, fit
from cospadi.learn.learner import IterationStats
from cospadi.learn.output_metric import OutputMetric, RowScales
from cospadi.learn.whitening import Whitening, WhiteningError, identity_whitening, whiten_gram
from cospadi.native.support import torch_threads

CPU = torch.device("cpu")

# torch's own allocations; matrix products of other alignments may give other bits
_ALIGNMENT = 64

MOST_ON_ONE_THREAD = 1 << 23
"""Weights of a task up to which it is fitted on one thread.

Products of such sizes hardly gain from a second thread; fits side by side do. Larger ones have all threads: as many of
them at a time would take too much memory.
"""

FIT_ERRORS = (CospadiError, RuntimeError, ValueError, ArithmeticError)
"""What numbers that no fit can take end in. They come again in every attempt: the matrix stays dense."""


@dataclass(frozen=True, eq=False)
class InputMetric:
    """Metric of a fit's inputs, whitened once for all that share it.

    Attributes
    ----------
    name : str
        Module that receives the input first, for messages.
    gram : torch.Tensor or None
        ``[d_in, d_in]`` float64; None: every direction counts alike.
    weighted : torch.Tensor or None
        Gram that is used in place of it where it can be whitened (the few tokens that carry the gradient weigh more).
    """

    name: str
    gram: torch.Tensor | None
    weighted: torch.Tensor | None = None
    _factors: dict[torch.device, Whitening] = field(default_factory=dict, init=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def whitening(self, device: torch.device, d_in: int) -> Whitening:
        """The metric's factor for `d_in` inputs, computed and kept on a device.

        Raises
        ------
        WhiteningError, InputError
            There is none.
        """
        # fits that share the metric may ask side by side, on any number of threads: the bits are those of one thread,
        # but for inputs whose fits all have the process's threads
        is_small = d_in * d_in <= MOST_ON_ONE_THREAD
        with self._lock, torch_threads(1 if is_small else torch.get_num_threads()):
            if device not in self._factors:
                self._factors[device] = self._factor(device, d_in)
            return self._factors[device]

    def _factor(self, device: torch.device, d_in: int) -> Whitening:
        if self.gram is None:
            return identity_whitening(d_in, device)
        plain = whiten_gram(self.gram.to(device), self.name)
        if self.weighted is None:
            return plain
        try:
            return whiten_gram(self.weighted.to(device), self.name)
        except WhiteningError:
            return plain


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a module's fit needs to know about its input.

    Attributes
    ----------
    gram : torch.Tensor or None
        ``[d_in, d_in]`` float64 activation Gram of the original model, for the reported error; None: the identity.
    metric : InputMetric
        Metric of the fit.
    target : torch.Tensor or None
        ``[d_out, d_in]`` weight to approximate in place of the module's own (sequential calibration).
    output : OutputMetric, RowScales or None
        Metric of the outputs.
    n_tokens : int or None
        Calibration tokens behind `gram`; None: no text.
    """

    gram: torch.Tensor | None
    metric: InputMetric
    target: torch.Tensor | None = None
    output: OutputMetric | RowScales | None = None
    n_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class TaskMember:
    """One weight of a task: ``weight [d_out, d_in]`` float32, ``bias [d_out]`` or None."""

    name: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    statistics: Statistics
    with_spectrum: bool = False

    @property
    def d_in(self) -> int:
        """Features of the input."""
        return self.weight.shape[1]


@dataclass(frozen=True, eq=False)
class FitTask:
    """Modules that are fitted together: one, or those that share a dictionary, its owner first.

    Attributes
    ----------
    cost : float
        Work estimate; the largest tasks are begun first.
    on_one_thread : bool
        Whatever the threads of the process: others may then run beside it. Bits depend on it.
    """

    members: tuple[TaskMember, ...]
    settings: FitSettings
    cost: float
    on_one_thread: bool = False

    @property
    def name(self) -> str:
        """Name of the first member."""
        return self.members[0].name

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs, and outputs of all members together."""
        return self.members[0].d_in, sum(member.weight.shape[0] for member in self.members)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all members."""
        return tuple(member.name for member in self.members)


def fits_one_thread(d_in: int, d_out: int) -> bool:
    """Whether a fit of so many inputs and outputs (of all members) is one for one thread."""
    return d_in * max(d_in, d_out) <= MOST_ON_ONE_THREAD


def run_task(
    task: FitTask,
    progress: Callable[[IterationStats], None] | None = None,
    device: torch.device = CPU,
) -> list[tuple[SparseFactor, FitReport]]:
    """Fit the members of a task.

    Returns
    -------
    list of (SparseFactor, FitReport)
        In the order of the members, on the CPU. Equal bits in every process with the same threads, instruction set and
        versions.

    Raises
    ------
    FIT_ERRORS
        The members must stay dense; the message says why.
    """
    with torch_threads(1 if task.on_one_thread else torch.get_num_threads()):
        return _run(task, progress, device)


def _run(
    task: FitTask, progress: Callable[[IterationStats], None] | None, device: torch.device
) -> list[tuple[SparseFactor, FitReport]]:
    inputs = []
    for member in task.members:
        statistics = member.statistics
        whitening = statistics.metric.whitening(device, member.d_in)
        gram, output = statistics.gram, statistics.output
        if gram is None:
            gram = torch.eye(member.d_in, dtype=torch.float64, device=device)
        if isinstance(output, RowScales):
            output = RowScales(output.scales.to(device))
        elif output is not None and output.matrix.device != device:
            output = dataclasses.replace(output, matrix=output.matrix.to(device))
        inputs.append(
            FitInput(
                member.name,
                _placed(member.weight, device),
                None if member.bias is None else member.bias.to(device),
                _placed(gram, device),
                whitening,
                None if statistics.target is None else _placed(statistics.target, device),
                output=output,
                with_spectrum=member.with_spectrum,
                n_tokens=statistics.n_tokens,
            )
        )
    joint = _joint_metric(task.name, inputs)
    return fit(inputs, task.settings, joint=joint, progress=progress)


def _placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return aligned(tensor.to(device))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, at an address that torch itself would have chosen."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is torch's on the CPU for want of memory, which another attempt may have."""
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def failure_reason(error: Exception, name: str) -> str:
    """One line on why the modules of a task stay dense."""
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, CospadiError):
        text = f"{type(error).__name__.lstrip('_')}: {text}"
    return text.removeprefix(f"{name}: ")[:1000]


def _joint_metric(name: str, inputs: Sequence[FitInput]) -> Whitening:
    """Metric of the members' mean Gram; of a single one its own."""
    first = inputs[0].whitening
    if len(inputs) == 1 or first.kind == "identity":
        return first
    return whiten_gram(torch.stack([item.gram for item in inputs]).mean(0), name)
