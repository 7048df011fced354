"""`ReLoRACallback`: restarts in a training by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lora_kernels.train import restart_files
from lora_kernels.train.cycle import Cycle


class ReLoRACallback(TrainerCallback):  # type: ignore[misc]
    """Restart the adapters (`restart`) after every `every` steps of the optimiser, for transformers' Trainer.

    Give the Trainer a schedule that is 0 there: ``optimizers=(optimizer, LambdaLR(optimizer, jagged_cosine(...)))``. A
    warning tells if it is not. There is no restart after the last step.

    Checkpoints: Trainer saves whole models, but of a PeftModel the adapter alone. For that, the trained parameters and
    the base weights go into ``relora.safetensors`` in the checkpoint, and are loaded from there. A training that goes
    on from a checkpoint computes bit for bit what one without interruption does.

    Args:
        every: the steps between two restarts.
        prune, how: as for `restart`.
        seed: of A, B and the random elements that are pruned. They depend on the seed and the step alone.
        master: whether to keep base weights of 16 bits in fp32 too, also in checkpoints.
        checkpoint: the folder of the checkpoint that ``trainer.train(resume_from_checkpoint=...)`` is given, where it
            is not ``<output_dir>/checkpoint-<step>``.

    Attributes:
        reports: a list of (step, `RestartReport`).

    Raises:
        ValueError: `every` below 1; prune or how out of range; when the training begins, what `restart` would refuse;
            load_best_model_at_end with a PeftModel, because Trainer would put the best adapter on the last base; a
            checkpoint that is not that of the loaded adapters.
    """

    def __init__(
        self,
        every: int,
        *,
        prune: float = 0.99,
        how: str = "magnitude",
        seed: int = 0,
        master: bool = False,
        checkpoint: str | Path | None = None,
    ) -> None:
        self._cycle = Cycle(every, prune, how, seed, master)
        self._checkpoint = checkpoint
        self.reports = self._cycle.reports

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the model, and load what the Trainer has not loaded from a checkpoint."""
        model, step = kwargs["model"], state.global_step
        if args.load_best_model_at_end and restart_files.has_peft(model):
            raise ValueError(
                "load_best_model_at_end loads the best adapter of a PeftModel alone, but the base weights would be "
                f"those of the last restart: set it to False. {restart_files.NAME} of the best checkpoint has its own"
            )
        if step and restart_files.needed(model, self._cycle.master):
            folder = Path(self._checkpoint or Path(args.output_dir) / f"checkpoint-{step}")
            if not (folder / restart_files.NAME).is_file():
                raise ValueError(
                    f"there is no {folder / restart_files.NAME}, which has the base weights of the checkpoint after "
                    f"step {step}: say ReLoRACallback(..., checkpoint=FOLDER)"
                )
            copies = restart_files.load(model, folder)
            if self._cycle.master is not None:
                self._cycle.master.update(copies)
        self._cycle.begin(model, step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restart, if it is due."""
        if self._cycle.is_due(state.global_step, state.max_steps):
            self._cycle.restart(kwargs["model"], [kwargs["optimizer"]], state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add to the checkpoint what the Trainer has left out."""
        model = kwargs["model"]
        if restart_files.needed(model, self._cycle.master):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            restart_files.save(model, self._cycle.master, folder, write=args.should_save)
