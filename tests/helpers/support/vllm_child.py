"""Serve prompts with vLLM's engine on a CPU, in a process of its own, and print the tokens as JSON.

The argument is a JSON object: "model", a folder; "slots"; "prompts", lists of tokens; "adapters", a folder or null for
each prompt; "rounds", how often all prompts are served.
"""

from __future__ import annotations

import json
import os
import sys

TOKENS = 8


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    told = json.loads(sys.argv[1])
    engine = LLM(
        told["model"], skip_tokenizer_init=True, dtype="float32", max_model_len=128, enforce_eager=True,
        enable_prefix_caching=False, enable_lora=True, max_loras=told["slots"], max_cpu_loras=8, max_lora_rank=16,
    )  # fmt: skip
    folders = sorted({folder for folder in told["adapters"] if folder})
    requests = [LoRARequest(each, folders.index(each) + 1, each) if each else None for each in told["adapters"]]
    how = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    served = []
    for _ in range(told["rounds"]):
        prompts = [{"prompt_token_ids": tokens} for tokens in told["prompts"]]
        outputs = engine.generate(prompts, how, lora_request=requests, use_tqdm=False)
        served.append([list(each.outputs[0].token_ids) for each in outputs])
    print("SERVED" + json.dumps(served), flush=True)


if __name__ == "__main__":  # vLLM's own processes import this file too
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main()
