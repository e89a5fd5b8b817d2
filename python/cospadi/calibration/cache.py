"""Activation Grams on disk: a second run over the same model and tokens reads them instead of running the model.

One safetensors file holds one distinct input::

    rows_<first row>   fp64 [up to 256, first row + up to 256]: G[r0:r1, :r1], the lower triangle in panels of rows
    n_tokens           int64 [1]
    members            uint8: names of the modules that receive this input, JSON list in UTF-8
    sha256             uint8 [32]: of everything above, in file order, after the fingerprint

A vector (the diagonal of a matrix that is too large to keep) has one tensor ``vector fp64 [length]`` in place of the
panels.

The values are those of an uncached run, bit for bit: fp64 loses nothing, the other half of G is its mirror, and the
fingerprint names all that the bits depend on. Half of 8 d_in^2 bytes, and one pass of SHA-256, is the price.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from cospadi.calibration.capture import InputGroup
from cospadi.calibration.ids import check_ids, ids_sha256
from cospadi.calibration.statistics import (
    ActivationGram,
    GramPass,
    Progress,
    collect_grams,
    input_groups,
    plan_passes,
)
from cospadi.checkpoint.safetensors_file import TensorInfo, read_header, read_tensor
from cospadi.errors import CheckpointError, InputError
from cospadi.model.discover import TargetLinear

#: Of the files, and of the way Grams are computed; a change of either is a new number.
CACHE_VERSION = 1
# Rows per tensor: what reading needs beside the Gram itself.
_PANEL_ROWS = 256
# Grams read ahead where the caller sets no bound.
_READ_BYTES = 256 << 20

Report = Callable[[str], None]


def collect_cached_grams(
    model: nn.Module,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    *,
    folder: Path,
    weights: str,
    report: Report,
    batch_size: int = 8,
    max_gram_bytes: int | None = None,
    progress: Progress | None = None,
    skip_targets: AbstractSet[str] = frozenset(),
    device: torch.device | None = None,
    keep_going: bool = False,
) -> Iterator[GramPass]:
    """Yield the Grams that `collect_grams` yields: those on disk first, then the others, which are stored.

    Parameters
    ----------
    model, targets, ids, batch_size, max_gram_bytes, progress, skip_targets, device, keep_going
        As for `collect_grams`. `max_gram_bytes` bounds the Grams that are read as well; without it they are read 256
        MiB at a time.
    folder
        Folder of the files, made if absent. Several models and calibration sets may share it.
    weights
        What identifies the model's weights: ``SourceModel.fingerprint``. The model must hold exactly these.
    report
        Receives one line for each file that is not used although it has the right name, and for a Gram that cannot be
        stored. Neither stops the run.

    Yields
    ------
    GramPass
        Together they name every target once. `index` and `n_passes` count the reading and the collecting ones
        (`n_passes` grows if a stored Gram proves unusable, whose pass then lacks it); `seconds` of a reading one is
        the time of reading.

    Raises
    ------
    InputError
        As `collect_grams`, or `folder` cannot be made.

    Notes
    -----
    The fingerprint is over `weights`, the token ids and their shape, the batch size, the model's type and device, and
    what decides the order of floating-point sums: threads, instruction set, torch's version. A Gram found under it has
    the bits of an uncached run. A forward pass over 64 tokens finds out who shares an input.
    """
    wanted = [target for target in targets if target.name not in skip_targets]
    if ids.ndim != 2:
        raise InputError(f"calibration ids must be [n_samples, length], got {list(ids.shape)}")
    check_ids(model, ids, length=ids.shape[1])
    fingerprint = gram_fingerprint(
        model, ids, weights=weights, batch_size=batch_size, device=device
    )
    cache = GramCache(folder, fingerprint)
    if not wanted:
        return iter(())
    return _read_and_collect(
        model,
        wanted,
        ids,
        cache,
        report,
        batch_size,
        max_gram_bytes,
        progress,
        device,
        keep_going,
    )


def _read_and_collect(
    model: nn.Module,
    targets: Sequence[TargetLinear],
    ids: Tensor,
    cache: GramCache,
    report: Report,
    batch_size: int,
    max_gram_bytes: int | None,
    progress: Progress | None,
    device: torch.device | None,
    keep_going: bool,
) -> Iterator[GramPass]:
    place = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        groups = input_groups(model, targets, ids)
    finally:
        model.train(was_training)
    # also for Grams that will be read: the error of a bound that is too small must not depend on the files
    plan_passes(groups, max_gram_bytes)
    largest = max(group.gram_bytes for group in groups)
    bound = max(_READ_BYTES, largest) if max_gram_bytes is None else max_gram_bytes
    stored = [group for group in groups if cache.holds(group)]
    missing = [group for group in groups if not cache.holds(group)]
    reads = plan_passes(stored, bound) if stored else []
    n_passes = len(reads) + (len(plan_passes(missing, max_gram_bytes)) if missing else 0)
    found: set[str] = set()

    def read(index: int, part: Sequence[InputGroup]) -> GramPass:
        started = time.perf_counter()
        grams = {}
        for group in part:
            try:
                grams[group.key] = cache.read(group, place)
                found.update(group.members)
            except CheckpointError as error:
                report(f"stored Gram of {group.key} is not used, it is collected again: {error}")
        return GramPass(index, n_passes, grams, time.perf_counter() - started)

    def store(finished: GramPass) -> GramPass:
        for gram in finished.grams.values():
            if gram.n_nonfinite:
                continue
            try:
                cache.write(gram)
            except OSError as error:
                report(
                    f"the Gram of {gram.members[0]} is not stored in {cache.folder}: {error.strerror or error}"
                )
        return GramPass(
            len(reads) + finished.index,
            len(reads) + finished.n_passes,
            finished.grams,
            finished.seconds,
        )

    # nothing here has a name for a pass that is out: the caller alone decides how long its Grams live
    yield from map(read, range(len(reads)), reads)
    rest = [target for target in targets if target.name not in found]
    yield from map(
        store,
        collect_grams(
            model,
            rest,
            ids,
            batch_size=batch_size,
            max_gram_bytes=max_gram_bytes,
            progress=progress,
            device=device,
            keep_going=keep_going,
        ),
    )


def gram_fingerprint(
    model: nn.Module,
    ids: Tensor,
    *,
    weights: str,
    batch_size: int,
    device: torch.device | None = None,
) -> str:
    """Return the SHA-256 (hex) of everything that the bits of a Gram depend on, see `collect_cached_grams`."""
    parameter = next(model.parameters())
    parts = {
        "cache_version": CACHE_VERSION,
        "weights": weights,
        "ids_sha256": ids_sha256(ids),
        "ids_shape": list(ids.shape),
        "batch_size": batch_size,
        "dtype": str(parameter.dtype),
        "device": (parameter.device if device is None else device).type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class GramCache:
    """Files of one fingerprint in a folder.

    Parameters
    ----------
    folder
        Made if absent.
    fingerprint
        See `gram_fingerprint`.

    Raises
    ------
    InputError
        The folder cannot be made.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"folder {folder} of the Gram cache cannot be made: {error.strerror or error}"
            ) from error

    def path(self, key: str) -> Path:
        """Return the file of the input that the module `key` receives first."""
        name = hashlib.sha256(f"{self._fingerprint} {key}".encode()).hexdigest()
        return self.folder / f"gram-{name[:40]}.safetensors"

    def holds(self, group: InputGroup) -> bool:
        """Tell whether there is a file for a group; whether it can be used shows at reading."""
        return self.path(group.key).is_file()

    def read(self, group: InputGroup, device: torch.device) -> ActivationGram:
        """Read the Gram of a group.

        Parameters
        ----------
        group
            Group whose input is wanted.
        device
            Where the Gram shall lie.

        Returns
        -------
        ActivationGram
            With the members of `group`.

        Raises
        ------
        CheckpointError
            The file is damaged, of another fingerprint, or of an input that other modules share.

        Notes
        -----
        Memory: the Gram and 256 of its rows. Nothing of the Gram is handed out before the whole file was checked.
        """
        gram = torch.empty(group.d_in, group.d_in, dtype=torch.float64, device=device)

        def put(name: str, rows: Tensor) -> None:
            start, stop = panels[name]
            gram[start:stop, :stop] = rows
            gram[:start, start:stop] = gram[start:stop, :start].T

        panels = {name: (start, stop) for name, start, stop in _panels(group.d_in)}
        shapes = {name: (stop - start, stop) for name, (start, stop) in panels.items()}
        n_tokens, shared = self._read(self.path(group.key), shapes, put)
        if not set(group.members) <= set(shared):
            raise CheckpointError(
                f"{self.path(group.key)}: was stored for {', '.join(shared)}, wanted for {', '.join(group.members)}"
            )
        return ActivationGram(gram, n_tokens, 0, list(group.members))

    def read_vector(self, key: str, length: int) -> Tensor:
        """The float64 ``[length]`` that `write_vector` stored; `CheckpointError` as `read`."""
        found: list[Tensor] = []
        self._read(self.path(key), {"vector": (length,)}, lambda _, values: found.append(values))
        return found[0]

    def write(self, gram: ActivationGram) -> None:
        """Store a Gram under the name of its first member, completely or not at all.

        Raises
        ------
        OSError
            The disk refuses.
        """
        panels = _panels(gram.gram.shape[0])
        parts = {name: gram.gram[start:stop, :stop] for name, start, stop in panels}
        self._store(gram.members, parts, gram.n_tokens)

    def write_vector(self, key: str, vector: Tensor, n_tokens: int) -> None:
        """Store a float64 vector under a name of its own; errors as `write`."""
        self._store([key], {"vector": vector}, n_tokens)

    def _read(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        put: Callable[[str, Tensor], object],
    ) -> tuple[int, list[str]]:
        """Hand the float64 tensors of a file out; its tokens and members, after the whole file was checked."""
        header = read_header(path)
        expected = {
            **{name: (torch.float64, shape) for name, shape in shapes.items()},
            "n_tokens": (torch.int64, (1,)),
            "sha256": (torch.uint8, (32,)),
        }
        if sorted(header) != sorted([*expected, "members"]):
            raise CheckpointError(f"{path}: expected the tensors {', '.join(expected)}, members")
        for name, (dtype, shape) in expected.items():
            if (header[name].dtype, header[name].shape) != (dtype, shape):
                raise CheckpointError(f"{path}: {name} must be {dtype} {list(shape)}")
        digest = hashlib.sha256(self._fingerprint.encode())
        for name in shapes:
            put(name, _hashed(header[name], name, digest))
        n_tokens = int(_hashed(header["n_tokens"], "n_tokens", digest))
        members = _hashed(header["members"], "members", digest)
        stored_digest = bytes(read_tensor(header["sha256"], "sha256").tolist())
        if stored_digest != digest.digest():
            raise CheckpointError(f"{path}: the checksum does not fit: damaged, or of another run")
        # after the checksum: these bytes are ours
        return n_tokens, json.loads(bytes(members.tolist()))

    def _store(self, members: Sequence[str], parts: Mapping[str, Tensor], n_tokens: int) -> None:
        path = self.path(members[0])
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                self._write(file.write, members, parts, n_tokens)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _write(
        self,
        write: Callable[[bytes], object],
        members: Sequence[str],
        parts: Mapping[str, Tensor],
        n_tokens: int,
    ) -> None:
        names = json.dumps(list(members)).encode()
        sizes: list[tuple[str, str, list[int], int]] = [
            (name, "F64", list(part.shape), 8 * part.numel()) for name, part in parts.items()
        ]
        sizes.append(("n_tokens", "I64", [1], 8))
        sizes.append(("members", "U8", [len(names)], len(names)))
        sizes.append(("sha256", "U8", [32], 32))
        header: dict[str, object] = {}
        offset = 0
        for name, dtype, shape, n_bytes in sizes:
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [offset, offset + n_bytes],
            }
            offset += n_bytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
        write(struct.pack("<Q", len(text)) + text)
        digest = hashlib.sha256(self._fingerprint.encode())

        def put(content: bytes) -> None:
            digest.update(content)
            write(content)

        for part in parts.values():
            put(_bytes(part))
        put(struct.pack("<q", n_tokens))
        put(names)
        write(digest.digest())


def _panels(d_in: int) -> Iterator[tuple[str, int, int]]:
    """Yield name, first and last row (exclusive) of each stored panel."""
    for start in range(0, d_in, _PANEL_ROWS):
        yield f"rows_{start:06d}", start, min(start + _PANEL_ROWS, d_in)


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().numpy().tobytes()


def _hashed(info: TensorInfo, name: str, digest: hashlib._Hash) -> Tensor:
    tensor = read_tensor(info, name)
    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return tensor
