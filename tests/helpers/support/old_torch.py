"""A mark for tests that torch 2.6 cannot run, whether or not a model has our layers."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

compiles_whole_models = pytest.mark.skipif(
    TORCH < (2, 7), reason="torch 2.6 can trace neither PeftModel.forward nor the models of transformers 5"
)
