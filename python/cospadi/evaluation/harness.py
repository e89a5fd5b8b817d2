"""What the zero-shot evaluation needs of lm-evaluation-harness: its task index, its log, a model it accepts."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cospadi.errors import CospadiError, InputError, install_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Called with the task's name, its finished requests and all its requests.
TaskProgress = Callable[[str, int, int], None]


def require_harness() -> None:
    """Check that the optional packages are installed.

    Raises
    ------
    InputError
        One is missing.
    """
    if find_spec("lm_eval") is None or find_spec("accelerate") is None:
        raise InputError(f"zero-shot tasks need lm-evaluation-harness: {install_command('eval')}")


def harness_versions() -> dict[str, str]:
    """Versions of lm-eval and of the package that reads its data."""
    import datasets
    import lm_eval

    return {"lm_eval": lm_eval.__version__, "datasets": datasets.__version__}


@contextmanager
def harness_log() -> Iterator[list[str]]:
    """Keep the harness's log off the terminal; yield its warnings, which are complete when the block ends.

    A warning that one line of the harness gives for many items is listed once, with its number.
    """
    import datasets

    found: dict[tuple[str, int], tuple[str, int]] = {}
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            place = (record.pathname, record.lineno)
            text, count = found.get(place, (" ".join(record.getMessage().split())[:300], 0))
            found[place] = (text, count + 1)

    logger = logging.getLogger("lm_eval")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    had_bars = not datasets.are_progress_bars_disabled()
    logger.handlers, logger.propagate = [Collector(logging.WARNING)], False
    logger.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        yield warnings
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
        warnings += [
            text if count == 1 else f"{text} [{count} times]" for text, count in found.values()
        ]


@lru_cache(maxsize=4)
def task_manager(names: tuple[str, ...]) -> Any:  # noqa: ANN401
    """Return the harness's ``TaskManager`` with at least the tasks, groups and tags of `names` that exist.

    Indexing all 14,000 definitions takes 12 s; finding the files of a few tasks by their ``task:`` line takes 0.6 s.
    Only groups, tags and unknown names need the whole index.
    """
    import lm_eval.tasks

    wanted = "|".join(re.escape(name) for name in names)
    line = re.compile(rf"^task:[ \t]*[\"']?({wanted})[\"']?[ \t\r]*$", re.MULTILINE)
    folders: dict[str, str] = {}
    with harness_log():
        for path in sorted(Path(lm_eval.tasks.__file__).parent.glob("**/*.yaml")):
            for name in line.findall(path.read_text(encoding="utf-8", errors="replace")):
                folders.setdefault(name, str(path.parent))
        if len(folders) == len(set(names)):
            include = sorted(set(folders.values()))
            manager = lm_eval.tasks.TaskManager(include_path=include, include_defaults=False)
            if all(name in manager.task_index for name in names):
                return manager
    return _complete_task_manager()


@lru_cache(maxsize=1)
def _complete_task_manager() -> Any:  # noqa: ANN401
    import lm_eval.tasks

    with harness_log():
        return lm_eval.tasks.TaskManager()


def language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    progress: TaskProgress | None,
) -> Any:  # noqa: ANN401
    """Wrap an open model for the harness.

    Parameters
    ----------
    model, tokenizer
        Causal language model, put into eval mode, and its tokenizer, which is copied.
    batch_size
        Requests per forward pass.
    progress
        Called after every forward pass.

    Returns
    -------
    lm_eval.api.model.LM
        With an attribute ``task`` to set: the name in progress and errors. Log likelihoods are computed in fp32; one
        that is not finite raises `CospadiError`, an answer that does not fit the context `InputError`.
    """
    from lm_eval.models.huggingface import HFLM

    class OpenModel(HFLM):
        task = ""
        finished = 0
        n_requests = 0

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Any]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
        ) -> list[Any]:
            self.finished, self.n_requests = 0, len(requests)
            for (_, answer), _, ids in requests:
                if not 0 < len(ids) <= self.max_length:
                    raise InputError(
                        f"task {self.task!r}: the answer {answer[:60]!r} has {len(ids)} tokens, "
                        f"expected 1 to {self.max_length}, the model's context"
                    )
            answers: list[Any] = super()._loglikelihood_tokens(
                requests, disable_tqdm=True, override_bs=override_bs
            )
            for ((_, answer), *_), (likelihood, _) in zip(requests, answers, strict=True):
                # the harness takes the argmax: of NaN that is the first choice, a plausible score
                if not math.isfinite(likelihood):
                    raise CospadiError(
                        f"task {self.task!r}: the log likelihood of {answer[:60]!r} is {likelihood}: "
                        "the model gives non-finite logits there"
                    )
            # requests that differ in nothing but their last token share a row, which the count of rows misses
            self._report(self.n_requests - self.finished)
            return answers

        def _model_call(
            self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
        ) -> Tensor:
            with torch.no_grad():
                logits: Tensor = self.model(input_ids=inps, use_cache=False).logits
            self._report(inps.shape[0])
            return logits

        def _report(self, n_more: int) -> None:
            self.finished += n_more
            if progress is not None and n_more > 0:
                progress(self.task, self.finished, self.n_requests)

    with harness_log():
        return OpenModel(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # the harness may add a padding token to it
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",
        )
