"""Fine-tune the model of finetune_lm.py over several processes with FSDP2, and resume from a sharded checkpoint.

    torchrun --nproc-per-node 2 examples/finetune_fsdp.py [--short] [--out DIR]
    torchrun --nproc-per-node 4 examples/finetune_fsdp.py --resume          # with another number of processes

Frozen and trained weights are sharded over the processes. Each process computes on its own sequences and draws its own
dropout masks. Call `lora_kernels.fuse` before ``fully_shard``, and shard the blocks: their forward gathers the weights
of the adapters too. Sharding lora_A and lora_B alone would not gather them for the fused path.

It uses gloo on CPUs and nccl on GPUs. It needs transformers, accelerate and peft.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _lm import Sequences, log_likelihood, make_model
from finetune_lm import BATCH, LORA, SHORT, Data, Lengths, load_data
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm
from transformers import LlamaForCausalLM

import lora_kernels

TRAINED = StateDictOptions(ignore_frozen_params=True)


class Progress:
    """A checkpoint: adapters, the moments of the optimizer, and the step. It is sharded as the model is."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, object]:
        weights, moments = get_state_dict(self.model, self.optimizer, options=TRAINED)
        return {"model": weights, "optimizer": moments, "step": self.step}

    def load_state_dict(self, state: dict[str, object]) -> None:
        options = StateDictOptions(ignore_frozen_params=True, strict=False)  # the file holds no weights of the base
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=options,
        )
        self.step = state["step"]


def base_model(data: Data, lengths: Lengths, out: Path) -> LlamaForCausalLM:
    """Return the pretrained model. The first process makes it if it is not there yet, and all read it."""
    path = out / "pretrained.pt"
    if dist.get_rank() == 0 and not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        torch.save(pretrain_alone(data, lengths, out).state_dict(), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    dist.barrier()
    model = make_model()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def pretrain_alone(data: Data, lengths: Lengths, out: Path) -> LlamaForCausalLM:
    """Return a model trained in plain PyTorch by this process alone. The Trainer would ask all processes to take
    part."""
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in tqdm(range(lengths.pretrain_steps), desc="pretrain on prose", unit="step"):
        rows = batch_of(data.prose, step, BATCH)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def batch_of(data: Sequences, step: int, count: int) -> torch.Tensor:
    """Return the rows of a step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return data.rows[torch.randperm(len(data), generator=generator)[:count]]


def mine(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the part of `rows` that this process computes on."""
    return rows.tensor_split(dist.get_world_size())[dist.get_rank()].to(device)


def checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints, by step. A checkpoint without metadata, which is written last, is not
    complete."""
    return [path.parent for path in sorted(out.glob("checkpoint-*/.metadata"))]


def perplexity(model: nn.Module, data: Sequences, device: torch.device) -> float:
    """Return the perplexity of the first 128 sequences; each process computes its part."""
    found = torch.tensor(log_likelihood(model, mine(data.rows[:128], device)), dtype=torch.float64, device=device)
    dist.all_reduce(found)
    return math.exp(-found[0] / found[1])


def run(out: Path, lengths: Lengths, resume: bool, device: torch.device) -> None:
    first = dist.get_rank() == 0
    data = load_data(lengths)
    torch.manual_seed(0)  # every process starts with the same adapters
    model = get_peft_model(base_model(data, lengths, out), LORA).to(device)
    report = lora_kernels.fuse(model)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

    progress = Progress(model, optimizer)
    if resume:
        dcp.load({"progress": progress}, checkpoint_id=checkpoints(out)[-1])
    before = perplexity(model, data.examples_held_out, device)
    if first:
        print(f"{len(report.fused)} layers fused, {len(report.not_fused)} not; {dist.get_world_size()} processes")
        print(f"step {progress.step}: perplexity of held-out text with examples {before:.1f}", flush=True)

    torch.manual_seed(1000 * progress.step + dist.get_rank())  # each process draws its own dropout masks
    model.train()
    start, end = progress.step, progress.step + lengths.adapt_steps
    for step in tqdm(range(start, end), desc="adapt", unit="step", disable=not first):
        rows = mine(batch_of(data.examples, step, BATCH), device)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.step = step + 1

    after = perplexity(model, data.examples_held_out, device)
    folder = out / f"checkpoint-{progress.step:06}"
    dcp.save({"progress": progress}, checkpoint_id=folder)
    if first:
        print(f"step {progress.step}: perplexity of held-out text with examples {after:.1f}")
        print(f"saved, a part by each process: {folder}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything in a few steps")
    parser.add_argument("--resume", action="store_true", help="resume from the newest checkpoint in the folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "fsdp", help="folder for the files")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2")
    if arguments.resume and not checkpoints(arguments.out):
        parser.error(f"there is no checkpoint to resume from in {arguments.out}")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    run(arguments.out, SHORT if arguments.short else Lengths(), arguments.resume, device)
    gc.collect()  # the sharded model keeps its groups in cycles; torch aborts if it is freed after them
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
