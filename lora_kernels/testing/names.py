"""Short names of dtypes, for tables, options and documents."""

from __future__ import annotations

import torch

SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
