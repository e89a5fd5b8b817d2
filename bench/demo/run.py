"""The demonstration behind ``make demo``: one real model, compressed to 0.7 of its linears' bytes in two ways.

usage: run.py WORK_DIR [MODEL]

MODEL is compressed in place of the demonstration's own. Runs the installed ``cospadi`` command as a user would and
prints one table. Calibration and evaluation texts are the two halves of the language reference inside CPython
(``builtin``), so that no data set is needed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from model import fetch_smollm2

RATIO = "0.3"
PROMPT = "The most important thing to know about the ocean is"
CALIBRATION = ["--calibration", "builtin", "--samples", "24", "--sequence-length", "1024"]
EVALUATION = ["--text", "builtin", "--context", "1024", "--windows", "12"]


@dataclass
class Row:
    """One line of the table."""

    name: str
    file_bytes: int
    linear_bytes: int
    perplexity: float
    tokens_per_second: float
    text: str


def cospadi(*arguments: str | Path) -> None:
    """Run the installed command; its output goes to the terminal."""
    command = [str(Path(sys.executable).parent / "cospadi"), *map(str, arguments)]
    print(
        "$ cospadi " + " ".join(f'"{a}"' if " " in str(a) else str(a) for a in arguments),
        flush=True,
    )
    subprocess.run(command, check=True)


def measure(name: str, directory: Path, model: Path, linear_bytes: int) -> Row:
    """Perplexity (fp32 arithmetic) and greedy decode speed (as stored, bf16)."""
    evaluation, generation = directory / f"{name}.eval.json", directory / f"{name}.gen.json"
    cospadi("eval", model, *EVALUATION, "--json", evaluation)
    cospadi(
        "generate",
        model,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "48",
        "--dtype",
        "bfloat16",
        "--json",
        generation,
    )
    generated = json.loads(generation.read_text())
    return Row(
        name=name,
        file_bytes=sum(f.stat().st_size for f in model.glob("*.safetensors")),
        linear_bytes=linear_bytes,
        perplexity=json.loads(evaluation.read_text())["perplexity"],
        tokens_per_second=generated["tokens_per_second"],
        text=" ".join(generated["text"].split()),
    )


def compress(
    directory: Path, source: str | Path, name: str, *options: str
) -> tuple[Path, dict[str, object]]:
    """Compress unless a finished result is there, and inspect it."""
    out = directory / name
    if not (out / "config.json").exists():
        cospadi("compress", source, "--out", out, "--ratio", RATIO, *CALIBRATION, *options)
    inspected = directory / f"{name}.inspect.json"
    cospadi("inspect", out, "--json", inspected)
    return out, json.loads(inspected.read_text())


def print_table(rows: list[Row]) -> None:
    """The result, and the sentences."""
    print()
    print(f"{'':<10} {'files':>10} {'linears':>10} {'perplexity':>11} {'tokens/s':>9}")
    for row in rows:
        print(
            f"{row.name:<10} {row.file_bytes / 1e6:>7.1f} MB {row.linear_bytes / 1e6:>7.1f} MB "
            f"{row.perplexity:>11.2f} {row.tokens_per_second:>9.1f}"
        )
    print()
    for row in rows:
        print(f"{row.name}: {row.text}\n")


def report(directory: Path, out: Path) -> Path:
    """Write the measurements of a compressed model and of the dense one into its page and its card."""
    original, compressed = directory / "dense.eval.json", directory / f"{out.name}.eval.json"
    cospadi("report", out, "--original", original, "--eval", compressed)
    return out / "report.html"


def main(directory: Path, model: str | Path | None = None) -> None:
    """Run everything; finished parts are kept and not run again."""
    start = time.perf_counter()
    source = model or fetch_smollm2(directory / "source")
    # a faster rise than the default: a few per cent more error, a minute and a half less
    sparse, inspected = compress(directory, source, "cospadi", "--set", "penalty_growth=1.3")
    low_rank, _ = compress(directory, source, "svd-llm", "--method", "svd-llm")
    dense = directory / "dense"
    if not (dense / "config.json").exists():
        shutil.rmtree(dense, ignore_errors=True)
        cospadi("export", source, "--dense", "--out", dense)
    sizes = inspected["bytes"]["linears"]
    rows = [
        measure("dense", directory, dense, sizes["dense"]),
        measure("svd-llm", directory, low_rank, sizes["stored"]),
        measure("cospadi", directory, sparse, sizes["stored"]),
    ]
    pages = [report(directory, out) for out in (sparse, low_rank)]
    print_table(rows)
    for page in pages:
        print(f"report: {page}\nmodel card: {page.with_name('README.md')}")
    print(
        f"finished in {(time.perf_counter() - start) / 60:.1f} minutes; models and logs are in {directory}/"
    )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])
