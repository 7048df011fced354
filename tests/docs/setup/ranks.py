"""The names and files that docs/ranks.md takes for granted."""

import copy

from support.adapter_models import adapted, llama
from support.rank_files import saved

from lora_kernels import merge_and_unload

llm, plain = llama(), llama()
for number, name in enumerate(("adapter", "other")):
    saved(name, number, model=plain, target_modules=["q_proj", "v_proj"])
tuned = adapted(copy.deepcopy(plain), r=2, target_modules=["q_proj", "v_proj"])
plain.save_pretrained("base")
merge_and_unload(tuned).save_pretrained("tuned")
