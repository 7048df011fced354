"""What examples/serve_adapters.py serves by default, and its load test: clients, a table and a picture."""

from __future__ import annotations

import copy
import http.client
import itertools
import json
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels

RANKS = (8, 16, 32, 64)
ADAPTERS = 32


class Bytes:
    """A tokenizer whose tokens are the bytes of a text."""

    eos_token_id = 256
    vocabulary = 257

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode()) or [32]}

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def make_llama() -> LlamaForCausalLM:
    """Return a random model with 2 layers and 10 million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=Bytes.vocabulary,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            eos_token_id=Bytes.eos_token_id,
        )
    ).eval()


def make_adapters(model: LlamaForCausalLM, folder: Path) -> Path:
    """Save random adapters of several ranks for `model` in PEFT's format, each in a folder of its own, and return the
    folder around them."""
    for i in range(ADAPTERS):
        path = folder / f"style-{i}"
        if path.exists():
            continue
        torch.manual_seed(i + 1)
        adapted, r = copy.deepcopy(model), RANKS[i % len(RANKS)]
        lora_kernels.apply_lora(adapted, r=r, lora_alpha=r, target_modules=["q_proj", "v_proj", "down_proj"])
        for parameter in lora_kernels.adapter_parameters(adapted):
            parameter.normal_(std=0.03)
        lora_kernels.save_adapter(adapted, path)
    return folder


@dataclass
class Round:
    """What the clients of one round have seen."""

    adapters: int
    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    """The time from each request to its first token, in seconds."""
    loads: float = 0.0
    """The adapters that the pool had to load."""
    turns: Iterator[int] = field(default_factory=itertools.count)
    """The numbers of its requests."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def ask(address: str, prompt: str, adapter: str | None, max_new_tokens: int) -> tuple[list[int], float]:
    """Send a request, and return its tokens and the time to the first one, in seconds."""
    connection = http.client.HTTPConnection(address, timeout=60)
    body = json.dumps({"prompt": prompt, "adapter": adapter, "max_new_tokens": max_new_tokens})
    started, first, tokens = time.perf_counter(), 0.0, []
    connection.request("POST", "/generate", body)
    response = connection.getresponse()
    for line in response:
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        if "token" in answer:
            first = first or time.perf_counter() - started
            tokens.append(answer["token"])
    connection.close()
    return tokens, first


def metric(address: str, name: str) -> float:
    """Return a number of the server's metrics."""
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def run_round(address: str, clients: int, found: Round, requests: int, tokens: int) -> None:
    """Let every client send its requests, one after the other. The requests ask for the adapters in turns; with 0
    adapters all ask for the base."""
    lock, failed = threading.Lock(), []
    before = metric(address, "lora_pool_loads_total")

    def client(c: int) -> None:
        for i in range(requests):
            name = f"style-{next(found.turns) % found.adapters}" if found.adapters else None
            try:
                made, first = ask(address, f"client {c}, request {i}: ", name, tokens)
            except Exception as error:
                failed.append(error)
                return
            with lock:
                found.tokens += len(made)
                found.first.append(first)

    threads = [threading.Thread(target=client, args=(c,)) for c in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds += time.perf_counter() - started
    found.loads += metric(address, "lora_pool_loads_total") - before
    if failed:
        raise failed[0]


def load_test(address: str, clients: int, out: Path, short: bool) -> list[Round]:
    """Let the clients send requests for each number of adapters, forwards and backwards through the numbers, so that
    other programs slow all of them alike. Print the table, draw it and return it."""
    counts, requests, tokens = ((0, 1, 4), 1, 8) if short else ((0, 1, 4, 8, 16, 32), 2, 32)
    run_round(address, clients, Round(0), 1, 8)  # warms up
    rounds = [Round(n) for n in counts]
    for each in (*rounds, *reversed(rounds)):
        run_round(address, clients, each, requests, tokens)
    print_table(rounds, clients)
    print(f"the picture: {plot(rounds, clients, out / 'load_test.png')}")
    return rounds


def print_table(rounds: list[Round], clients: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("adapters", title=f"{clients} clients, each request with an adapter of its own", title_justify="left")
    for column in ("tokens/s", "of the base", "first token, median", "slowest", "loads"):
        table.add_column(column, justify="right")
    for each in rounds:
        table.add_row(
            str(each.adapters) if each.adapters else "the base alone",
            f"{each.rate:,.0f}",
            f"{each.rate / rounds[0].rate:.2f}",
            f"{1e3 * statistics.median(each.first):.0f} ms",
            f"{1e3 * max(each.first):.0f} ms",
            f"{each.loads:.0f}",
        )
    Console().print(table)


def plot(rounds: list[Round], clients: int, path: Path) -> Path:
    """Draw tokens per second and the time to the first token over the number of adapters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from _report import STYLE, UPRIGHT

    path.parent.mkdir(parents=True, exist_ok=True)
    names = [str(each.adapters) if each.adapters else "base" for each in rounds]
    places = range(len(rounds))
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
        left.bar(places, [each.rate for each in rounds], color=["#a0aec0"] + [UPRIGHT] * (len(rounds) - 1), width=0.65)
        left.set(ylabel="tokens per second", ylim=(0, None))
        firsts = [[1e3 * each for each in found.first] for found in rounds]
        right.boxplot(firsts, positions=places, widths=0.5, medianprops={"color": UPRIGHT}, flierprops={"marker": "."})
        right.set(ylabel="time to the first token, ms", ylim=(0, None))
        for axes in (left, right):
            axes.set_xticks(list(places), names)
            axes.set_xlabel("adapters in use")
            axes.grid(visible=False, axis="x")
            axes.set_axisbelow(True)
        figure.suptitle(f"One model, {clients} clients, an adapter for each request", fontsize=13, fontweight="bold")
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path
