"""The names that docs/recipes/trainers.md takes for granted."""

import peft
import pytest

pytest.importorskip("trl", reason="TRL is not installed")
from datasets import Dataset
from support import page_models

tokenizer = page_models.tokenizer()
model, other_model, dpo_model, grpo_model = (page_models.llama() for _ in range(4))
tokenised = page_models.tokenised()
texts = Dataset.from_list([{"text": "one two three four"}] * 4)
preferences = Dataset.from_list([{"prompt": "one two", "chosen": " three", "rejected": " nine"}] * 4)
questions = Dataset.from_list([{"prompt": "one two"}] * 4)
