"""A compression with the shape of a real one, made up from formulas: 30 layers, seven projections."""

from __future__ import annotations

import math
import random

from made_up import PROJECTIONS

SHIFTED = ("3 of 1536 input channels are always zero", "cholesky with relative shift 1e-10")


def module(layer, projection, d_in, d_out, rng):
    """What one linear got; all of it follows from the arguments."""
    kept = 0.6 + 0.25 * math.cos(layer / 4) * rng.random()
    n_atoms = int(kept * d_out / 40) * 8
    sparsity = int(kept * d_in * 0.6)
    return {
        "d_in": d_in,
        "d_out": d_out,
        "n_identity": d_in,
        "n_atoms": n_atoms,
        "sparsity": sparsity,
        "coeffs_dtype": "bfloat16",
        "dictionary_dtype": "bfloat16",
        "leader": None,
        "dense_bytes": 2 * d_in * d_out,
        "stored_bytes": round(2 * kept * d_in * d_out),
        "relative_error": (1 - kept) * rng.uniform(0.2, 0.4),
        "weight_error": (1 - kept) * rng.uniform(0.5, 0.7),
        "seconds": d_in * d_out / 3e5 * rng.uniform(0.8, 1.2),
        "whitening": list(SHIFTED) if projection == "mlp.down_proj" and layer < 2 else ["cholesky"],
        "n_tokens": 65_536,
        "n_dead_inputs": 3 if projection == "mlp.down_proj" and layer < 2 else 0,
        "history": [
            {"iteration": i, "n_unused": 2 if layer == 5 and i == 3 else 0} for i in (1, 2, 3)
        ],
    }


def compression(layers=30, **changes):
    """The data of ``cospadi_report.json``."""
    rng = random.Random(7)
    modules = {
        f"model.layers.{layer}.{projection}": module(layer, projection, *shape, rng)
        for layer in range(layers)
        for projection, shape in PROJECTIONS.items()
    }
    dense = sum(item["dense_bytes"] for item in modules.values())
    stored = sum(item["stored_bytes"] for item in modules.values())
    share = 1 - stored / dense
    data = {
        "report_version": 1,
        "source": {
            "name": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "kind": "gguf",
            "fingerprint": "sha256:" + "5eed" * 16,
        },
        "recipe": {"recipe_version": 1, "method": "cospadi", "ratio": 0.3, "targets": []},
        "calibration": {
            "ids_sha256": "5ca1ab1e" * 8,
            "shape": [64, 1024],
            "description": "c4-train.jsonl: 800 documents; 64 windows of 1024 tokens, seed 42",
        },
        "versions": {"cospadi": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "threads": 2,
        "notes": ["the GGUF file was dequantised from Q4_1"],
        "seconds": 2400.0,
        "stages": {
            "opening the model and the text": 9.0,
            "gradients of the outputs": 320.5,
            "division of the budget": 1100.0,
            "calibration": 318.0,
            "fits": 640.0,
        },
        "resumed": 3,
        "bytes": {
            "linears": {"dense": dense, "stored": stored},
            "model": {"dense": dense + 56_000_000, "stored": stored + 56_000_000},
        },
        "ratio": {"stored": share, "values": share + 0.05, "mask16": share, "mask14": share + 0.04},
        "model_ratio": {"stored": 0.8 * share, "values": 0.8 * share + 0.04},
        "modules": modules,
        "dense": [{"module": "lm_head", "shape": [49152, 576], "reason": "not in a block"}],
        "failed": [],
        "allocation": {
            "losses": {name: 1e-4 * (i % 7 + 1) for i, name in enumerate(modules)},
            "even_losses": {name: 2e-4 * (i % 7 + 1) for i, name in enumerate(modules)},
            "predicted_loss": 0.0695,
            "predicted_uniform": 0.1602,
        },
        "reconstruction": [
            {
                "block": b,
                "before": 0.0164 + b / 900,
                "after": 0.015,
                "is_kept": b > 0,
                "seconds": 9.5,
            }
            for b in range(3)
        ],
    }
    return {**data, **changes}
