"""Several processes compute what one computes, with DDP, FSDP2 and tensor parallelism over gloo.

The checks are in tests/helpers/support/distributed/. All of them run in one start of the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import HELPERS, ROOT

pytest.importorskip("peft", reason="PEFT is not installed")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

from support.distributed import worker as distributed_worker

NAMES = [(size, name) for size in (2, 4, 1) for name in distributed_worker.checks_of(size)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str | None]]:
    """Return {size of the group: {check: error or None}}, from one run of all checks."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-W", "ignore", "-m", "support.distributed.worker", str(folder)]
    log = folder / "log"
    with log.open("w") as output:
        # The package need not be installed: it may be built in its folder.
        paths = os.pathsep.join(filter(None, [str(HELPERS), str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    print(log.read_text())
    return {size: read(folder / f"{size}.json") for size in (2, 4, 1)}


def read(path: Path) -> dict[str, str | None]:
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.parametrize(("size", "name"), NAMES, ids=[f"{size} processes-{name}" for size, name in NAMES])
def test_several_processes_compute_what_one_computes(
    results: dict[int, dict[str, str | None]], size: int, name: str
) -> None:
    if name in distributed_worker.SKIPPED:
        pytest.skip(distributed_worker.SKIPPED[name])
    assert name in results[size], "was not reached: see the failure before it"
    assert results[size][name] is None, results[size][name]
