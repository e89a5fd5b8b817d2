"""Perplexity by one fixed protocol, so that numbers from different days can be compared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cospadi.calibration.data import encode
from cospadi.calibration.ids import check_ids, ids_sha256, read_ids
from cospadi.calibration.text import existing_path, is_path, read_documents
from cospadi.errors import CospadiError, InputError
from cospadi.versions import versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[int, int], None]

# Positions whose loss is computed at a time: bounds the fp32 copy of the logits, 50 MB at a vocabulary of 49152.
_LOSS_ROWS = 256
_LONGEST_PATH = 4096


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity with everything needed to repeat it.

    Attributes
    ----------
    perplexity
        exp(nll_per_token).
    nll_per_token
        Mean negative log likelihood in nats over all predicted tokens.
    windows, context
        Number of windows and tokens in each.
    tokens
        Predicted tokens: windows * (context - 1).
    ids_sha256
        Hash of all token ids of the text, also of those behind the last window.
    seconds
        Duration.
    dtype
        Of the model's parameters.
    versions
        Versions of cospadi, torch, transformers and Python.
    window_nll
        Mean negative log likelihood of each window, for paired comparisons.
    """

    perplexity: float
    nll_per_token: float
    windows: int
    tokens: int
    context: int
    ids_sha256: str
    seconds: float
    dtype: str
    versions: dict[str, str]
    window_nll: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self) | {"window_nll": list(self.window_nll)}


def tokenize_text(tokenizer: PreTrainedTokenizerBase, path_or_text: str | Path) -> Tensor:
    """Tokenise a whole text once, with the tokenizer's default special tokens.

    Parameters
    ----------
    tokenizer
        The model's tokenizer.
    path_or_text
        - a ``.jsonl`` file: the documents' texts joined by a blank line;
        - a ``.raw`` file: the rows of WikiText joined by a blank line (`cospadi.calibration.text.wikitext_rows`);
        - any other file: as it is; a folder: its documents joined by a blank line;
        - a ``.safetensors`` file with token ids (tensor ``evaluation`` or ``test``, or the only one), flattened;
        - ``"builtin"``: the evaluation half of the built-in text;
        - any of these but token ids with a range of documents behind it, ``c4.jsonl[800:]``
          (`cospadi.calibration.text.read_documents`);
        - a string with a line break, or with a space and nothing of a path about it: the text itself.

    Returns
    -------
    Tensor
        [n_tokens] int64.

    Raises
    ------
    InputError
        The source does not exist or cannot be read.
    """
    is_literal = (
        isinstance(path_or_text, str) and path_or_text != "builtin" and _is_literal(path_or_text)
    )
    if is_literal:
        text = str(path_or_text)
    else:
        if str(path_or_text).endswith(".safetensors"):
            path = existing_path(path_or_text)
            assert path is not None  # the suffix rules out a hub id
            return read_ids(path, ("evaluation", "test")).flatten()
        _, documents = read_documents(path_or_text, half="evaluation")
        text = "\n\n".join(documents)
    return torch.tensor(encode(tokenizer, text, special_tokens=True), dtype=torch.int64)


def _is_literal(source: str) -> bool:
    if "\n" in source or len(source) > _LONGEST_PATH:
        return True
    # a path with a spelling mistake must not be evaluated as text: `is_path` raises for what looks like one
    return " " in source and not is_path(source)


def evaluate_perplexity(
    model: nn.Module,
    ids: Tensor,
    *,
    context: int,
    windows: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Compute the perplexity of a causal language model on a token stream.

    The stream is cut into consecutive windows of `context` tokens that do not overlap; the tail is dropped. In each
    window tokens 2 to `context` are predicted from those before them in the window. The loss is computed in fp32 and
    averaged over all predicted tokens.

    Parameters
    ----------
    model
        Causal language model that returns ``logits``.
    ids
        [n_tokens] integer, from one tokenisation of the whole text.
    context
        Tokens per window, at least 2.
    windows
        Number of windows from the beginning; None means all.
    batch_size
        Windows per forward pass.
    progress
        Called with (finished windows, all windows).

    Raises
    ------
    InputError
        The text is shorter than one window or than the windows asked for, or the ids do not fit the model.
    CospadiError
        The loss of a window is not finite (names the window): windows are never left out.
    """
    n_windows = _window_count(ids, context, windows)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    check_ids(model, ids, length=context)
    parameter = next(model.parameters())
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    losses: list[float] = []
    try:
        used = ids[: n_windows * context].view(n_windows, context)
        for batch in torch.split(used, batch_size):
            for loss in _window_losses(model, batch.to(parameter.device, torch.int64)):
                if not math.isfinite(loss):
                    raise CospadiError(
                        f"the loss of window {len(losses)} is {loss}: the model gives non-finite logits there"
                    )
                losses.append(loss)
            if progress is not None:
                progress(len(losses), n_windows)
    finally:
        model.train(was_training)
    predicted = context - 1
    nll = math.fsum(losses) / (n_windows * predicted)
    if nll > 700:
        raise CospadiError(f"perplexity overflows: {nll:.1f} nats per token")
    return PerplexityResult(
        perplexity=math.exp(nll),
        nll_per_token=nll,
        windows=n_windows,
        tokens=n_windows * predicted,
        context=context,
        ids_sha256=ids_sha256(ids),
        seconds=time.perf_counter() - started,
        dtype=str(parameter.dtype).removeprefix("torch."),
        versions=versions(),
        window_nll=tuple(loss / predicted for loss in losses),
    )


def _window_count(ids: Tensor, context: int, windows: int | None) -> int:
    if context < 2:
        raise InputError(f"context must be at least 2 tokens, got {context}")
    if windows is not None and windows < 1:
        raise InputError(f"windows must be at least 1, got {windows}")
    if ids.ndim != 1:
        raise InputError(f"evaluation ids must have one dimension, got {list(ids.shape)}")
    available = ids.numel() // context
    if available == 0:
        raise InputError(
            f"text too short: {ids.numel()} tokens do not fill one window of {context}"
        )
    if windows is not None and windows > available:
        raise InputError(
            f"text too short: {ids.numel()} tokens make {available} windows of {context}, {windows} were asked for"
        )
    return available if windows is None else windows


def _window_losses(model: nn.Module, batch: Tensor) -> list[float]:
    """Return the summed loss of each window of a batch [n, context]."""
    with torch.no_grad():
        logits = model(input_ids=batch, use_cache=False).logits  # [n, context, vocabulary]
        sums = torch.zeros(batch.shape[0], dtype=torch.float64, device=batch.device)
        for start in range(0, batch.shape[1] - 1, _LOSS_ROWS):
            stop = min(start + _LOSS_ROWS, batch.shape[1] - 1)
            part = logits[:, start:stop].float()  # [n, rows, vocabulary]
            chosen = part.gather(2, batch[:, start + 1 : stop + 1, None]).squeeze(2)  # [n, rows]
            # not F.cross_entropy: on CPU its fp32 sum over 49152 tokens is off by 1e-6 on average with the
            # vocabulary last and by 5e-5 with it in the middle, this one by 1e-8
            sums += (torch.logsumexp(part, dim=2) - chosen).double().sum(dim=1)
    values: list[float] = sums.tolist()
    return values
