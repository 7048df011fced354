"""The names that docs/recipes/qlora_one_gpu.md takes for granted."""

import bitsandbytes
import peft
import torch
from support import page_models

name = page_models.save_llama("model")
tokenised = page_models.tokenised()
batches = [{key: torch.tensor([row[key]]) for key in row} for row in tokenised[:2]]
