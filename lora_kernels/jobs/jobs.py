"""`Jobs`: several jobs in training on one base."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_kernels.backends import dispatch
from lora_kernels.jobs import batches, files
from lora_kernels.jobs.checks import Mixers, refuse_mixed, refuse_trained
from lora_kernels.jobs.data import generator_of
from lora_kernels.jobs.job import Job
from lora_kernels.jobs.runner import VALUES, Drawn, Progress, Runner
from lora_kernels.jobs.sites import Sites

if TYPE_CHECKING:
    from rich.table import Table


def call_model(model: nn.Module, batch: Any) -> Any:
    """Return what the model computes for a batch: ``model(**batch)`` without labels for a mapping, ``model(batch)`` for
    a tensor. In a tuple of two tensors or more, the last one is the target and the others are the arguments."""
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    if isinstance(batch, Tensor):
        return model(batch)
    return model(*(batch[:-1] if len(batch) > 1 else batch))


class Jobs:
    """Several jobs that train adapters of their own on one frozen model, in the same steps.

    A step draws a batch of each job, computes the model once for the rows of all of them, each row with the adapter of
    its job, and makes one backward of the sum of the losses. Then each job clips its gradient and steps its own
    optimiser. Initial values, order of samples and dropout of a job depend on its own seed. So its losses and weights
    are those it would have alone, up to the rounding of the base's products, which may differ between numbers of rows.

    Only adapters are trained. ``nn.Linear`` layers and `QuantizedLoRALinear` layers with a new adapter (as
    ``apply_lora(model, quant="nf4")`` makes them) are adapted. Whether dropout of the adapters is on does not depend on
    the mode of the model: it is on in `step` and off elsewhere. A Jobs serves one thread.

    Args:
        model: any module whose rows do not mix. It is changed in place: its layers become able to hold several
            adapters, and its parameters are frozen. `close` undoes both.
        jobs: the first jobs; `add` adds others.
        call: computes the outputs from (model, batch); `call_model` documents the default.
        padding: the value by which sequences of a field of the batches are filled up, for fields beside the usual ones
            of language models (input_ids, attention_mask, labels, ...).
        adapter_dtype: the dtype of all adapters: None is fp32 beside fp16 and bf16 weights, and else the weight's.
        backend: the name of a back-end, which then serves every call or raises; None for the automatic choice.

    Raises:
        ValueError, TypeError: what `add` raises; a model with adapters already; an unknown backend.
        ImportError: a backend that is not installed.
        After any error the model is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        jobs: Iterable[Job] = (),
        *,
        call: Callable[[nn.Module, Any], Any] = call_model,
        padding: Mapping[Any, float] | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        if backend is not None:
            dispatch.load(backend)
        self.model, self._call = model, call
        self._padding = {**batches.PADDING, **(padding or {})}
        self._sites = Sites(model, adapter_dtype, backend)
        self._mixers = Mixers(model)
        self._runners: dict[str, Runner] = {}
        self._added = 0
        self._checked = False
        try:
            for job in jobs:
                self.add(job)
        except BaseException:
            self.close()
            raise

    def add(self, job: Job, resume: str | os.PathLike[str] | None = None) -> None:
        """Add a job, which takes part from the next step on. With `resume` it goes on where `save` has written it to
        that folder.

        Raises:
            ValueError: a name that is taken; settings or data that no job can have; what `lora_kernels.apply_lora`
                raises for the layers; files that are damaged or of another job.
            FileNotFoundError: there is no saved job in the folder.
            After any error nothing is changed.
        """
        job.check()
        if job.name in self._runners:
            raise ValueError(f"there is a job {job.name!r} already: remove it first, or give this one another name")
        targets = self._sites.choose(job.config)
        values = self._sites.new_values(targets, generator_of(job.seed, VALUES))
        runner = Runner(job, values)
        if resume is not None:
            files.load(runner, resume)
        self._sites.put(job.name, str(self._added), targets, values)
        self._added += 1
        self._checked = False
        self._runners[job.name] = runner

    def remove(self, name: str) -> None:
        """Remove a job and its adapter. Layers that no job adapts any more are plain again. Raises KeyError for a name
        that there is none of."""
        del self._runners[self._runner(name).job.name]
        self._sites.take(name)

    def pause(self, name: str) -> None:
        """Leave a job out of the steps until `resume`. Gradients that it has accumulated stay. Raises ValueError for a
        job that is not in training."""
        runner = self._runner(name)
        if runner.progress.phase != "training":
            raise ValueError(f"job {name!r} is not in training, it is {runner.progress.phase}")
        runner.progress = runner.progress._replace(phase="paused")

    def resume(self, name: str) -> None:
        """Let a paused job go on with its next batch. Raises ValueError for a job that is not paused."""
        runner = self._runner(name)
        if runner.progress.phase != "paused":
            raise ValueError(f"job {name!r} is not paused, it is {runner.progress.phase}")
        runner.progress = runner.progress._replace(phase="training", reason="")

    def save(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Write a job to `directory`, at any step: its adapter in PEFT's format, which `lora_kernels.load_adapter` and
        ``PeftModel.from_pretrained`` read, and what `add` needs to go on (optimiser, schedule, place in the data,
        random numbers, accumulated gradients). All files are replaced together or not at all. Nothing is pickled.

        Raises ValueError for a state that holds something else than tensors, numbers, texts, lists and dictionaries.
        """
        runner = self._runner(name)
        files.save(runner, self.model, self._sites.entries(name), directory)

    def step(self) -> dict[str, Progress]:
        """Train every job that is neither paused nor finished on its next batch, and return where these jobs stand.

        A job whose loss or gradient is not finite is paused or dropped, and its adapter is not changed; the others are
        trained. The first step of two or more jobs, and the first after `add`, also make a trial backward, which finds
        models that mix rows.

        Raises:
            ValueError: the model mixes rows (batch norm or dropout of the base in training mode, outputs for the whole
                batch, parameters of the base that require a gradient); batches that do not fit together; a loss that is
                not one number, or does not depend on the adapter.
            And what the data, the model and the losses raise. No adapter was changed then. The batches are kept for the
            next step. If the backward itself raised, gradients that were accumulated before are forgotten.
        """
        refuse_trained(self._sites.frozen, self.model)
        self._mixers.refuse()
        training = [runner for runner in self._runners.values() if runner.progress.phase == "training"]
        drawn = {runner: batch for runner in training if (batch := runner.draw()) is not None}
        if drawn:
            self._train(list(drawn), list(drawn.values()))
        for runner in training:
            if runner.progress.phase == "dropped":
                self.remove(runner.job.name)
        return {runner.job.name: runner.progress for runner in training}

    def run(self, steps: int | None = None, show: bool = False) -> dict[str, Progress]:
        """Make steps until every job is paused or finished, or `steps` of them, and return where all jobs stand. With
        `show` a live table is printed meanwhile, for which rich must be installed."""
        from lora_kernels.jobs import table

        showing: AbstractContextManager[None] = table.live(self.table) if show else contextlib.nullcontext()
        with showing:
            made = 0
            while made != steps and any(p.phase == "training" for p in self.progress().values()):
                self.step()
                made += 1
        return self.progress()

    def using(self, name: str) -> AbstractContextManager[object]:
        """Return a context in which the model computes with the adapter of one job, without dropout, to evaluate it or
        to generate with it. ``lora_kernels.mixed(model, names)`` is the same with a job for each sample.

        Outside of these contexts and of `step` the model computes what its base computes. Raises KeyError for a name
        that there is none of.
        """
        return self._sites.running([self._runner(name).job.name], batches.all_of_one)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Return A and B of a job by ``<layer>.lora_A`` and ``<layer>.lora_B``."""
        return dict(self._runner(name).parameters)

    def progress(self) -> dict[str, Progress]:
        """Return where each job stands."""
        return {name: runner.progress for name, runner in self._runners.items()}

    def table(self) -> Table:
        """Return a table of rich with a line for each job: step, loss, norm of the gradient, learning rate, rank,
        samples of the last batch, and where it stands."""
        from lora_kernels.jobs import table

        return table.of((runner.job, runner.rank, runner.progress) for runner in self._runners.values())

    def close(self) -> None:
        """Remove all jobs, and put the layers and the choice of what is trained back as they were found."""
        self._runners.clear()
        self._sites.close()

    def _runner(self, name: str) -> Runner:
        runner = self._runners.get(name)
        if runner is None:
            raise KeyError(f"there is no job {name!r}; there are {', '.join(map(repr, self._runners)) or 'none'}")
        return runner

    def _train(self, runners: Sequence[Runner], drawn: Sequence[Drawn]) -> None:
        """Train these jobs on the batches that were drawn for them."""
        names = [runner.job.name for runner in runners]
        device = drawn[0].seeds[0].device
        joined = batches.join(names, [each.batch for each in drawn], self._padding, device)
        rows = batches.RowsOf(joined, any(_has_dropout(runner.job) for runner in runners))
        with self._sites.running(names, rows, [each.seeds for each in drawn]), torch.enable_grad():
            outputs = batches.split(self._call(self.model, joined.batch), joined.counts)
            own = batches.split(joined.batch, joined.counts, "the batch")
            losses = [_loss(runner, *each) for runner, *each in zip(runners, outputs, own, strict=True)]
            values = torch.stack([loss.detach().double() for loss in losses]).tolist()
            finite = [i for i, value in enumerate(values) if math.isfinite(value)]
            if not self._checked and len(finite) > 1:
                refuse_mixed([losses[i] for i in finite], [runners[i] for i in finite])
                self._checked = True
            if finite:
                try:
                    # A loss that is not finite is left out of the sum. Its rows then get zeros, and at worst NaN, which
                    # stay in these rows: they reach no adapter of another job.
                    torch.autograd.backward([losses[i] / runners[i].job.accumulation for i in finite])
                except BaseException:
                    for runner in runners:
                        runner.forget_gradients()
                    raise
        for i, (runner, value) in enumerate(zip(runners, values, strict=True)):
            if i not in finite:
                runner.progress = runner.progress._replace(loss=value, samples=joined.counts[i])
                runner.stop("loss", value)
        _step([runners[i] for i in finite if runners[i].learnt(values[i], joined.counts[i])])


def _step(due: list[Runner]) -> None:
    """Make a step of the optimiser of each of these jobs. All norms are read at once, because that waits for a GPU."""
    if not due:
        return
    norms = torch.stack([torch.nn.utils.get_total_norm(runner.gradients()).double() for runner in due]).tolist()
    for runner, norm in zip(due, norms, strict=True):
        if math.isfinite(norm):
            runner.step(norm)
        else:
            runner.stop("gradient's norm", norm)


def _loss(runner: Runner, outputs: Any, batch: Any) -> Tensor:
    """Return the loss of a job. Raises ValueError where it is not one number, or depends on no parameter."""
    loss, name = runner.job.loss(outputs, batch), runner.job.name
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = tuple(loss.shape) if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"the loss of job {name!r} must be a tensor of one number, got {what}")
    if not loss.requires_grad:
        raise ValueError(f"the loss of job {name!r} does not depend on its adapter: it has no gradient")
    return loss.reshape(())


def _has_dropout(job: Job) -> bool:
    return job.config.lora_dropout > 0
