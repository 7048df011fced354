"""What the Triton back-ends launch: Triton's compiler, binder and launcher, and our own way of launching, on a stand-in
for the CUDA driver (support/stand_in). A process of its own runs the checks, because it loads that driver."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.paths import ROOT, SUPPORT

pytest.importorskip("lora_kernels.backends.triton", exc_type=ImportError)
from support.stand_in import checks, many_checks

if shutil.which("cc") is None:
    pytest.skip("there is no C compiler (cc) for the stand-in driver", allow_module_level=True)


@pytest.fixture(scope="module")
def wrong(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in each check that the selected tests ask for."""
    tests = (item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path)
    names = [item.callspec.params["name"] for item in tests]
    path = os.pathsep.join([str(ROOT), str(SUPPORT.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "support.stand_in", *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return {name: found.get(name, f"the process ended:\n{done.stderr}") for name in names}


@pytest.mark.parametrize("name", checks.CHECKS)
def test_a_check_on_the_stand_in_driver_holds(wrong: dict[str, str], name: str) -> None:
    assert not wrong[name], wrong[name]


@pytest.mark.parametrize("name", checks.ARGUMENTS)
def test_every_argument_arrives(wrong: dict[str, str], name: str) -> None:
    assert not wrong[name], wrong[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", checks.MORE_ARGUMENTS)
def test_every_argument_arrives_of_rarer_launches(wrong: dict[str, str], name: str) -> None:
    assert not wrong[name], wrong[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", many_checks.CHECKS)
def test_a_check_of_many_adapters_holds(wrong: dict[str, str], name: str) -> None:
    assert not wrong[name], wrong[name]
