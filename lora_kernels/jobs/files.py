"""A job on disk: its adapter in PEFT's format, and what it needs to go on. Nothing is pickled.

adapter_model.safetensors, adapter_config.json    the adapter, which PEFT and `lora_kernels.load_adapter` read
job.safetensors, job.json                         optimiser, schedule, place in the data, random numbers, gradients
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_kernels.core import atomic, locks
from lora_kernels.jobs.layers import Entry
from lora_kernels.jobs.runner import Progress, Runner
from lora_kernels.models.adapter_config import CONFIG, config_of
from lora_kernels.models.adapter_files import PEFT_KEY, WEIGHTS, adapters_of, read_weights, safetensors_torch
from lora_kernels.models.targets import some

STATE, TENSORS = "job.json", "job.safetensors"
_VERSION = 1
"""The version of the format."""
_TAGS = ("$tensor", "$tuple", "$pairs", "$counter")
"""The keys of JSON objects that stand for what JSON has not."""


def save(runner: Runner, model: nn.Module, entries: Mapping[str, Entry], directory: str | os.PathLike[str]) -> None:
    """Write a job. `Jobs.save` documents it."""
    name, directory = runner.job.name, Path(directory)
    if runner.drawn is not None:
        raise ValueError(
            f"the last step raised, and job {name!r} has a batch that it has not learnt from: step() first"
        )
    st = safetensors_torch()
    tensors: dict[str, Tensor] = {}
    state = {
        "version": _VERSION,
        "progress": runner.progress._asdict(),
        "micro": runner.micro,
        "optimizer": runner.optimizer.state_dict(),
        "schedule": None if runner.schedule is None else runner.schedule.state_dict(),
        "data": runner.source.state(),
        "dropout": runner.dropout.get_state(),
        "gradients": {name: p.grad for name, p in runner.parameters.items() if p.grad is not None},
    }
    plain = _plain(state, "", tensors, name)
    weights = {
        f"base_model.model.{key.removesuffix(part)}{part}.weight": p.detach()
        for key, p in runner.parameters.items()
        for part in ("lora_A", "lora_B")
        if key.endswith(part)
    }
    # `config_of` reads the settings of layers, which are here those of the entries.
    layers = {name: entry.settings for name, entry in entries.items()}
    config = config_of(model, cast(Any, layers))
    written = {WEIGHTS: st.save(_copies(weights), metadata={"format": "pt"}), TENSORS: st.save(_copies(tensors))}
    plain["digests"] = {file: _digest(content) for file, content in written.items()}
    written[STATE] = json.dumps(plain, indent=1).encode()
    written[CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    directory.mkdir(parents=True, exist_ok=True)
    atomic.replace({directory / file: content for file, content in written.items()})


def load(runner: Runner, directory: str | os.PathLike[str]) -> None:
    """Give a new runner the state of a saved job. Raises what `Jobs.add` documents. The runner is of no use then."""
    directory, name = Path(directory), runner.job.name
    if directory.is_dir():
        atomic.finish(directory)
    if not (directory / STATE).is_file():
        raise FileNotFoundError(f"there is no {directory / STATE}: no job was saved there")
    with locks.locked(directory, shared=True):
        text, tensors = atomic.contents(directory / STATE), read_weights(directory / TENSORS)
        weights = read_weights(directory / WEIGHTS)
        digests = {file: _digest((directory / file).read_bytes()) for file in (WEIGHTS, TENSORS)}
    try:
        plain = json.loads(text)
        if plain["version"] != _VERSION:
            raise ValueError(f"its format has version {plain['version']}, and {_VERSION} is read")
        if plain["digests"] != digests:
            raise ValueError("its files are not of one save")
        state = _whole(plain, tensors)
        _fill(runner, weights, directory)
        gradients = state["gradients"]
        if set(gradients) - set(runner.parameters):
            raise ValueError(f"it has gradients of {some(sorted(set(gradients) - set(runner.parameters)))}")
        if (state["schedule"] is None) != (runner.schedule is None):
            raise ValueError("only one of the saved job and this one has a schedule")
        runner.optimizer.load_state_dict(state["optimizer"])
        if runner.schedule is not None:
            runner.schedule.load_state_dict(state["schedule"])
        runner.source.load(state["data"])
        runner.dropout.set_state(state["dropout"])
        for key, grad in gradients.items():
            p = runner.parameters[key]
            p.grad = grad.to(p.device, p.dtype).view(p.shape)
        runner.micro, runner.progress = state["micro"], Progress(**state["progress"])
        if runner.progress.phase == "finished" and runner.progress.step < (runner.job.steps or 0):
            runner.progress = runner.progress._replace(phase="training")  # it was saved with fewer steps to make
    except (KeyError, TypeError, AttributeError, RecursionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{directory} cannot be the state of job {name!r} as it is set up here ({error}). Nothing was changed"
        ) from error


@torch.no_grad()
def _fill(runner: Runner, weights: dict[str, Tensor], directory: Path) -> None:
    """Write A and B of a file into the parameters of a runner."""
    names = {key.removesuffix(".lora_A") for key in runner.parameters if key.endswith(".lora_A")}
    stored = adapters_of(weights, PEFT_KEY, False, str(directory / WEIGHTS), names).linear()
    if stored.keys() != names:
        differ = sorted(stored.keys() ^ names)
        raise ValueError(f"its adapter is in other layers than those that config chooses: {some(differ)}")
    for name in names:
        for part, value in (("lora_A", stored[name].a), ("lora_B", stored[name].b)):
            p = runner.parameters[f"{name}.{part}"]
            if p.shape != value.shape:
                raise ValueError(f"{name}.{part} is {tuple(value.shape)} there and {tuple(p.shape)} here: another rank")
            p.copy_(value)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors takes them: on the CPU, contiguous, none of them sharing memory."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _plain(value: Any, path: str, tensors: dict[str, Tensor], job: str) -> Any:
    """Return a value as JSON holds it, and put its tensors into `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain(each, f"{path}.{i}", tensors, job) for i, each in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        inside = [(key, _plain(each, f"{path}.{key}", tensors, job)) for key, each in value.items()]
        if isinstance(value, Counter):
            return {"$counter": [list(pair) for pair in inside]}
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in inside):
            return dict(inside)
        return {"$pairs": [[_plain(key, path, tensors, job), each] for key, each in inside]}
    raise ValueError(
        f"job {job!r} cannot be saved: {path.lstrip('.')} of its state is a {type(value).__name__}, and only tensors, "
        "numbers, texts, lists and dictionaries of them are written, because nothing is pickled"
    )


def _whole(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `_plain` has written."""
    if isinstance(value, list):
        return [_whole(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    tag = next((tag for tag in _TAGS if tag in value), None)
    if tag is None:
        return {key: _whole(each, tensors) for key, each in value.items()}
    inside = value[tag]
    if tag == "$tensor":
        return tensors[inside]
    if tag == "$tuple":
        return tuple(_whole(each, tensors) for each in inside)
    pairs = {_whole(key, tensors): _whole(each, tensors) for key, each in inside}
    return Counter(pairs) if tag == "$counter" else pairs
