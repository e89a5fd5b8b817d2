"""CoSpaDi against SVD-LLM at equal stored bytes on SmolLM2-135M, and SVD-LLM against its public code.

usage: smollm2.py MODEL DATA_DIR OUT_DIR [--ratio 0.2] [--windows 32] [--threads N]
                  [-- extra options of cospadi compress]

MODEL     SmolLM2-135M-Instruct.Q4_1.gguf (`make demo` leaves it in _demo/source)
DATA_DIR  holds text/c4_en_train_first1000.jsonl, text/wiki.test.raw and
          peer_reference/smollm2_tokens.safetensors
OUT_DIR   results; finished parts are not run again

Calibration is 64 x 1024 tokens of C4, perplexity is on WikiText-2 raw test (context 1024). Prints
``g = ln(ppl / ppl_dense)`` of both methods and their quotient, seconds, and the SVD-LLM perplexity on the
token ids for which its public code gives 80.59 (nominal ratio 0.2, 32 x 512 calibration tokens, 16 x 512
test tokens).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from cospadi.pipeline.report import read_report

PUBLIC_SVD_LLM = 80.59
PUBLIC_DENSE = 29.60


def cospadi(*arguments: object) -> None:
    """Run the installed command."""
    command = [str(Path(sys.executable).parent / "cospadi"), *map(str, arguments)]
    print("$", " ".join(["cospadi", *command[1:]]), flush=True)
    subprocess.run(command, check=True)


def evaluate(model: Path, text: Path, context: int, windows: int, out: Path) -> dict[str, Any]:
    """Perplexity of one model, kept in ``out``."""
    if not out.exists():
        cospadi(
            "eval", model, "--text", text, "--context", context, "--windows", windows, "--json", out
        )
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def compress(model: Path, out: Path, *options: object) -> dict[str, Any]:
    """Compress unless done; the report of the result."""
    if not (out / "config.json").exists():
        cospadi("compress", model, "--out", out, *options)
    return read_report(out)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Both methods at equal stored bytes."""
    text = args.data / "text/wiki.test.raw"
    c4 = args.data / "text/c4_en_train_first1000.jsonl"
    common = [
        "--ratio",
        args.ratio,
        "--calibration",
        c4,
        "--samples",
        64,
        "--sequence-length",
        1024,
    ]
    if args.threads:
        common += ["--threads", args.threads]
    dense = evaluate(args.model, text, 1024, args.windows, args.out / f"dense.{args.windows}.json")
    result: dict[str, Any] = {
        "ratio": args.ratio,
        "windows": args.windows,
        "dense": dense["perplexity"],
    }
    for name, options in (("svd-llm", ["--method", "svd-llm"]), ("cospadi", args.extra)):
        out = args.out / f"{name}-{args.ratio}"
        report = compress(args.model, out, *common, *options)
        perplexity = evaluate(
            out, text, 1024, args.windows, args.out / f"{out.name}.{args.windows}.json"
        )["perplexity"]
        result[name] = {
            "perplexity": perplexity,
            "g": math.log(perplexity / dense["perplexity"]),
            "seconds": report["seconds"],
            "ratio": report["ratio"],
        }
    result["g_quotient"] = result["cospadi"]["g"] / result["svd-llm"]["g"]
    return result


def peer_reference(args: argparse.Namespace) -> dict[str, Any]:
    """SVD-LLM on the ids of the public code's run."""
    ids = args.data / "peer_reference/smollm2_tokens.safetensors"
    dense = evaluate(args.model, ids, 512, 16, args.out / "peer-dense.json")["perplexity"]
    out = args.out / "peer-svd-llm"
    options = [
        "--method",
        "svd-llm",
        "--ratio",
        0.2,
        "--ratio-convention",
        "nominal",
        "--calibration",
        ids,
    ]
    compress(
        args.model,
        out,
        *options,
        "--samples",
        32,
        "--sequence-length",
        512,
        "--set",
        "storage_dtype=float32",
    )
    found = evaluate(out, ids, 512, 16, args.out / "peer-svd-llm.json")["perplexity"]
    return {
        "dense": dense,
        "dense_public": PUBLIC_DENSE,
        "svd_llm": found,
        "svd_llm_public": PUBLIC_SVD_LLM,
        "difference": found / PUBLIC_SVD_LLM - 1.0,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("extra", nargs="*", default=[])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"equal_bytes": compare(args), "peer_reference": peer_reference(args)}
    (args.out / f"result-{args.ratio}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
