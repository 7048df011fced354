"""QLoRA from end to end on the CPU: a base in 4 bits, an adapter trained over it, text generated from both.

    python examples/generate_qlora.py [--short] [--out DIR]

1. Pretrain a small Llama on documentation strings of Python's standard library, as finetune_lm.py does, and save it.
2. Load it in 4 bits (NF4, double quantisation) with transformers and bitsandbytes, and add LoRA with PEFT:
   ``lora_kernels.fuse(model)`` puts its layers on the fused path. That is the added line.
3. Train the adapter on another kind of text, documentation with interactive examples (``>>>``).
4. Compare speed and logits with and without fusing; generate with the adapter, without it, and with it merged.

It needs transformers, accelerate, peft and bitsandbytes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _docs import gather, split
from _lm import Sequences, make_model, make_tokenizer, perplexity, train
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

import lora_kernels
from lora_kernels.quant.bnb import from_bnb

BATCH = 16
LORA = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
PROMPTS = ("Return the ", ">>> import ", ">>> x = [")


@dataclass(frozen=True)
class Lengths:
    pretrain_steps: int = 80
    adapt_steps: int = 40
    new_tokens: int = 40
    timed_rounds: int = 5
    prose_texts: int = 10_000  # at most


SHORT = Lengths(pretrain_steps=6, adapt_steps=6, new_tokens=12, timed_rounds=2, prose_texts=300)


def in_4_bits(path: Path) -> PeftModel:
    """Return the model saved at `path`, loaded in NF4, with adapters that do nothing yet."""
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4, device_map={"": "cpu"})
    torch.manual_seed(0)  # for the adapters
    return get_peft_model(base, LORA)


def generate(model: nn.Module, prompt: Tensor, new_tokens: int, **more: int) -> Tensor:
    """Return the prompt [1, tokens] and `new_tokens` after it, chosen greedily."""
    with torch.no_grad():
        return model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            **more,
        )


def show_texts(what: str, model: nn.Module, tokenizer: PreTrainedTokenizerFast, new_tokens: int) -> None:
    print(f"\n{what}:")
    for prompt in PROMPTS:
        start = tokenizer(prompt, return_tensors="pt")["input_ids"]
        tokens = generate(model, start, new_tokens, no_repeat_ngram_size=2)  # a model this small repeats itself
        print(f"  {tokens.shape[1]} tokens  {tokenizer.decode(tokens[0])!r}")


def compare(fused: PeftModel, plain: PeftModel, prompt: Tensor, lengths: Lengths) -> None:
    """Print tokens per second, in turns so that other load slows both alike, and the difference of the logits."""
    models = {"PEFT + bitsandbytes": plain, "fused": fused}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for i in range(lengths.timed_rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            generate(model, prompt, lengths.new_tokens)
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    print(f"\ngenerate, {lengths.new_tokens} tokens, median of {lengths.timed_rounds}:")
    for name, taken in seconds.items():
        print(f"  {name:20} {lengths.new_tokens / statistics.median(taken):7.1f} tokens/s")
    with torch.no_grad():
        got, want = (model(input_ids=prompt).logits for model in (fused, plain))
    print(f"logits differ by {((got - want).norm() / want.norm()).item():.1e} (RMS, relative)")


def weight_bytes(model: PeftModel) -> tuple[int, int]:
    """Return the bytes of the frozen weights of layers with adapters: in their dense dtype, and as stored in NF4."""
    layers = [layer.base_layer for layer in model.modules() if hasattr(layer, "base_layer")]
    stored = [from_bnb(layer) for layer in layers]
    dense = sum(w.shape[0] * w.shape[1] * w.dtype.itemsize for w in stored)
    return dense, sum(part.nbytes for w in stored for part in w.tensors)


def run(out: Path, lengths: Lengths) -> None:
    texts = gather()
    prose, examples = split(texts["prose"], lengths.prose_texts), split(texts["examples"])
    tokenizer = make_tokenizer(prose.train)
    base = make_model()
    print(f"pretrain {base.num_parameters():,} parameters on prose, {lengths.pretrain_steps} steps")
    train(base, Sequences(tokenizer, prose.train), steps=lengths.pretrain_steps, batch=BATCH, lr=3e-3, out=out)
    base.save_pretrained(out / "base")

    model = in_4_bits(out / "base")
    print(f"\n{lora_kernels.fuse(model)}\n")  # the added line
    dense, stored = weight_bytes(model)
    print(f"frozen weights: {dense / 1024:,.0f} KiB dense, {stored / 1024:,.0f} KiB in NF4 ({stored / dense:.1%})")

    held_out = Sequences(tokenizer, examples.held_out)
    before = perplexity(model, held_out)
    print(f"QLoRA on text with examples, {lengths.adapt_steps} steps")
    train(model, Sequences(tokenizer, examples.train), steps=lengths.adapt_steps, batch=BATCH, lr=2e-3, out=out)
    print(f"\nperplexity of held-out text with examples: {before:.1f} before, {perplexity(model, held_out):.1f} after")
    model.save_pretrained(out / "adapter")

    model.eval()
    plain = copy.deepcopy(model)  # a copy, because bitsandbytes may re-pack its weights in the first call
    lora_kernels.unfuse(plain)
    compare(model, plain, held_out.rows[:1, :16], lengths)
    show_texts("with the adapter", model, tokenizer, lengths.new_tokens)
    with model.disable_adapter():
        show_texts("adapter off", model, tokenizer, lengths.new_tokens)

    # Merged into the dense base: merging into 4 bits would quantise again and lose some of the adapter.
    dense_base = AutoModelForCausalLM.from_pretrained(out / "base")
    merged = PeftModel.from_pretrained(dense_base, out / "adapter").merge_and_unload()
    show_texts("merged into the dense base", merged, tokenizer, lengths.new_tokens)
    print(f"perplexity, merged: {perplexity(merged, held_out):.1f}")
    print(f"\nthe base: {out / 'base'}; the adapter, as PEFT saves it: {out / 'adapter'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run everything in a few steps")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "out" / "qlora", help="folder for the files"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    run(arguments.out, SHORT if arguments.short else Lengths())
    print(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
