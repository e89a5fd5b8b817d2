"""Feed damaged files to every loader for a while: no crash, no hang, no memory without measure.

    python bench/soak/fuzz.py COMPRESSED DENSE --minutes 60 --out report.json [--library libcospadi.so]

COMPRESSED is a folder that `cospadi compress` wrote, DENSE a folder of safetensors; small ones, so that many inputs
pass. Damaged in turn: configurations, safetensors headers and values, shard indexes, recipes, manifests. A reader may
take four times the size of its files and 96 MiB beside what it took for the sound ones. Read by the
Python reader, the C++ reader (with ``--library``), what opens dense models and streams them, and the recipe reader. A
process of its own reads, and says after every input that it lives; it may end each input with an error of ours of one
line, or without one. Anything else is written down with the input's number, from which it is made again
(``--first N --inputs 1``).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HANG_S = 30.0
"""Processor seconds, or ten times as many of the clock, without an end of one input."""
ROOM_BYTES = 96 << 20
"""What a reader may take beyond four times its files and a warmed up process."""
TOKENS = (
    b"0", b"-1", b"1e9", b"2147483648", b"9223372036854775807", b"18446744073709551616", b"1e400", b"NaN", b"null",
    b"true", b'""', b"[]", b"{}", b"[[[[[[", b'{"a":', b'"', b"\\ud800", b"\x00", b"\xff", b"../", b",", b":", b"}",
    b"]", b"F64", b"BF16", b"I32", b"int4", b"&a ", b"*a ", b"!!python/name:os.system ",
)  # fmt: skip


def damaged(draw: random.Random, data: bytes, limit: int) -> bytes:
    """A copy with one to four places changed among the first `limit` bytes."""
    text = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(max(1, min(limit, len(text))))
        action = draw.randrange(8)
        if action == 0 and text:
            text[at] ^= 1 << draw.randrange(8)
        elif action == 1:
            text[at : at + 1] = bytes([draw.randrange(256)])
        elif action == 2:
            del text[at : at + draw.randint(1, 16)]
        elif action == 3:
            text[at:at] = text[: draw.randint(1, 64)]
        elif action == 4:
            text[at:at] = draw.choice(TOKENS)
        elif action == 5:
            end = at
            while end < len(text) and text[end : end + 1].isdigit():
                end += 1
            text[at:end] = draw.choice(TOKENS[:7])
        elif action == 6 and not draw.randrange(8):
            del text[at:]
        else:
            text[at : at + 1] = draw.choice(TOKENS)
    return bytes(text)


class Native:
    """The C++ reader through its C interface."""

    def __init__(self, library: str) -> None:
        self._lib = ctypes.CDLL(library)
        self._lib.cospadi_last_error.restype = ctypes.c_char_p
        for name in ("cospadi_checkpoint_close", "cospadi_layer_close"):
            getattr(self._lib, name).argtypes = [ctypes.c_void_p]
            getattr(self._lib, name).restype = None

    def read(self, folder: Path) -> bool:
        """Open a folder and load all of its layers; tell whether that went well."""
        lib, handle, count = self._lib, ctypes.c_void_p(), ctypes.c_int64()
        if lib.cospadi_checkpoint_open(str(folder).encode(), ctypes.byref(handle)):
            assert lib.cospadi_last_error() and b"\n" not in lib.cospadi_last_error()
            return False
        is_whole = True
        lib.cospadi_checkpoint_module_count(handle, ctypes.byref(count))
        for index in range(count.value):
            name, layer = ctypes.c_char_p(), ctypes.c_void_p()
            lib.cospadi_checkpoint_module_name(handle, ctypes.c_int64(index), ctypes.byref(name))
            if lib.cospadi_layer_load(handle, name, ctypes.c_int32(1), ctypes.byref(layer)):
                assert lib.cospadi_last_error() and b"\n" not in lib.cospadi_last_error()
                is_whole = False
            else:
                lib.cospadi_layer_close(layer)
        lib.cospadi_checkpoint_close(handle)
        return is_whole


class Inputs:
    """Damaged folders and files by number, and who reads them."""

    def __init__(self, compressed: Path, dense: Path, scratch: Path, library: str | None) -> None:
        self.scratch = scratch
        self.native = None if library is None else Native(library)
        self.recipe = (compressed / "recipe.yaml").read_bytes()
        self.folders = {"compressed": compressed, "dense": dense}
        self.files = [
            ("compressed", "config.json"),
            ("compressed", "model.safetensors"),
            ("compressed", "cospadi_manifest.json"),
            ("compressed", "model.safetensors.index.json"),
            ("dense", "config.json"),
            ("dense", "model.safetensors"),
        ]
        for kind, folder in self.folders.items():
            shutil.copytree(folder, scratch / kind)
        names = json_header(compressed / "model.safetensors")
        self.index = json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}).encode()

    def run(self, number: int) -> str:
        """Read input `number`; return how that ended."""
        from cospadi.errors import CospadiError

        draw = random.Random(number)
        kind, name = draw.choice([*self.files, ("recipe", "recipe.yaml")])
        readers: list[Callable[[], object]]
        if kind == "recipe":
            path = self.scratch / "recipe.yaml"
            path.write_bytes(damaged(draw, self.recipe, len(self.recipe)))
            readers, undo = [lambda: read_recipe(path)], path.unlink
        else:
            folder = self.scratch / kind
            undo = self._damage(draw, folder, kind, name)
            readers = [lambda: read_dense(folder)]
            if kind == "compressed":
                readers = [lambda: read_compressed(folder), lambda: verify(folder)]
                if self.native is not None:
                    readers.append(lambda: self.native.read(folder))  # type: ignore[union-attr]
        n_read = 0
        try:
            for reader in readers:
                try:
                    n_read += reader() is not False
                except CospadiError as error:
                    assert str(error) and "\n" not in str(error), str(error)
        finally:
            undo()
        return f"{kind} {name}, {n_read} of {len(readers)} readers took it"

    def _damage(
        self, draw: random.Random, folder: Path, kind: str, name: str
    ) -> Callable[[], object]:
        target = folder / name
        if name == "model.safetensors.index.json":
            whole = folder / "model.safetensors"
            moved = whole.rename(folder / "a.safetensors")
            target.write_bytes(damaged(draw, self.index, len(self.index)))
            return lambda: (target.unlink(), moved.rename(whole))
        data = (self.folders[kind] / name).read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if name.endswith("tensors") else len(data)
        limit = draw.choice((8, header, header, len(data)))
        target.write_bytes(damaged(draw, data, limit))
        return lambda: target.write_bytes(data)


def json_header(path: Path) -> list[str]:
    """Names of a safetensors file's tensors."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [name for name in header if name != "__metadata__"]


def read_recipe(path: Path) -> None:
    """The recipe reader."""
    from cospadi.pipeline.recipe_file import read_recipe as read

    read(path)


def read_compressed(folder: Path) -> None:
    """The Python reader, and all factors."""
    from cospadi.checkpoint.reader import read_checkpoint

    checkpoint = read_checkpoint(folder)
    for name in checkpoint.data.modules:
        checkpoint.factor(name)


def verify(folder: Path) -> None:
    """Sums of all files, and the sizes of all layers."""
    from cospadi.pipeline.verify import verify_checkpoint

    verify_checkpoint(folder)


def read_dense(folder: Path) -> None:
    """What opens dense models, block by block."""
    from cospadi.model.streamed import open_streamed

    source = open_streamed(folder)
    with source.resident("model.layers.0"):
        pass


def high_water() -> int:
    """Peak resident memory of this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def serve(args: argparse.Namespace) -> None:
    """Read inputs until told to stop, one line of JSON for each."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Inputs(args.compressed, args.dense, Path(scratch), args.library)
        for number in range(args.first, args.first + args.inputs):
            line: dict[str, object] = {"input": number}
            try:
                line["outcome"] = inputs.run(number)
            except Exception as error:
                line["fault"] = f"{type(error).__name__}: {error}"
            line["peak"] = high_water()
            print(json.dumps(line), flush=True)


def processor_seconds(process: int) -> float:
    """What a process has used."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def has_line(process: subprocess.Popen[str]) -> bool:
    """Wait for a reader's next line, or its end; False where an input does not end."""
    began, used = time.monotonic(), processor_seconds(process.pid)
    while not select.select([process.stdout], [], [], 1.0)[0]:
        if processor_seconds(process.pid) - used > HANG_S or time.monotonic() - began > 10 * HANG_S:
            return False
    return True


def main() -> int:
    """Start readers one after another until the time is up; write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--inputs", type=int, default=10**9)
    parser.add_argument("--library", help="libcospadi.so, for the C++ reader")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return 0
    size = sum(f.stat().st_size for d in (args.compressed, args.dense) for f in d.iterdir())
    deadline = time.monotonic() + 60 * args.minutes
    counts: dict[str, int] = {}
    faults: list[dict[str, object]] = []
    number, last, most, warm = args.first, args.first + args.inputs, 0, 0
    while number < last and time.monotonic() < deadline and len(faults) < 20:
        # readers are renewed now and then, so that memory is that of few inputs
        count = min(20_000, last - number)
        command = [sys.executable, __file__, str(args.compressed), str(args.dense), "--serve"]
        command += ["--first", str(number), "--inputs", str(count)]
        command += ["--library", args.library] if args.library else []
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        seen, warm = 0, 0
        while time.monotonic() < deadline:
            if not has_line(process):
                faults.append({"input": number, "fault": "does not end"})
                process.kill()
                number += 1
                break
            text = process.stdout.readline()
            if not text:
                if process.wait() or seen < count:
                    faults.append({"input": number, "fault": f"ended with {process.returncode}"})
                    number += 1
                break
            line = json.loads(text)
            seen, number = seen + 1, line["input"] + 1
            if "fault" in line:
                faults.append(line)
            else:
                counts[line["outcome"]] = counts.get(line["outcome"], 0) + 1
            if seen == 100:  # every library has been loaded
                warm = line["peak"]
            if warm:
                most = max(most, line["peak"] - warm)
        process.kill()
        process.wait()
        report = {
            "inputs": number - args.first,
            "outcomes": dict(sorted(counts.items())),
            "faults": faults,
            "most_above_warm_mb": round(most / 1e6, 1),
            "memory_kept": most <= 4 * size + ROOM_BYTES,
        }
        if args.out is not None:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 1 if faults or not report["memory_kept"] else 0


if __name__ == "__main__":
    sys.exit(main())
