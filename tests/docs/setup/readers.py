"""The names that docs/readers.md takes for granted."""

from support.page_names import Attention, x

model, batch = Attention(), x
