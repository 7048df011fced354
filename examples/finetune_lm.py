"""Fine-tune a small language model with Hugging Face's Trainer and PEFT, and one added line.

    python examples/finetune_lm.py [--short] [--out DIR]

1. Gather the documentation strings of Python's standard library, and train a tokenizer on them.
2. Pretrain a Llama of four layers on plain prose.
3. Adapt it with LoRA to another kind of text, documentation with interactive examples (``>>>``):
   ``lora_kernels.fuse(model)`` puts PEFT's layers on the fused path. That is the added line.
4. Compare perplexities on held-out text, and the times of a step with and without fusing.

It needs transformers, accelerate and peft.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _docs import gather, split
from _lm import LENGTH, Sequences, make_model, make_tokenizer, perplexity, train
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

import lora_kernels

BATCH = 16
LORA = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Lengths:
    pretrain_steps: int = 240
    adapt_steps: int = 120
    timed_rounds: int = 10
    prose_texts: int = 10_000  # at most


SHORT = Lengths(pretrain_steps=6, adapt_steps=6, timed_rounds=2, prose_texts=300)


@dataclass
class Data:
    """Sequences to train on, and sequences to measure perplexity on."""

    prose: Sequences
    prose_held_out: Sequences
    examples: Sequences
    examples_held_out: Sequences


def load_data(lengths: Lengths) -> Data:
    texts = gather()
    prose, examples = split(texts["prose"], lengths.prose_texts), split(texts["examples"])
    tokenizer = make_tokenizer(prose.train)
    data = Data(
        *(Sequences(tokenizer, part) for part in (prose.train, prose.held_out, examples.train, examples.held_out))
    )
    print(
        f"documentation strings: {len(texts['prose']):,} of prose ({data.prose.rows.numel():,} tokens to train on), "
        f"{len(texts['examples']):,} with examples ({data.examples.rows.numel():,} tokens)"
    )
    return data


def pretrained(data: Data, lengths: Lengths, out: Path) -> LlamaForCausalLM:
    model = make_model()
    print(f"\npretrain {model.num_parameters():,} parameters on prose, {lengths.pretrain_steps} steps")
    train(model, data.prose, steps=lengths.pretrain_steps, batch=BATCH, lr=3e-3, out=out)
    return model


def time_steps(model: PeftModel, data: Data, rounds: int) -> dict[str, float]:
    """Return median seconds of forward and backward, not fused and fused, in turns: other load slows both alike."""
    model.train()
    rows = data.examples.rows[:BATCH].to(model.device)
    times: dict[str, list[float]] = {"PEFT": [], "fused": []}
    for i in range(rounds + 1):
        for name, prepare in (("PEFT", lora_kernels.unfuse), ("fused", lora_kernels.fuse)):
            prepare(model)
            start = time.perf_counter()
            model(input_ids=rows, labels=rows).loss.backward()
            if rows.is_cuda:
                torch.cuda.synchronize()
            if i > 0:  # the first round warms up
                times[name].append(time.perf_counter() - start)
            model.zero_grad()
    return {name: statistics.median(each) for name, each in times.items()}


def perplexities(model: nn.Module, data: Data) -> tuple[float, float]:
    return perplexity(model, data.prose_held_out), perplexity(model, data.examples_held_out)


def run(out: Path, lengths: Lengths) -> dict[str, tuple[float, float]]:
    """Return perplexities of held-out prose and of held-out text with examples, by state of the model."""
    data = load_data(lengths)
    base = pretrained(data, lengths, out)
    found = {"pretrained": perplexities(base, data)}

    torch.manual_seed(0)
    model = get_peft_model(base, LORA)
    report = lora_kernels.fuse(model)  # the added line
    print(f"\n{report}\n")
    model.print_trainable_parameters()
    print(f"adapt to text with examples, {lengths.adapt_steps} steps")
    train(model, data.examples, steps=lengths.adapt_steps, batch=BATCH, lr=2e-3, out=out)

    found["with the adapter"] = perplexities(model, data)
    with model.disable_adapter():
        found["adapter off"] = perplexities(model, data)
    model.save_pretrained(out / "adapter")

    print(f"\n{'perplexity of held-out':26} {'prose':>8} {'examples':>9}")
    for name, (prose, examples) in found.items():
        print(f"  {name:24} {prose:8.1f} {examples:9.1f}")
    times = time_steps(model, data, lengths.timed_rounds)
    print(f"\nforward + backward of {BATCH} x {LENGTH} tokens, median of {lengths.timed_rounds}:")
    for name, seconds in times.items():
        print(f"  {name:6} {1e3 * seconds:7.1f} ms   {times['PEFT'] / seconds:.2f} x")
    print(f"\nthe adapter, as PEFT saves it: {out / 'adapter'}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything in a few steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "lm", help="folder for the files")
    arguments = parser.parse_args()
    start = time.perf_counter()
    run(arguments.out, SHORT if arguments.short else Lengths())
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
