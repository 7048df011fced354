"""`run` runs a program as Python itself does, with LORA_KERNELS=1 in its environment, and tells what was fused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import entry_world
from support.paths import ROOT

from lora_kernels.__main__ import main
from lora_kernels.tools import run, told

PROBE = """
import json, os, sys
import __main__
ours = "LORA_KERNELS", "LORA_KERNELS_RUN"
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "name": __name__, "main": sorted(vars(__main__)), "file": __main__.__file__,
    "spec": getattr(__main__.__spec__, "name", None), "package": __package__, "optimize": sys.flags.optimize,
    "warnings": sys.warnoptions, "environment": {k: v for k, v in os.environ.items() if k not in ours},
    "modules": sorted(sys.modules), "stdin": sys.stdin.read(),
}))
"""
NOTHING = "lora_kernels: PEFT made no LoRA layer, so that nothing was fused\n"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the working directory and on PYTHONPATH, for this process's children only."""
    world = entry_world.make(tmp_path / "world")
    monkeypatch.chdir(world)
    monkeypatch.setattr(os, "environ", os.environ.copy() | entry_world.environment(world, None))
    monkeypatch.setattr(run, "entry_points", lambda group: [SimpleNamespace(value=run._ENTRY)])
    return world


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize("of", ["script", "module", "package", "folder"])
def test_a_program_sees_what_it_sees_under_python_itself(world, of, capfd):
    write(world / "inner/probe.py", PROBE)
    write(world / "inner/__init__.py", "")
    write(world / "inner/__main__.py", PROBE)
    what = {
        "script": ["inner/probe.py"],
        "module": ["-m", "inner.probe"],
        "package": ["-m", "inner"],
        "folder": ["inner"],
    }
    args = [*what[of], "-m", "--help", "a b", "--", "run"]
    alone = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=dict(os.environ), input="")
    assert main(["run", *args]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == json.loads(alone.stdout) and err == NOTHING


def test_the_options_of_python_are_those_that_it_was_started_with(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["error::UserWarning"])
    assert run.command_of([__file__, "a"]) == [sys.executable, "-Werror::UserWarning", __file__, "a"] or (
        "-Werror::UserWarning" in run.command_of([__file__])
    )


def test_peft_in_the_program_and_in_its_children_makes_fused_layers(world, capfd):
    child = write(world / "child.py", entry_world.MAKE)
    script = write(world / "script.py", f"""
        import multiprocessing, subprocess, sys
        def make(_):
            import peft
            return peft.LoraModel._create_new_module(2)
        if __name__ == "__main__":
            subprocess.run([sys.executable, {str(child)!r}])
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(make, [0])[0], flush=True)
    """)  # fmt: skip
    assert main(["run", str(script)]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["['fused', 1]", "['fused', 2]"]
    assert err == "lora_kernels: 2 of 2 LoRA layers fused, 10 fused calls, 0 left to PEFT, in 2 processes\n"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('a reason')", 1, "a reason\n"),
        ("1 / 0", 1, 'Traceback (most recent call last):\n  File "'),
        ("def", 1, "  File"),
    ],
)
def test_the_exit_status_and_the_traceback_are_the_programs(world, code, status, said, capfd):
    script = write(world / "script.py", code)
    assert main(["run", str(script)]) == status
    err = capfd.readouterr().err
    assert err.startswith(said) and err.endswith(NOTHING) and "lora_kernels/" not in err


def test_a_command_is_found_in_this_environment_and_then_on_path(world, capfd, monkeypatch):
    command = write(world / "bin/train-it", f"#!{sys.executable}\n{entry_world.MAKE}\n")
    command.chmod(0o755)
    monkeypatch.setitem(os.environ, "PATH", str(command.parent))
    assert main(["run", "train-it", "--rank", "8"]) == 0
    out, err = capfd.readouterr()
    assert out == "['fused', 1]\n" and "1 of 1 LoRA layers fused" in err
    scripts = write(world / "scripts/train-it", "")
    scripts.chmod(0o755)
    monkeypatch.setattr(run.sysconfig, "get_path", lambda _: str(scripts.parent))
    assert run.command_of(["train-it", "-x"]) == [str(scripts), "-x"]


@pytest.mark.parametrize(
    ("args", "environment", "said"),
    [
        (["none.py"], {}, "there is no file 'none.py', and no command of this name in "),
        (["a/none.py"], {}, "there is no file 'a/none.py'\n"),
        (["-m"], {}, "-m needs the name of a module"),
        (["-u", "script.py"], {}, "-u is no option of run. Options of Python stand before: python -u -m lora_kernels"),
        ([__file__], {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "TORCH_DEVICE_BACKEND_AUTOLOAD keeps torch from calling"),
        ([__file__], {"LORA_KERNELS": "0"}, "LORA_KERNELS is 0, which switches off what run does"),
        ([__file__], {"LORA_KERNELS": "on"}, "LORA_KERNELS is 'on': 1 fuses"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_run(world, args, environment, said, capfd, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    assert main(["run", *args]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("python -m lora_kernels run: ") and said in err and not out


def test_a_package_without_its_entry_point_is_refused_with_the_way_out(world, capfd, monkeypatch):
    monkeypatch.setattr(run, "entry_points", lambda group: [])
    assert main(["run", __file__]) == 2
    assert (
        "does not name its entry point for torch. Install it (in a checkout: pip install -e .)"
        in capfd.readouterr().err
    )


def test_help_names_the_three_forms(capsys):
    assert main(["run", "--help"]) == 0
    assert capsys.readouterr().out == run.USAGE
    assert main(["run"]) == 2
    assert capsys.readouterr().err == run.USAGE
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "run a script, a module or a command" in capsys.readouterr().out


TOLD = {"made": 4, "fused_calls": 12, "not_fused": {}, "passed_over": {}, "ended": True}


@pytest.mark.parametrize(
    ("processes", "said"),
    [
        ([], "PEFT made no LoRA layer, so that nothing was fused"),
        ([TOLD], "4 of 4 LoRA layers fused, 12 fused calls, 0 left to PEFT"),
        (
            [TOLD | {"not_fused": {"it is old": 1}, "passed_over": {"merged": 2, "other": 1}}, TOLD],
            "7 of 8 LoRA layers fused (it is old), 24 fused calls, 3 left to PEFT (merged; 1 more reasons), in 2 "
            "processes",
        ),
        (
            [TOLD | {"fused_calls": 0}],
            "4 of 4 LoRA layers fused, 0 fused calls, 0 left to PEFT (calls within torch.compile are not counted)",
        ),
        (
            [TOLD | {"fused_calls": 0, "passed_over": {"hooks": 2}}],
            "4 of 4 LoRA layers fused, 0 fused calls, 2 left to PEFT (hooks)",
        ),
        ([TOLD | {"ended": False}], "4 of 4 LoRA layers fused, 12 fused calls, 0 left to PEFT; it was killed"),
        (
            [TOLD, TOLD | {"ended": False}],
            "8 of 8 LoRA layers fused, 24 fused calls, 0 left to PEFT, in 2 processes; 1 of them ended without telling "
            "their calls",
        ),
    ],
)
def test_the_line_of_a_run(processes, said):
    assert told.line(processes) == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_is_passed_on_and_its_status_is_returned(world, number, capfd, monkeypatch):
    """SIGKILL cannot be passed on: the program sends it to itself."""
    to = "os.getpid()" if number == signal.SIGKILL else "os.getppid()"
    script = write(world / "script.py", f"""
        import os, signal, time
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill({to}, {int(number)})
        time.sleep(30)
    """)  # fmt: skip
    sent, handlers = [], {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    kill = os.kill
    monkeypatch.setattr(
        os, "kill", lambda pid, each: sent.append((pid, each)) if pid == os.getpid() else kill(pid, each)
    )
    start = time.monotonic()
    try:
        assert main(["run", str(script)]) == -number
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert sent == [(os.getpid(), number)] and time.monotonic() - start < 20
    assert capfd.readouterr().err == NOTHING


WORKER = """
import os, sys
import torch
import torch.distributed as dist

def train():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    model(torch.ones(2, 8)).sum().backward()

dist.init_process_group("gloo")
train()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_torchruns_workers_are_reached_with_torch_and_peft_themselves(tmp_path, capfd, monkeypatch):
    pytest.importorskip("peft", reason="PEFT is not installed")
    script = write(tmp_path / "worker.py", WORKER)
    here = entry_world.install_metadata(tmp_path / "metadata")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(run, "entry_points", lambda group: [SimpleNamespace(value=run._ENTRY)])
    status = main(["run", "-m", "torch.distributed.run", "--nproc-per-node", "1", str(script)])
    err = capfd.readouterr().err
    assert status == 0, err
    assert err.splitlines()[-1] == "lora_kernels: 1 of 1 LoRA layers fused, 1 fused calls, 0 left to PEFT"
