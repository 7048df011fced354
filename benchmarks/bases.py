"""Times of PEFT's layers over the quantised bases of other packages, on the CPU. Run it from the checkout:

    python -m benchmarks.bases [--rounds N] [--size N K R] [--json] [--out benchmarks/results/bases/DATE-MACHINE.json]
    python -m benchmarks.bases --table

Each base is measured with PEFT's own layer, with the fused layer over its codes, and with the fused layer around its
own forward: a forward of one row in inference mode, and a training step of 512 rows. The variants of a base take turns,
so the ratios say more than the times. A package that is not installed is left out, with a note. ``--table`` measures
nothing, and writes the newest run on record into docs/bases.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_kernels
from benchmarks.closing import close
from lora_kernels.peft import codes
from lora_kernels.testing import documents, timing
from lora_kernels.testing.terminal import terminal

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "bases.md", ROOT / "benchmarks" / "results" / "bases"
SIZE = (4096, 4096, 16)
DECODE, TRAINING = 1, 512
PEFT, OVER, AROUND = "PEFT", "over the codes", "around the base"
Make = Callable[[int, int, torch.dtype], nn.Module]


def _torchao(config: str, group: int = 0) -> Make:
    def make(N: int, K: int, dtype: torch.dtype) -> nn.Module:
        quantization = importlib.import_module("torchao.quantization")
        granularity = importlib.import_module("torchao.quantization.granularity")
        given = {"granularity": granularity.PerGroup(group)} if group else {}
        holder = nn.Sequential(nn.Linear(K, N, bias=False, dtype=dtype))
        quantization.quantize_(holder, getattr(quantization, config)(**given))
        return holder[0]

    return make


def _nf4(N: int, K: int, dtype: torch.dtype) -> nn.Module:
    base = nn.Linear(K, N, bias=False, dtype=dtype)
    to_nf4 = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor").to_nf4
    base.weight = nn.Parameter(to_nf4(base.weight.data), requires_grad=False)
    return base


def _hqq(bits: int) -> Make:
    def make(N: int, K: int, dtype: torch.dtype) -> nn.Module:
        module = importlib.import_module("hqq.core.quantize")
        module.HQQLinear.set_backend(module.HQQBackend.PYTORCH)
        config = module.BaseQuantizeConfig(nbits=bits, group_size=64)
        config["weight_quant_params"]["optimize"] = False  # the search for better zeros takes minutes, and no part here
        layer: nn.Module = module.HQQLinear(nn.Linear(K, N, bias=False), config, compute_dtype=dtype, device="cpu")
        return layer

    return make


def _gptq(module: str, name: str, bits: int) -> Make:
    def make(N: int, K: int, dtype: torch.dtype) -> nn.Module:
        kind = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
        layer: Any = kind(
            bits=bits, group_size=128, sym=True, desc_act=False, in_features=K, out_features=N, bias=False,
            register_buffers=True,
        )  # fmt: skip
        for words in (layer.qweight, layer.qzeros):
            words.copy_(torch.randint(-(2**31), 2**31, words.shape).to(torch.int32))
        layer.scales.fill_(0.5 / math.sqrt(K) / 2 ** (bits - 1))
        layer.post_init()
        made: nn.Module = layer
        return made

    return make


BASES: dict[str, tuple[str, tuple[str, str], Make]] = {
    "torchao int8, by rows": ("torchao", ("torchao", "TorchaoLoraLinear"), _torchao("Int8WeightOnlyConfig")),
    "torchao int8, groups of 64": ("torchao", ("torchao", "TorchaoLoraLinear"), _torchao("Int8WeightOnlyConfig", 64)),
    "torchao NF4Tensor": ("torchao", ("layer", "Linear"), _nf4),
    "HQQ, 8 bits": ("hqq", ("hqq", "HqqLoraLinear"), _hqq(8)),
    "HQQ, 4 bits": ("hqq", ("hqq", "HqqLoraLinear"), _hqq(4)),
    "GPTQ, 8 bits": ("gptqmodel", ("gptq", "GPTQLoraLinear"), _gptq("torch", "TorchLinear", 8)),
    "GPTQ, 4 bits": ("gptqmodel", ("gptq", "GPTQLoraLinear"), _gptq("torch", "TorchLinear", 4)),
    "AWQ, 4 bits": ("gptqmodel", ("awq", "AwqLoraLinear"), _gptq("torch_awq", "AwqTorchLinear", 4)),
}
"""The bases: the package, PEFT's class, and how a layer is made."""


def variants(name: str, N: int, K: int, R: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return PEFT's layer over a base, and the two fused ones, with the same adapter over the same base."""
    from peft import LoraConfig

    _, (module, kind), make = BASES[name]
    torch.manual_seed(0)
    base = make(N, K, dtype)
    found = {}
    for which in (PEFT, OVER, AROUND):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao's merge needs what a model of transformers has
            cls = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), kind)
            layer = cls(base, "default", config=LoraConfig(r=R, lora_alpha=R), r=R, lora_alpha=R)
        with torch.no_grad():
            torch.manual_seed(1)
            for letter in "AB":
                weight = getattr(layer, f"lora_{letter}")["default"].weight
                weight.data = (torch.randn_like(weight) / math.sqrt(weight.shape[1])).to(torch.float32)
        model = nn.Sequential(layer)
        if which != PEFT:
            with _only_around() if which == AROUND else warnings.catch_warnings():
                report = lora_kernels.fuse(model, strict=True)
            assert ("around" in report.fused["0"]) == (which == AROUND), report.fused
        found[which] = model
    return found


class _only_around:
    """A context in which no codes are read."""

    def __enter__(self) -> None:
        self.kept = codes.class_for
        codes.class_for = lambda kind, layer: None

    def __exit__(self, *_: object) -> None:
        codes.class_for = self.kept


def _step(model: nn.Module, x: Tensor, dy: Tensor | None) -> Callable[[], object]:
    if dy is None:
        return torch.inference_mode()(lambda: model(x))

    def train() -> None:
        x.grad = None
        model.zero_grad()
        model(x).backward(dy)

    return train


def _fault(models: dict[str, nn.Module], x: Tensor) -> str:
    """Return how far the fused layers are from PEFT's, "" where they are near."""
    with torch.no_grad():
        want = models[PEFT](x).double()
        for name in (OVER, AROUND):
            off = ((models[name](x).double() - want).norm() / want.norm()).item()
            if not off < 4 * torch.finfo(torch.bfloat16).eps:
                return f"{name} differs from PEFT by {off:.3g} of its norm"
    return ""


def measure(size: tuple[int, int, int], rows: tuple[int, ...], rounds: int, show: Any) -> dict[str, Any]:
    """Return the document for layers of `size` (N, K, R) and each number of `rows` of x."""
    N, K, R = size
    document = documents.begin(torch.device("cpu"), ("torch", "peft", "torchao", "hqq", "gptqmodel")) | {
        "size": {"N": N, "K": K, "R": R},
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "notes": [],
        "gate": [],
        "rows": [],
    }
    there = [name for name, (package, *_) in BASES.items() if importlib.util.find_spec(package) is not None]
    absent = sorted({BASES[name][0] for name in BASES if name not in there})
    document["notes"] += [f"{package} is not installed, and its bases are left out" for package in absent]
    with show.progress(len(there) * 2 * len(rows) * rounds) as advance:
        for name in there:
            for dtype in (torch.float32, torch.bfloat16):
                models = variants(name, N, K, R, dtype)
                fault = _fault(models, torch.randn(4, K).to(dtype))
                short = "fp32" if dtype == torch.float32 else "bf16"
                document["gate"].append({"name": f"{name} {short}", "faults": [fault] if fault else []})
                for M in rows:
                    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype) if M != DECODE else None
                    x.requires_grad_(dy is not None)
                    steps = {which: [_step(model, x, dy)] for which, model in models.items()}
                    tell = functools.partial(advance, f"{name} {short}, M = {M}", 1)
                    taken = timing.interleave(OVER, steps, rounds, timing.CpuTimer(), tell)
                    if not fault:
                        document["rows"].append(
                            {
                                "base": name,
                                "dtype": short,
                                "M": M,
                                "seconds": {which: timing.quartiles(taken.seconds(which)) for which in steps},
                                "over": timing.quartiles(taken.ratios(OVER, PEFT)),
                                "around": timing.quartiles(taken.ratios(AROUND, PEFT)),
                            }
                        )
    return document


def table(document: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Return the table (title, header, rows)."""
    size = document["size"]
    rows = [
        [
            f"{row['base']}, {row['dtype']}",
            str(row["M"]),
            f"{row['seconds'][PEFT][1] * 1e3:.3g} ms",
            f"{row['seconds'][OVER][1] * 1e3:.3g} ms",
            f"×{row['over'][1]:.3f}",
            f"×{row['around'][1]:.3f}",
        ]
        for row in document["rows"]
    ]
    title = f"{size['K']}→{size['N']}, r{size['R']}; M = 1: forward, else forward + backward"
    return title, ["base", "M", PEFT, OVER, f"{OVER} / PEFT", f"{AROUND} / PEFT"], rows


def rendered(page: str, document: dict[str, Any]) -> str:
    """Return the page with its measured table made anew, between two markers."""
    first, last = "<!-- bases:begin -->", "<!-- bases:end -->"
    head, _, rest = page.partition(first)
    _, _, tail = rest.partition(last)
    title, header, rows = table(document)
    device = document["device"]
    machine = f"{device['name']} ({device['isa']}), {device['threads']} threads, torch {document['versions']['torch']}"
    lines = [header, ["---"] * len(header), *rows]
    told = f"{title}. {machine}, {document['date'][:10]}, medians of {document['rounds']} interleaved rounds:"
    notes = "".join(f"\n\nIn this run {note}." for note in document["notes"])
    text = "\n".join([told, "", *(f"| {' | '.join(row)} |" for row in lines)]) + notes
    return f"{head}{first}\n{text}\n{last}{tail}"


def newest() -> dict[str, Any]:
    """Return the newest run on record."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    return max(runs, key=lambda run: run["date"])


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return 1 if a fused layer differs from PEFT's, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument(
        "--size", type=int, nargs=3, default=SIZE, metavar=("N", "K", "R"), help="default: 4096 4096 16"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON to write")
    parser.add_argument("--table", action="store_true", help="measure nothing: write docs/bases.md's table")
    args = parser.parse_args(argv)
    if args.table:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), newest()), encoding="utf-8")
        return 0
    if args.rounds < 1 or min(args.size) < 1:
        parser.error(f"--rounds and --size must be at least 1, got {args.rounds} and {args.size}")
    show = terminal()
    document = measure(tuple(args.size), (DECODE, TRAINING), args.rounds, show)
    show.table(*table(document), words=True)
    if args.json:
        print(json.dumps(document))
    return close(document, args.out, show)


if __name__ == "__main__":
    raise SystemExit(main())
