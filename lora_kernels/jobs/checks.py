"""What must hold so that the rows of a batch do not mix: checks of the model, and a trial backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lora_kernels.jobs.runner import Runner
from lora_kernels.models.names import plain_names
from lora_kernels.models.targets import some, told_by_reason
from lora_kernels.nn.adapter import AdapterLayer

_RATES = ("dropout", "dropout_p", "dropout_prob", "drop_prob", "layerdrop", "drop_path")
"""The ends of the names under which modules keep the rate of a dropout of their own."""
_KINDS = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class Mixers:
    """The modules of a model that mix the rows of a batch, or draw random numbers for all of them, while they are in
    training mode."""

    def __init__(self, model: nn.Module) -> None:
        self._candidates = [
            (name or "the model", module)
            for name, _, module in plain_names(model)
            if isinstance(module, _KINDS) or (_rates(module) and not isinstance(module, AdapterLayer))
        ]

    def refuse(self) -> None:
        """Raise ValueError where one of them is in training mode."""
        wrong = {name: reason for name, module in self._candidates if (reason := _reason(module))}
        if wrong:
            raise ValueError(
                f"the results of a job would depend on the other jobs in the batch: {told_by_reason(wrong)}. Put these "
                "modules, or the whole model, in evaluation mode: model.eval(). The adapters' own dropout does not "
                "depend on the mode"
            )


def _reason(module: nn.Module) -> str:
    """Return how a module mixes rows at present, or "" where nothing is known against it."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        uses_batch = module.training or module.running_mean is None
        return "batch norm, whose statistics are those of all rows" if uses_batch else ""
    if not module.training:
        return ""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return f"dropout with p = {module.p:g}, one mask for all rows" if module.p else ""
    return next((f"{key} = {rate:g}, drawn for all rows at once" for key, rate in _rates(module).items() if rate), "")


def _rates(module: nn.Module) -> dict[str, float]:
    """Return the rates of dropout that a module keeps as numbers."""
    return {key: value for key, value in vars(module).items() if key.endswith(_RATES) and isinstance(value, float)}


def refuse_trained(frozen: Sequence[tuple[nn.Parameter, bool]], model: nn.Module) -> None:
    """Raise ValueError where a parameter of the base requires a gradient: it would belong to all jobs at once."""
    if not any(parameter.requires_grad for parameter, _ in frozen):
        return
    base = {id(parameter) for parameter, _ in frozen}
    names = [name for name, p in model.named_parameters() if p.requires_grad and id(p) in base]
    raise ValueError(
        f"these parameters of the base require a gradient: {some(names)}. Jobs share the base, so they train adapters "
        "only: set requires_grad to False. A job that trains more than its adapter needs a model of its own"
    )


def refuse_mixed(losses: Sequence[Tensor], runners: Sequence[Runner]) -> None:
    """Raise ValueError where the loss of the first job has a gradient for the adapter of another one, which it has only
    if the model mixes rows. Gradients that were accumulated are left as they are."""
    first, *others = runners
    kept = [(p, p.grad) for runner in runners for p in runner.parameters.values()]
    for p, _ in kept:
        p.grad = None
    try:
        losses[0].backward(retain_graph=True)  # torch.autograd.grad does not go with reentrant checkpointing
        mixed = [f"{runner.job.name!r} ({name})" for runner in others for name in _with_gradient(runner)]
    finally:
        for p, grad in kept:
            p.grad = grad
    if mixed:
        raise ValueError(
            f"the model mixes rows: the loss of job {first.job.name!r} depends on the adapter of {some(mixed, 2)}. "
            "Batch norm, losses over the whole batch, attention over several samples and a batch that is not the first "
            "dimension do this. Nothing was trained. Train these jobs one by one, or change the model"
        )


def _with_gradient(runner: Runner) -> Iterator[str]:
    """Yield the parameters with a gradient that is not zero. NaN may come from zero times infinity."""
    for name, p in runner.parameters.items():
        if p.grad is not None and bool(((p.grad != 0) & ~torch.isnan(p.grad)).any()):
            yield name
