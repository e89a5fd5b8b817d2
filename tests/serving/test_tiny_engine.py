"""Tiny models with factors of every kind in vLLM's engine: fused layers, biases, ranks, stages, compilation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cospadi

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))

from compressed_models import VOCABULARY, compress_variously
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cospadi.checkpoint.writer import write_checkpoint
from cospadi.model.layers import describe_modules

pytestmark = pytest.mark.slow

PROMPTS = [[2 + (7 * i + 3 * j) % 57 for j in range(5 + i)] for i in range(4)]


def write_model(family: str, folder: Path) -> Path:
    """Write a random model of three blocks whose heads have the 32 features that vLLM's kernels take."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    decoder = {
        **sizes,
        "hidden_size": 128,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**decoder))
    elif family == "qwen2":  # biases, tied head
        model = Qwen2ForCausalLM(Qwen2Config(**decoder, tie_word_embeddings=True))
    else:  # q, k and v are one projection in the checkpoint, too
        model = GPT2LMHeadModel(
            GPT2Config(
                **sizes, n_embd=128, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2
            )
        )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model = compress_variously(model.eval())
    data = describe_modules(model, dtype=torch.bfloat16)
    return write_checkpoint(model, config_data=data, out_dir=folder, tokenizer=None)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"enforce_eager": True}),
        ("gpt2", {"enforce_eager": True}),
        ("qwen2", {"enforce_eager": True, "tensor_parallel_size": 2}),
        # Leaders and members on different stages. vLLM's CPU build needs the compiled path for stages.
        ("llama", {"pipeline_parallel_size": 2}),
    ],
    ids=["llama", "gpt2", "two ranks", "two stages, compiled"],
)
def test_same_greedy_tokens(vllm_venv, tmp_path, family, options):
    folder = write_model(family, tmp_path / "model")
    processes = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    # One processor for each process of the engine, from those that this process may use.
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[i % len(cores)]) for i in range(processes))
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": binding,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{vllm_venv / 'bin'}:{os.environ['PATH']}",
    }
    program = Path(__file__).with_name("run_engine.py")
    done = subprocess.run(
        [vllm_venv / "bin" / "python", program, folder, json.dumps(options), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert answers, done.stderr[-4000:]
    model, _ = cospadi.load(folder, dtype=torch.float32)
    for prompt, found in zip(PROMPTS, json.loads(answers[0][7:]), strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert found == expected[0, len(prompt) :].tolist()
