"""A comparison with the shape of a real one, made up from formulas: 30 layers, seven projections, any methods."""

from __future__ import annotations

import math
import random

PROJECTIONS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (576, 192),
    "self_attn.v_proj": (576, 192),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (576, 1536),
    "mlp.up_proj": (576, 1536),
    "mlp.down_proj": (1536, 576),
}
TEXTS = ("wiki.test.raw", "c4-heldout.txt")
TASKS = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "lambada_openai", "winogrande")
DENSE = {"wiki.test.raw": 24.19, "c4-heldout.txt": 29.84}
ACCURACY = dict(zip(TASKS, (0.674, 0.421, 0.542, 0.279, 0.428, 0.521), strict=True))

# name, quality (growth of the log-perplexity with the ratio), seconds
METHODS = (
    ("cospadi", "cospadi fast", 3.1, 340),
    ("cospadi", "cospadi paper", 3.25, 2900),
    ("cospadi", "cospadi group_size=2", 3.4, 420),
    ("svd-llm", "svd-llm", 6.6, 41),
    ("basis-sharing", "basis-sharing", 6.3, 52),
    ("compot", "compot", 4.3, 160),
    ("rocket", "rocket", 3.9, 95),
    ("svd", "svd", 19.0, 38),
    ("wanda", "wanda", 5.4, 9),
    ("sparsegpt", "sparsegpt", 4.6, 130),
    ("magnitude", "magnitude", 13.0, 4),
)


def run(method, label, ratio, seed, *, quality, seconds, layers=30, texts=TEXTS, tasks=TASKS):
    """One finished run; numbers follow from the arguments alone."""
    rng = random.Random(ascii((label, ratio, seed)))
    share = 0.5 if ratio is None else ratio
    modules, stored = {}, 0
    for layer in range(layers):
        for projection, (d_in, d_out) in PROJECTIONS.items():
            n_atoms = int((1 - share) * d_in * d_out / (d_in + d_out / 2) / 8) * 8
            n_bytes = 2 * d_in * n_atoms + d_out * n_atoms + d_out * n_atoms // 8
            stored += n_bytes
            depth = 0.8 + 0.4 * math.cos(layer / 5)
            error = share * (0.35 + 0.05 * quality) * depth * (0.6 + d_out / 3000)
            modules[f"model.layers.{layer}.{projection}"] = {
                "relative_error": error * rng.uniform(0.95, 1.05),
                "n_atoms": n_atoms,
                "sparsity": n_atoms // 2,
                "stored_bytes": n_bytes,
            }
    dense = linear_bytes(layers)
    stored = round((1 - share - rng.uniform(0, 0.003)) * dense)
    ratios = {
        "values": 1 - stored / dense + 0.055,
        "mask16": 1 - stored / dense,
        "mask14": 1 - stored / dense + 0.041,
        "stored": 1 - stored / dense,
        "file": 1 - stored / dense - 0.001,
    }
    growth = {text: math.exp(quality * share**1.3 * rng.gauss(1, 0.01)) for text in texts}
    return {
        "method": method,
        "label": label,
        "ratio_asked": ratio,
        "seed": seed,
        "status": "done",
        "ratio": ratios,
        "model_ratio": {key: 0.79 * value for key, value in ratios.items()},
        "stored_bytes": stored,
        "file_bytes": stored + 56_000_000,
        "dense_bytes": dense,
        "perplexity": {text: DENSE[text] * growth[text] for text in texts},
        "tasks": {
            task: {
                "value": max(0.2, ACCURACY[task] - 0.03 * quality * share + rng.gauss(0, 0.004)),
                "stderr": 0.011,
            }
            for task in tasks
        },
        "seconds": {"calibration": 318.0, "fit": float(seconds), "total": 334.0 + seconds},
        "peak_memory_bytes": 2_900_000_000 + 1000 * seconds,
        "resumed": False,
        "modules": modules,
    }


def failed(method, label, ratio, seed, reason):
    """A run that ended without numbers."""
    return {
        "method": method,
        "label": label,
        "ratio_asked": ratio,
        "seed": seed,
        "status": f"failed: {reason}",
    }


def linear_bytes(layers=30):
    return layers * sum(2 * d_in * d_out for d_in, d_out in PROJECTIONS.values())


def spectra(layers=1):
    """Falling spectra and level use, the last atoms unused."""
    found = []
    for layer in range(layers):
        for i, (projection, (d_in, d_out)) in enumerate(PROJECTIONS.items()):
            d = min(d_in, d_out)
            found.append(
                {
                    "module": f"model.layers.{15 + layer}.{projection}",
                    "singular_values": [90 / (1 + r) ** (0.5 + 0.1 * i) for r in range(d)],
                    "support_use": [max(0.0, 300 - 0.4 * r - 60 * (r > 470)) for r in range(d)],
                }
            )
    return found


def comparison(runs, *, texts=TEXTS, tasks=TASKS, layers=30, with_spectra=True):
    """The whole of a result around some runs."""
    done = any("ratio" in item for item in runs)
    return {
        "title": "SmolLM2-135M-Instruct: dictionaries against factorisation and pruning",
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "fingerprint": "c0ffee" * 10 + "0123",
            "linear_bytes": linear_bytes(layers) if done else None,
            "model_bytes": 269_030_000,
            "n_parameters": 134_515_008,
        },
        "calibration": {
            "description": "c4-train.jsonl, 64 windows of 1024 tokens",
            "ids_sha256": "5ca1ab1e" * 8,
        },
        "evaluation": {"context": 1024, "windows": 32, "task_limit": None},
        "versions": {"cospadi": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "machine": "2 cores, x86_64, Linux",
        "command": "cospadi compare MODEL --methods 'cospadi,svd-llm' --ratios 0.2,0.3 --out DIR",
        "dense": {
            "perplexity": {text: DENSE[text] for text in texts},
            "tasks": {task: {"value": ACCURACY[task], "stderr": 0.01} for task in tasks},
        },
        "texts": list(texts),
        "tasks": list(tasks),
        "runs": runs,
        "spectra": spectra() if with_spectra and done else [],
    }


def large(seeds=(1, 2, 3), ratios=(0.2, 0.3, 0.4)):
    """All methods at all ratios and seeds, fixed-size ones too, with failures, a partial run and a run too large."""
    runs = []
    for seed in seeds:
        for ratio in ratios:
            for method, label, quality, seconds in METHODS:
                runs.append(run(method, label, ratio, seed, quality=quality, seconds=seconds))
        runs.append(run("rtn", "rtn bits=8", None, seed, quality=0.01, seconds=2))
    runs[3] = failed("svd-llm", "svd-llm", 0.2, seeds[0], "cospadi compress ended with code 137")
    for i, item in enumerate(runs):
        if item["label"] == "basis-sharing" and item["ratio_asked"] == ratios[-1]:
            reason = "Gram of model.layers.29.mlp.down_proj is not finite | see log.txt"
            runs[i] = failed("basis-sharing", "basis-sharing", ratios[-1], item["seed"], reason)
        if item["label"] == "magnitude" and item["ratio_asked"] == ratios[0]:
            item["status"] = "partial"
        if item["label"] == "wanda" and "stored_bytes" in item:
            item["stored_bytes"] = round(item["stored_bytes"] * 1.06)
            item["ratio"]["stored"] = 1 - item["stored_bytes"] / item["dense_bytes"]
    return comparison(runs)
