"""A checkpoint of real shapes with random weights through ``plan`` and its first blocks, within the plan's memory.

    python bench/soak/synthetic.py FOLDER --out report.json [--size 7b] [--layers 32] [--blocks 1]

Writes a sharded bfloat16 Llama to FOLDER/model (13.5 GB for 7b with all layers; never more than a block in memory),
asks ``cospadi plan`` what a streamed run takes, gives compress exactly that with ``--max-memory``, and kills it when
the first blocks are finished; a second run must find them. FOLDER is removed in the end unless ``--keep``. The size
toy checks the program alone, since it is never streamed: all of it fits the least bound. The default
method is wanda: calibration, streaming, Grams and writing are those of every method, its fits are the cheapest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
import models

SIZES = {
    "7b": models.Size(4096, 11008, 32, 32, 32, 32000, False),
    "toy": models.Size(64, 160, 3, 4, 2, 384, False),
}
_POOL = 1 << 24


def write_model(size: models.Size, folder: Path, layers: int) -> int:
    """Write shards, index, configuration and tokenizer; return the bytes of all tensors."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, vocab_size=size.vocabulary,
        max_position_embeddings=4096, tie_word_embeddings=size.is_tied, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    models._tokenizer(min(size.vocabulary, 1024)).save_pretrained(folder)
    # drawing billions of numbers takes longer than what is tested: one pool, from another place for every tensor
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(_POOL, generator=generator).to(torch.bfloat16)

    def values(name: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        start = int(torch.randint(_POOL, (), generator=generator))
        count = -(-shape.numel() // _POOL) + 1
        flat = pool.repeat(count)[start : start + shape.numel()]
        return (flat if "embed" in name else flat * shape[1] ** -0.5).view(shape).contiguous()

    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)
    index, total = {}, 0
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: values(name, shapes[name]) for name in names}
        total += sum(t.nbytes for t in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


def peak_of(process: int) -> int:
    """Largest resident memory of a process so far; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM")), 0)


def events(out: Path) -> list[dict[str, object]]:
    """What a run has logged."""
    try:
        lines = out.with_name(out.name + ".log.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def run_until(command: list[str], out: Path, wanted: str, count: int) -> tuple[int, int, float]:
    """Run until so many events of a kind are logged, and kill; peak bytes, code, seconds."""
    start, peak = time.perf_counter(), 0
    before = sum(e["event"] == wanted for e in events(out))
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, peak_of(process.pid))
        if sum(e["event"] == wanted for e in events(out)) - before >= count:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.05)
    return peak, process.returncode, time.perf_counter() - start


def main() -> int:
    """Write, plan, run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer blocks than the original")
    parser.add_argument("--blocks", type=int, default=1, help="that are to be finished")
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--keep", action="store_true")
    args = parser.parse_args()
    size = SIZES[args.size]
    layers = args.layers or size.layers
    model, out = args.folder / "model", args.folder / "out"
    start = time.perf_counter()
    total = write_model(size, model, layers)
    written = time.perf_counter() - start
    given = ["--method", args.method, "--ratio", "0.3", "--samples", str(args.samples)]
    given += ["--sequence-length", str(args.sequence_length)]
    start = time.perf_counter()
    plan_file = args.folder / "plan.json"
    cospadi = [sys.executable, "-m", "cospadi"]
    subprocess.run(
        [*cospadi, "plan", str(model), *given, "--json", str(plan_file)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    planned = time.perf_counter() - start
    ways = json.loads(plan_file.read_text())["resources"]["ways"]
    way = next(w for w in ways if w["how"].startswith("streamed"))
    command = [*cospadi, "compress", str(model), "--out", str(out), "--threads", "1", *given]
    command += ["--max-memory", str(way["peak_bytes"])]
    n_modules = 7 * args.blocks
    peak, code, seconds = run_until(command, out, "module", n_modules)
    found = [e for e in events(out) if e["event"] == "memory"]
    # the next run takes what is finished and goes on
    again_peak, _, again = run_until(command, out, "resume", 1)
    kept = [e["n_finished"] for e in events(out) if e["event"] == "resume"]
    report = {
        "model_bytes": total,
        "layers": layers,
        "seconds_written": round(written, 1),
        "seconds_planned": round(planned, 1),
        "way": way["how"],
        "planned_bytes": way["peak_bytes"],
        "stages": way["stages"],
        "measured_bytes": peak,
        "resumed_measured_bytes": again_peak,
        "was_streamed": bool(found and found[0]["is_streamed"]),
        "killed": code == -signal.SIGKILL,
        "modules_wanted": n_modules,
        "modules_kept": kept[-1] if kept else 0,
        "seconds_until_killed": round(seconds, 1),
        "seconds_until_resumed": round(again, 1),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    if not args.keep:
        shutil.rmtree(args.folder)
    within = max(peak, again_peak) <= way["peak_bytes"]
    return 0 if within and report["modules_kept"] >= n_modules and report["killed"] else 1


if __name__ == "__main__":
    sys.exit(main())
