"""Run by the environment with vLLM: greedy tokens of one folder by vLLM's engine, printed as JSON.

usage: run_engine.py FOLDER OPTIONS PROMPTS    (options of ``vllm.LLM`` and token ids as JSON)
"""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":  # the engine's processes import this file again
    from vllm import LLM, SamplingParams

    folder, options, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype="float32",
        block_size=128,
        max_model_len=48,
        **options,
    )
    sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    print("TOKENS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
