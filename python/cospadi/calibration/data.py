"""Calibration tokens: text in, a fixed number of equally long windows of token ids out, the same for every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cospadi.calibration.ids import ids_sha256, read_ids
from cospadi.calibration.text import builtin_text, existing_path, read_documents, split_range
from cospadi.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CalibrationSet", "builtin_text", "encode", "load_calibration"]

# Text beyond this many characters per wanted token is not read: a sample of a large corpus needs no more, and the
# time to tokenise stays in seconds. At 3 to 5 characters per token this leaves 3 to 5 times the wanted windows.
_CHARACTERS_PER_TOKEN = 16
_LEAST_CHARACTERS = 8 << 20
# Documents given to the tokenizer at a time: it works on them in parallel.
_TOKENIZER_BATCH = 256


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token ids for calibration.

    Attributes
    ----------
    ids
        [n_samples, sequence_length] int64.
    sha256
        Hash of the ids, see `cospadi.calibration.ids.ids_sha256`.
    description
        One line: source, amount, how the windows were chosen, seed.
    """

    ids: Tensor
    sha256: str
    description: str


def load_calibration(
    spec: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """Make calibration windows from a text source or from token ids.

    Parameters
    ----------
    spec
        A text source, perhaps with a range of its documents (see `cospadi.calibration.text.read_documents`), or a
        ``.safetensors`` file with token ids in a tensor named ``calibration`` (or its only tensor): [n, length], or
        one dimension for a token stream.
    tokenizer
        The model's tokenizer; not used for token ids.
    n_samples, sequence_length
        Number and length of the windows, at least 1 and 2. None: 128 and 1024 for text; everything there is for
        two-dimensional token ids.
    seed
        Seed of the choice.

    Returns
    -------
    CalibrationSet
        Equal for equal text, tokenizer, numbers and seed, on every machine.

    Raises
    ------
    InputError
        The source is missing or damaged, or holds too few tokens (the message states both counts).

    Notes
    -----
    How windows are made from text:

    1. Documents are taken in the order of the source, or of its range, until they have 16 characters per wanted
       token, at least 8 Mi characters together; the last one is cut there.
    2. Each document with a blank line behind it is tokenised without special tokens; the ids are concatenated.
    3. The stream is cut into consecutive windows, the tail dropped. ``torch.randperm`` with `seed` orders them, the
       first `n_samples` are taken. So fewer samples with the same seed are the beginning of more samples.
    4. If the tokenizer begins a text with special tokens (BOS), each window begins with them, and has as many fewer
       tokens of text: at inference the model sees them too.

    The built-in text is short. Where it holds fewer windows than wanted, its windows overlap: the possible starts are
    divided into `n_samples` equal ranges and one start is drawn from each, uniformly, with `seed`.

    From two-dimensional ids, the first `n_samples` rows and the first `sequence_length` columns are taken as they are;
    the seed has no influence.
    """
    for name, value, least in (
        ("n_samples", n_samples, 1),
        ("sequence_length", sequence_length, 2),
    ):
        if value is not None and value < least:
            raise InputError(f"calibration {name} must be at least {least}, got {value}")
    if str(spec).endswith(".safetensors"):
        path = existing_path(spec)
        assert path is not None  # the suffix rules out a hub id
        ids = read_ids(path, ("calibration",))
        if ids.ndim == 2:
            return _from_rows(ids, path.name, n_samples, sequence_length)
        windows = _Windows(n_samples or 128, sequence_length or 1024, seed)
        return windows.choose(ids, [], f"{path.name}: {ids.numel()} token ids", may_overlap=False)
    windows = _Windows(n_samples or 128, sequence_length or 1024, seed)
    may_overlap = split_range(spec)[0] == "builtin"
    name, documents = read_documents(spec)
    stream, amount = _tokenise(documents, tokenizer, windows.n_samples * windows.length)
    return windows.choose(
        stream, leading_tokens(tokenizer), f"{name}: {amount}", may_overlap=may_overlap
    )


def encode(
    tokenizer: PreTrainedTokenizerBase | None, text: str, *, special_tokens: bool
) -> list[int]:
    """Tokenise one text, without advice about its length.

    Raises
    ------
    InputError
        There is no tokenizer, as with a compressed checkpoint whose folder holds none.
    """
    if tokenizer is None:
        raise InputError(
            "text needs a tokenizer, the model came without one: give token ids (.safetensors) instead"
        )
    ids: list[int] = tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return ids


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text."""
    bare = encode(tokenizer, "a", special_tokens=False)
    full = encode(tokenizer, "a", special_tokens=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _tokenise(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, n_tokens: int
) -> tuple[Tensor, str]:
    """Return the token stream and a note on the amount of text it was made from."""
    remaining = max(_LEAST_CHARACTERS, _CHARACTERS_PER_TOKEN * n_tokens)
    n_documents = n_characters = 0
    pieces: list[Tensor] = []
    batch: list[str] = []

    def flush() -> None:
        if batch:
            encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            pieces.extend(torch.tensor(ids, dtype=torch.int64) for ids in encoded)
            batch.clear()

    for document in documents:
        document = document[:remaining]
        batch.append(document + "\n\n")
        n_documents += 1
        n_characters += len(document)
        remaining -= len(document)
        if len(batch) == _TOKENIZER_BATCH:
            flush()
        if remaining <= 0:
            break
    flush()
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    read = "first " if remaining <= 0 else ""
    noun = "document" if n_documents == 1 else "documents"
    return (
        stream,
        f"{read}{n_documents} {noun}, {n_characters} characters, {stream.numel()} tokens",
    )


def _from_rows(
    ids: Tensor, name: str, n_samples: int | None, sequence_length: int | None
) -> CalibrationSet:
    rows, columns = ids.shape
    n = rows if n_samples is None else n_samples
    length = columns if sequence_length is None else sequence_length
    if n > rows or length > columns or min(n, length) == 0:
        raise InputError(
            f"{name} holds {rows} x {columns} token ids, {n} x {length} were asked for"
        )
    chosen = ids[:n, :length].contiguous()
    return CalibrationSet(
        chosen, ids_sha256(chosen), f"{name}: rows 0 to {n - 1}, {length} tokens each, as they are"
    )


@dataclass(frozen=True)
class _Windows:
    """Choice of windows from a token stream (see `load_calibration`, Notes)."""

    n_samples: int
    length: int
    seed: int

    def choose(
        self, stream: Tensor, leading: list[int], source: str, *, may_overlap: bool
    ) -> CalibrationSet:
        body = self.length - len(leading)
        if body < 1:
            raise InputError(
                f"sequence length {self.length} has no room beside {len(leading)} special tokens"
            )
        available = stream.numel() // body
        positions = stream.numel() - body + 1
        generator = torch.Generator().manual_seed(self.seed)
        if available >= self.n_samples:
            starts = torch.randperm(available, generator=generator)[: self.n_samples] * body
            how = f"{self.n_samples} of {available} windows of {self.length} tokens"
        elif may_overlap and positions >= self.n_samples:
            starts = _spread_starts(positions, self.n_samples, generator)
            how = f"{self.n_samples} overlapping windows of {self.length} tokens ({available} would not overlap)"
        else:
            raise InputError(
                f"calibration text too short: {source} make {available} windows of {self.length} tokens, "
                f"{self.n_samples} were asked for: give more text, or fewer or shorter samples"
            )
        windows = stream[starts[:, None] + torch.arange(body)]  # [n_samples, body]
        prefix = torch.tensor(leading, dtype=torch.int64).expand(self.n_samples, -1)
        ids = torch.cat([prefix, windows], dim=1)
        return CalibrationSet(ids, ids_sha256(ids), f"{source}; {how}, seed {self.seed}")


def _spread_starts(positions: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw one start from each of n equal ranges of the possible positions."""
    edges = torch.arange(n + 1) * positions // n
    widths = edges[1:] - edges[:-1]
    return edges[:-1] + (torch.rand(n, generator=generator, dtype=torch.float64) * widths).long()
