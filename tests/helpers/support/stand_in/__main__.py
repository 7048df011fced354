"""Run checks of the launches, in a process that has no other driver: ``python -m support.stand_in NAME...`` prints one
line of JSON for each, with its name and what went wrong."""

from __future__ import annotations

import json
import sys
import traceback

import pytest
import torch
from support.stand_in import checks, many_checks

torch.set_num_threads(1)
for name in sys.argv[1:]:
    wrong = ""
    try:
        (many_checks if name in many_checks.CHECKS else checks).run(name)
    except (Exception, pytest.fail.Exception):
        wrong = traceback.format_exc()
    print(json.dumps([name, wrong]), flush=True)
