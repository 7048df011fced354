"""Common training loops give a fused model the losses and adapters that they give the unfused one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

for package in ("peft", "transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed")
from support.peft_models import fused_layers  # noqa: E402
from support.tiny_llama import llama, lora, lora_llama, sequences  # noqa: E402

import lora_kernels  # noqa: E402

STEPS, ACCUMULATE, BATCH, LR = 8, 2, 8, 1e-2


@dataclass(frozen=True)
class Setting:
    """The settings of a loop; every loop also accumulates gradients."""

    checkpoint: bool | None = None
    """The use_reentrant of gradient checkpointing, or None without checkpointing."""
    bf16: bool = False
    p: float = 0.0

    @property
    def forwards(self) -> int:
        """The number of forwards of a layer in a whole run. Checkpointing runs each forward twice."""
        return STEPS * ACCUMULATE * (1 if self.checkpoint is None else 2)

    def trainer(self, out: Path) -> dict[str, Any]:
        """Return the arguments of transformers' TrainingArguments."""
        return {
            "output_dir": str(out), "max_steps": STEPS, "gradient_accumulation_steps": ACCUMULATE,
            "per_device_train_batch_size": BATCH, "learning_rate": LR, "logging_steps": 1, "seed": 0, "use_cpu": True,
            "bf16": self.bf16, "gradient_checkpointing": self.checkpoint is not None, "report_to": [],
            "gradient_checkpointing_kwargs": {"use_reentrant": bool(self.checkpoint)}, "save_strategy": "no",
            "disable_tqdm": True, "dataloader_pin_memory": False,
        }  # fmt: skip

    def model(self, fused: bool) -> nn.Module:
        model = lora_llama(lora_dropout=self.p)
        if self.checkpoint is not None:
            model.enable_input_require_grads()  # reentrant checkpointing needs an input that requires a gradient
            model.gradient_checkpointing_enable({"use_reentrant": self.checkpoint})
        if fused:
            lora_kernels.fuse(model, strict=True)
        torch.manual_seed(0)
        return model


def rows() -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in sequences(STEPS * ACCUMULATE * BATCH)]


def loader() -> torch.utils.data.DataLoader:
    data = torch.tensor(sequences(STEPS * ACCUMULATE * BATCH))
    return torch.utils.data.DataLoader(data, batch_size=BATCH)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)


# --- the loops: each returns the loss of every step and the model


def transformers_trainer(setting: Setting, fused: bool, out: Path) -> tuple[list[float], nn.Module]:
    from transformers import Trainer, TrainingArguments, default_data_collator

    trainer = Trainer(
        setting.model(fused),
        TrainingArguments(**setting.trainer(out)),
        train_dataset=rows(),
        data_collator=default_data_collator,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def trl_sft(setting: Setting, fused: bool, out: Path) -> tuple[list[float], nn.Module]:
    pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {f"w{i}": i for i in range(62)} | {"<pad>": 62, "<eos>": 63}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    if fused:
        lora_kernels.enable()
    trainer = SFTTrainer(
        llama(),
        SFTConfig(**setting.trainer(out)),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        peft_config=lora(lora_dropout=setting.p),
    )
    lora_kernels.disable()
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def lightning_trainer(setting: Setting, fused: bool, out: Path) -> tuple[list[float], nn.Module]:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = setting.model(fused), []

        def training_step(self, ids, index):
            loss = self.model(ids, labels=ids).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return optimizer_of(self.model)

    module = Module()
    lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, accumulate_grad_batches=ACCUMULATE, default_root_dir=out,
        precision="bf16-mixed" if setting.bf16 else "32-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, loader())  # fmt: skip
    return module.losses, module.model


def accelerate_loop(setting: Setting, fused: bool, out: Path) -> tuple[list[float], nn.Module]:
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=ACCUMULATE, mixed_precision="bf16" if setting.bf16 else "no"
    )
    model = setting.model(fused)
    wrapped, optimizer, batches = accelerator.prepare(model, optimizer_of(model), loader())
    losses = []
    for ids in batches:
        with accelerator.accumulate(wrapped):
            loss = wrapped(ids, labels=ids).loss
            losses.append(loss.item())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return losses, accelerator.unwrap_model(wrapped)


LOOPS = [transformers_trainer, trl_sft, lightning_trainer, accelerate_loop]
SETTINGS = {
    "plain": Setting(),
    "reentrant": Setting(checkpoint=True),
    "non-reentrant": Setting(checkpoint=False),
    "bf16": Setting(bf16=True),
}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(monkeypatch) -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        lora_kernels.disable()

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in models of this size several threads only wait for each other
    forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers warn of matters of their own
        yield
    forget()
    torch.set_num_threads(threads)


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def same_adapters(got: nn.Module, want: nn.Module) -> None:
    trained = adapters(got)
    assert len(trained) == 28
    for name, value in adapters(want).items():
        assert value.abs().max() > 0, name
        error = (trained[name] - value).abs().max() / value.abs().max()
        assert error < 2e-4, f"{name}: {error:.3g}"


def all_fused(model: nn.Module, forwards: int) -> None:
    layers = fused_layers(model)
    assert len(layers) == 14
    assert [layer.fused_calls for layer in layers] == [forwards] * 14
    assert not any(layer.passed_over for layer in layers)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_the_run_is_that_of_the_unfused_model(loop, setting, tmp_path):
    want, plain = loop(setting, False, tmp_path)
    got, model = loop(setting, True, tmp_path)
    assert not fused_layers(plain)
    all_fused(model, setting.forwards)
    assert len(got) == len(want) >= STEPS and want[-1] < want[0]
    assert got == pytest.approx(want, rel=3e-3 if setting.bf16 else 1e-5)
    if not setting.bf16:  # in bf16 some gradients are only rounding errors, and Adam makes full steps of them
        same_adapters(model, plain)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_with_dropout_the_loss_falls(loop, tmp_path):
    setting = Setting(p=0.1)
    losses, model = loop(setting, True, tmp_path)
    all_fused(model, setting.forwards)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[-1] < losses[0] - 0.02


def scaled(fused: bool) -> tuple[list[float], list[float], nn.Module]:
    """Train under fp16 autocast and a loss scale whose first value overflows, so that the first step is skipped."""
    model = Setting().model(fused)
    start = {name: p.clone() for name, p in adapters(model).items()}
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-24)
    losses, scales = [], []
    for ids in loader():
        with torch.autocast("cpu", torch.float16):
            loss = model(ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(adapters(model).values(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if not losses:
            assert all(torch.equal(p, start[name]) for name, p in adapters(model).items())
        optimizer.zero_grad()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return losses, scales, model


def test_a_grad_scaler_skips_the_step_that_overflows():
    want, want_scales, _ = scaled(False)
    got, scales, model = scaled(True)
    assert scales == want_scales == [2.0**16] * len(got)
    all_fused(model, STEPS * ACCUMULATE)
    assert got == pytest.approx(want, rel=3e-3) and want[-1] < want[0] - 0.1
