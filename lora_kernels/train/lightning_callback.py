"""`LightningReLoRA`: restarts in a training by Lightning."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback  # type: ignore[assignment]  # the same, in a package of its own

from lora_kernels.train.cycle import Cycle


class LightningReLoRA(Callback):  # type: ignore[misc]
    """Restart the adapters (`restart`) after every `every` steps of the optimiser, for Lightning's Trainer.

    ``configure_optimizers`` should return a schedule that is 0 there, by the step: ``{"scheduler": LambdaLR(optimizer,
    jagged_cosine(...)), "interval": "step"}``. A warning tells if it is not. There is no restart after the last step.

    Lightning's checkpoints hold the whole model, and this callback adds the step of its last restart, and `master`. A
    training that goes on from a checkpoint computes bit for bit what one without interruption does, as far as Lightning
    restores the random numbers of dropout and the data.

    Args:
        every: the steps between two restarts, of ``trainer.global_step``.
        prune, how, seed, master: as for `ReLoRACallback`.

    Attributes:
        reports: a list of (step, `RestartReport`).

    Raises:
        ValueError: `every` below 1; prune or how out of range; when the training begins, what `restart` would refuse.
    """

    def __init__(
        self, every: int, *, prune: float = 0.99, how: str = "magnitude", seed: int = 0, master: bool = False
    ) -> None:
        self._cycle = Cycle(every, prune, how, seed, master)
        self._last = 0
        self.reports = self._cycle.reports

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the model, and make the restart that the checkpoint was saved just before."""
        self._cycle.begin(pl_module, trainer.global_step, trainer.estimated_stepping_batches)
        self._restart_if_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Restart, if it is due."""
        self._restart_if_due(trainer, pl_module)

    def _restart_if_due(self, trainer: Any, pl_module: Any) -> None:
        step, steps = trainer.global_step, trainer.estimated_stepping_batches
        if step != self._last and self._cycle.is_due(step, steps):  # a step may be of several batches
            self._cycle.restart(pl_module, trainer.optimizers, step)
            self._last = step

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this callback."""
        return {"last": self._last, "master": self._cycle.master}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` has returned."""
        self._last = state_dict["last"]
        if self._cycle.master is not None:
            self._cycle.master.update(state_dict["master"] or {})
