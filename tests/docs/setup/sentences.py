"""The names that docs/recipes/sentences.md takes for granted."""

import peft
import pytest

sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
from datasets import Dataset  # noqa: E402
from support import page_models  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

page_models.tokenizer().save_pretrained("bert")
sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BertModel(BertConfig(vocab_size=16, max_position_embeddings=64, **sizes)).save_pretrained("bert")
model = sentence_transformers.SentenceTransformer("bert", device="cpu")
pairs = Dataset.from_list([{"anchor": "one two", "positive": "three four"}, {"anchor": "five", "positive": "six"}] * 2)
