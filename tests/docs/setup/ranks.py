"""The names and files that docs/ranks.md takes for granted."""

import copy

from support.adapter_models import adapted, llama

from lora_kernels import merge_and_unload, save_adapter

llm = llama()
for name in ("adapter", "other"):
    save_adapter(adapted(copy.deepcopy(llm), r=6, target_modules=["q_proj", "v_proj"]), name)
llm.save_pretrained("base")
merge_and_unload(adapted(copy.deepcopy(llm), r=2, target_modules=["q_proj", "v_proj"])).save_pretrained("tuned")
