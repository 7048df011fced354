"""The names that docs/entries.md takes for granted."""

from support.page_names import Attention

base = Attention()
