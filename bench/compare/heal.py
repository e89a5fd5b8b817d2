"""Low-rank adapters beside a compressed model, trained for some steps: what they win back of the perplexity.

usage: heal.py MODEL --train TEXT --held-back TEXT [--steps 100] [--length 256] [--rank 16] [--rate 5e-4]
               [--out ADAPTER] [--json FILE]

MODEL is a folder that `cospadi compress` wrote; TEXT is what `--calibration` takes, for example
'c4.jsonl[:800]' and 'c4.jsonl[800:]'. Every step is one window of `--length` tokens, in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import cospadi
from cospadi.calibration.data import load_calibration
from cospadi.evaluation.perplexity import evaluate_perplexity

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Measure, train, measure again."""
    from peft import get_peft_model

    from cospadi.integrations.peft import lora_config, trainable_parameters

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--train", required=True)
    parser.add_argument("--held-back", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    model, tokenizer = cospadi.load(options.model, dtype=torch.float32)
    windows = load_calibration(
        options.train, tokenizer, n_samples=options.steps, sequence_length=options.length
    ).ids
    held_back = load_calibration(
        options.held_back, tokenizer, n_samples=options.windows, sequence_length=options.length
    ).ids

    def perplexity() -> float:
        model.eval()
        return evaluate_perplexity(model, held_back.flatten(), context=options.length).perplexity

    result = {"before": perplexity(), "steps": options.steps, "rank": options.rank}
    print(f"before: {result['before']:.3f}", flush=True)
    config = lora_config(
        r=options.rank, lora_alpha=2 * options.rank, target_modules=PROJECTIONS, lora_dropout=0.0
    )
    model = get_peft_model(model, config)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    started = time.perf_counter()
    model.train()
    for step, window in enumerate(windows[torch.randperm(len(windows))]):
        loss = model(input_ids=window[None], labels=window[None]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step + 1 == options.steps:
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    result["seconds"] = time.perf_counter() - started
    result["after"] = perplexity()
    result["adapter_values"] = sum(parameter.numel() for parameter in parameters)
    print(f"after: {result['after']:.3f}  ({result['adapter_values']} values in the adapter)")
    if options.out is not None:
        model.save_pretrained(options.out)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
