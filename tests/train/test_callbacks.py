"""The callbacks restart at the right steps, and a training that goes on from a checkpoint computes the same bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import lora_kernels
from lora_kernels import apply_lora
from lora_kernels.models.pairs import pairs
from lora_kernels.train import jagged_cosine, restart
from lora_kernels.train.cycle import Cycle

STEPS, EVERY = 12, 4
FACTOR = jagged_cosine(STEPS, EVERY, warmup=2, restart_warmup=1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(16, 12), nn.Linear(12, 20), nn.Linear(20, 16)
        self.norm = nn.LayerNorm(12)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.down(torch.tanh(self.up(self.norm(self.table(ids)))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1).flatten()), "logits": logits}


def made(who: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Net().to(dtype)
    if who == "ours":
        apply_lora(model, r=2, lora_dropout=0.1, target_modules=["up", "down"])
        model.norm.requires_grad_(True)
        return model
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["up", "down"], modules_to_save=["norm"])
    model = peft.get_peft_model(model, config)
    lora_kernels.fuse(model)
    return model


def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(16, (64, 6), generator=torch.Generator().manual_seed(2))
    return [{"ids": row, "labels": row} for row in ids]


def optimizer_of(model: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return optimizer, LambdaLR(optimizer, FACTOR)


def test_each_restart_draws_values_of_its_own_and_the_same_again_from_a_checkpoint() -> None:
    def drawn(seed: int, *steps: int) -> list[list[float]]:
        cycle, model, found = Cycle(EVERY, 0.99, "magnitude", seed, master=False), made("ours"), []
        for step in steps:
            cycle.restart(model, [], step)
            found.append(pairs(model)[0].a.flatten().tolist())
        return found

    first, second = drawn(3, EVERY, 2 * EVERY)
    assert first != second
    assert drawn(3, 2 * EVERY) == [second]
    assert drawn(4, EVERY) != [first]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- a plain loop


def run_loop(model: nn.Module, state: dict[str, Any] | None = None, stop: int = STEPS) -> dict[str, Any]:
    optimizer, scheduler = optimizer_of(model)
    begun = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        begun = state["step"]
    data = torch.stack([row["ids"] for row in rows()])
    for step in range(begun, stop):
        model(data[4 * step : 4 * step + 4])["loss"].backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            restart(model, optimizer, prune=0.9, generator=torch.Generator().manual_seed(step))
    return {
        "model": values(model), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(), "step": stop,
    }  # fmt: skip


@pytest.mark.parametrize("who", ["ours", "PEFT"])
@pytest.mark.parametrize("stop", [6, 8])
@pytest.mark.filterwarnings("ignore:the base weights have changed")
def test_a_loop_that_goes_on_from_a_checkpoint_computes_the_same_bits(who: str, stop: int, tmp_path: Path) -> None:
    want = run_loop(made(who))["model"]
    torch.save(run_loop(made(who), stop=stop), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(run_loop(made(who), state)["model"], want)


# --- transformers


def run_trainer(model: nn.Module, out: Path, resume: Path | None = None, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    from lora_kernels.train import ReLoRACallback

    further = {key: settings.pop(key) for key in ("master", "checkpoint") if key in settings}
    callback = ReLoRACallback(EVERY, prune=0.9, seed=5, **further)
    arguments = {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 2} | settings
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            out, gradient_accumulation_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
            seed=3, **arguments,
        ),
        train_dataset=rows(),
        eval_dataset=rows(),
        optimizers=optimizer_of(model),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return callback


@pytest.mark.parametrize("who", ["ours", "PEFT"])
def test_transformers_trainer_restarts_and_goes_on_with_the_same_bits(who: str, tmp_path: Path) -> None:
    model = made(who)
    bases = {name: value for name, value in values(model).items() if name.endswith(("up.weight", "base_layer.weight"))}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the learning rate")
        callback = run_trainer(model, tmp_path)
    assert [step for step, _ in callback.reports] == [4, 8]  # and none after the last step, 12
    assert all(report.moments for _, report in callback.reports)
    want = values(model)
    assert all(not torch.equal(want[name], value) for name, value in bases.items())
    assert all(pair.zero_at_start.any() for pair in pairs(model))
    for step in (6, 8):
        resumed = made(who)
        again = run_trainer(resumed, tmp_path / "again", tmp_path / f"checkpoint-{step}", **(
            {"checkpoint": tmp_path / f"checkpoint-{step}"} if who == "PEFT" else {}
        ))  # fmt: skip
        assert same(values(resumed), want), step
        assert [at for at, _ in again.reports] == ([8] if step == 6 else [])
        with pytest.raises(ValueError, match="restarted"):
            lora_kernels.save_adapter(resumed, tmp_path / "adapter") if who == "ours" else _peft_alone(tmp_path)


def _peft_alone(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    try:
        peft.PeftModel.from_pretrained(Net(), folder / "checkpoint-8")
    except ValueError as error:
        assert "relora" in str(error)
        raise ValueError("restarted") from error


@pytest.mark.slow
def test_transformers_trainer_keeps_the_master_of_a_16_bit_base_in_its_checkpoints(tmp_path: Path) -> None:
    model = made("ours", torch.bfloat16)
    callback = run_trainer(model, tmp_path, master=True)
    assert callback._cycle.master.keys() == {"up", "down"}
    want = values(model)
    resumed = made("ours", torch.bfloat16)
    again = run_trainer(resumed, tmp_path, tmp_path / "checkpoint-6", master=True)
    assert same(values(resumed), want) and same(again._cycle.master, callback._cycle.master)


def test_a_base_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    run_trainer(made("PEFT"), tmp_path)
    resumed = made("PEFT")
    base = values(resumed)
    with pytest.raises(ValueError, match="of another checkpoint than the adapters that were loaded"):
        run_trainer(resumed, tmp_path, tmp_path / "checkpoint-6", checkpoint=tmp_path / "checkpoint-8")
    with pytest.raises(ValueError, match=r"there is no .*elsewhere.*say ReLoRACallback\(..., checkpoint=FOLDER\)"):
        run_trainer(made("PEFT"), tmp_path / "elsewhere", tmp_path / "checkpoint-6")
    assert all(torch.equal(value, base[name]) for name, value in values(resumed).items() if "base_layer" in name)


def test_the_best_adapter_on_the_last_base_is_refused(tmp_path: Path) -> None:
    settings = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(ValueError, match="load_best_model_at_end loads the best adapter"):
        run_trainer(made("PEFT"), tmp_path, **settings)


def test_a_rate_that_is_not_zero_at_a_restart_is_told(tmp_path: Path) -> None:
    from lora_kernels.train.cycle import Cycle

    model = made("ours")
    optimizer, scheduler = optimizer_of(model)
    cycle = Cycle(EVERY, 0.9, "magnitude", 0, False)
    optimizer.step()
    scheduler.step()
    with pytest.warns(UserWarning, match=r"after step 4 is 0\.005, and not 0.*jagged_cosine\(steps, every=4"):
        cycle.restart(model, [optimizer], 4)
    with pytest.warns(UserWarning, match="every=4, but the training ends after 4 steps"):
        cycle.begin(model, 0, 4)
    with pytest.raises(ValueError, match="every must be a number of steps of at least 1, got 0"):
        Cycle(0, 0.9, "magnitude", 0, False)


def test_a_model_that_cannot_restart_is_refused_when_training_begins(tmp_path: Path) -> None:
    model = made("ours")
    model.up.merge()
    with pytest.raises(ValueError, match="it is merged"):
        run_trainer(model, tmp_path)


# --- Lightning


def run_lightning(model: nn.Module, out: Path, resume: Path | None = None, **settings: Any) -> Any:
    lightning = pytest.importorskip("lightning.pytorch")
    from lora_kernels.train import LightningReLoRA

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            # Lightning restores neither the place in these data nor the random numbers of dropout.
            torch.manual_seed(index)
            return self.model(ids[2 * index : 2 * index + 2])["loss"]

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = optimizer_of(self.model)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    ids = torch.stack([row["ids"] for row in rows()])
    callback = LightningReLoRA(EVERY, prune=0.9, seed=5, **settings)
    checkpoint = lightning.callbacks.ModelCheckpoint(out, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, accumulate_grad_batches=2, logger=False, default_root_dir=out,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, checkpoint],
    )  # fmt: skip
    data = torch.utils.data.DataLoader(rows(), batch_size=2)
    trainer.fit(Module(), data, ckpt_path=resume)
    return callback


@pytest.mark.slow
@pytest.mark.parametrize("who", ["ours", "PEFT"])
@pytest.mark.filterwarnings("ignore")
def test_lightning_restarts_and_goes_on_with_the_same_bits(who: str, tmp_path: Path) -> None:
    model = made(who, torch.bfloat16 if who == "ours" else torch.float32)
    callback = run_lightning(model, tmp_path, master=who == "ours")
    assert [step for step, _ in callback.reports] == [4, 8]
    want = values(model)
    for step in (6, 8):
        resumed = made(who, torch.bfloat16 if who == "ours" else torch.float32)
        again = run_lightning(resumed, tmp_path / "again", tmp_path / f"step={step}.ckpt", master=who == "ours")
        assert same(values(resumed), want), step
        assert [at for at, _ in again.reports] == ([8] if step == 6 else [])


def test_lightning_makes_the_restart_that_a_checkpoint_was_saved_just_before() -> None:
    pytest.importorskip("lightning.pytorch")
    from types import SimpleNamespace

    from lora_kernels.train import LightningReLoRA

    model = made("ours")
    optimizer, _ = optimizer_of(model)
    callback = LightningReLoRA(EVERY)
    trainer = SimpleNamespace(global_step=8, estimated_stepping_batches=STEPS, optimizers=[optimizer])
    callback.load_state_dict({"last": 4, "master": None})
    callback.on_train_start(trainer, model)
    callback.on_train_batch_end(trainer, model, None, None, 16)
    assert [step for step, _ in callback.reports] == [8] and callback.state_dict()["last"] == 8
