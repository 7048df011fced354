"""Times of other projects' LoRA layers beside this package's, on the CPU. Run it from the checkout:

    python -m benchmarks.peers [--rounds N] [--out benchmarks/results/peers/DATE-MACHINE.json] [--table]

Measured are PEFT, axolotl, unsloth, torchtune and nemo-automodel, as far as they are installed
(`benchmarks.peers_layers` says what of each). They need no GPU and few of their own dependencies for this, so
``pip install --no-deps`` serves. All run in one process on the same operands, interleaved, and each stands behind two
checks in the same run: without dropout its values and gradients against the equation in fp64, and with dropout that
forward and backward use one mask, scaled by 1/(1 - p). ``--table`` writes the newest run on record into
docs/comparison.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers_layers, peers_plot
from benchmarks.closing import close
from lora_kernels.bench import layers, memory
from lora_kernels.bench.layers import Task
from lora_kernels.bench.peers import faults
from lora_kernels.bench.shapes import BACKWARD, Shape
from lora_kernels.testing import documents, judge, timing
from lora_kernels.testing.judge import Problem
from lora_kernels.testing.terminal import terminal

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "comparison.md"
FLOOR, OURS, FUSED = "F.linear", "FusedLoRALinear", "PEFT, fused"
SHAPES = (
    Shape("512×768→768 r8", 512, 768, 768, 8, bias=False),
    Shape("1024×2048→2048 r16", 1024, 2048, 2048, 16, bias=False),
    Shape("2048×768→3072 r16", 2048, 768, 3072, 16, bias=False),
    Shape("512×2048→2048 r16", 512, 2048, 2048, 16, torch.bfloat16, bias=False),
    Shape("512×2048→2048 r16", 512, 2048, 2048, 16, torch.bfloat16, torch.float32, bias=False),
)
"""The layers. None has a bias of the base, which unsloth's function does not take."""
SIDE = 48
"""The size of the layer on which masks are looked at."""

Build = Callable[[Problem], Task]


def measure(
    shapes: Sequence[Shape], ps: Sequence[float], rounds: int, show: Any, peers: Sequence[peers_layers.Peer]
) -> dict[str, Any]:
    """Return the document: for each shape and p the judge's finding on every layer, and the times of those without a
    fault."""
    document = documents.begin(torch.device("cpu"), ("torch",)) | {
        "peers": {peer.name: peer.version for peer in peers},
        "rounds": rounds,
        "notes": [],
        "gate": [],
        "timings": [],
    }
    builds: dict[str, Build] = {FLOOR: layers.frozen, OURS: layers.fused(None)}
    builds |= {peer.name: peer.build for peer in peers}
    if any(peer.name == "PEFT" for peer in peers):
        builds[FUSED] = layers.peft_fused
    with show.progress(len(shapes) * len(ps) * rounds) as advance:
        for shape in shapes:
            for p in ps:
                _measure_cell(
                    document, builds, shape, p, rounds, functools.partial(advance, f"{shape.size}, p = {p:g}")
                )
    return document


def _measure_cell(
    document: dict[str, Any], builds: dict[str, Build], shape: Shape, p: float, rounds: int, advance: Any
) -> None:
    """Judge every layer on one shape and p, and time those that are right."""
    q = shape.problem(p, torch.device("cpu"))
    steps = {FLOOR: [layers.step(layers.frozen(q), q, BACKWARD)]}
    want = judge.truth(q) if not p else {}
    for name, build in builds.items():
        if name == FLOOR:
            continue
        found = _faults(build, q, want)
        own = name in (OURS, FUSED)
        document["gate"].append({"name": name, "shape": shape.size, "p": p, "faults": found if own else []})
        if found and not own:
            document["notes"].append(f"{name} is not measured on {shape.size}, p = {p:g}: {'; '.join(found)}")
        if not found:
            steps[name] = [layers.step(build(q), q, BACKWARD)]
    taken = timing.interleave(FLOOR, steps, rounds, timing.CpuTimer(), functools.partial(advance, 1))
    for name in steps:
        document["timings"].append(
            {
                "name": name,
                "shape": shape.size,
                "p": p,
                "seconds": timing.quartiles(taken.seconds(name)),
                "ratio": timing.quartiles(taken.ratios(name, FLOOR)),
                "saved_bytes": memory.saved_bytes(builds[name](q), q),
            }
        )


def _faults(build: Build, q: Problem, want: dict[str, Tensor]) -> list[str]:
    """Return why a layer is not measured: its results without dropout are not those of the equation, its mask is wrong,
    or it raises."""
    try:
        return mask_faults(build, q) if q.p else faults(layers.results(build(q), q), want)
    except Exception as error:  # another project's layer may fail in any way
        return [f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"]


def mask_faults(build: Build, q: Problem) -> list[str]:
    """Return what is wrong with a layer's dropout at the p and dtypes of `q`, in sentences.

    With x = 1, W = 0 and A = B = I of size R, y is s·keep/(1 - p): it shows the mask. The gradients then must be
    dx = dy ⊙ y and da = dyᵀ y, with the mask of the same call.
    """
    eye, ones = torch.eye(SIDE), torch.ones(4 * SIDE, SIDE)
    dtype, adapters = q.x.dtype, q.a.dtype
    dy = torch.randn(ones.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    small = Problem(
        ones.to(dtype), torch.zeros(SIDE, SIDE, dtype=dtype), eye.to(adapters), eye.to(adapters), None, dy, 1.0, q.p,
        torch.tensor(7),
    )  # fmt: skip
    got = layers.results(build(small), small)
    y, kept = got["y"], 1 / (1 - q.p)
    assert y is not None
    y = y.double()
    found = []
    part = float((y == 0).double().mean())
    spread = 4 * (q.p * (1 - q.p) / y.numel()) ** 0.5
    if abs(part - q.p) > spread:
        found.append(f"{100 * part:.1f}% of x are dropped")
    if not torch.allclose(y[y != 0], torch.tensor(kept, dtype=y.dtype), rtol=1e-2):
        found.append(f"what is kept is not scaled by 1/(1 - p) = {kept:.4g}")
    exact = {"dx": dy.double() * y, "da": dy.double().t() @ y, "db": dy.double().t() @ y}
    return found + faults({name: got[name] for name in exact}, exact)


def tables(document: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return tables (title, header, rows) for each p, of forward + backward and of the bytes that are saved: a row for
    each layer, a column for each project."""
    names = list(dict.fromkeys(entry["name"] for entry in document["timings"]))
    header = ["layer", *(f"{name} {document['peers'].get(name, '')}".strip() for name in names)]
    found = []
    for p in dict.fromkeys(entry["p"] for entry in document["timings"]):
        cells: dict[str, dict[str, Any]] = {}
        for entry in document["timings"]:
            if entry["p"] == p:
                cells.setdefault(entry["shape"], {})[entry["name"]] = entry
        for title, text in (("Forward + backward", _time), ("Saved for the backward, with x, in MiB", _saved)):
            rows = [[shape, *(text(cell[n]) if n in cell else "–" for n in names)] for shape, cell in cells.items()]
            found.append((f"{title}, dropout {p:g}", header, rows))
    return found


def _time(entry: dict[str, Any]) -> str:
    """Return the time of the frozen layer, and the ratio to it of any other."""
    if entry["name"] == FLOOR:
        return f"{entry['seconds'][1] * 1e3:.3g} ms"
    return f"×{entry['ratio'][1]:.2f}"


def _saved(entry: dict[str, Any]) -> str:
    return f"{entry['saved_bytes'] / 2**20:.1f}"


def rendered(page: str, run: tuple[dict[str, Any], Path] | None) -> str:
    """Return the page with its picture and its measured tables made anew, between two markers."""
    first, last = "<!-- peers:begin -->", "<!-- peers:end -->"
    head, _, rest = page.partition(first)
    _, _, tail = rest.partition(last)
    if run is None:
        text = "No run on record yet: `python -m benchmarks.peers --out FILE`, then `--table`."
    else:
        document, path = run
        device = document["device"]
        machine = f"{device['name']} ({device['isa']}), {device['threads']} threads"
        parts = [
            f"{machine}, torch {document['versions']['torch']}, {document['date'][:10]}, "
            f"median of {document['rounds']} interleaved rounds. × is the ratio to the frozen layer in the same round."
        ]
        if (picture := path.with_suffix(".png")).exists():
            parts.append(
                f"![Forward + backward of each project, on {machine}](../benchmarks/results/peers/{picture.name})"
            )
        for title, header, rows in tables(document):
            lines = [header, ["---"] * len(header), *rows]
            parts.append("\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)]))
        text = "\n\n".join([*parts, *(f"- {note}" for note in document["notes"])]).replace("\n\n- ", "\n- ")
        text = text.replace("\n- ", "\n\n- ", 1)
    return f"{head}{first}\n{text}\n{last}{tail}"


def newest() -> tuple[dict[str, Any], Path] | None:
    """Return the newest run on record and its path, or None."""
    paths = (ROOT / "benchmarks" / "results" / "peers").glob("*.json")
    runs = [(json.loads(path.read_text(encoding="utf-8")), path) for path in paths]
    return max(runs, key=lambda run: run[0]["date"], default=None)


def main(argv: list[str] | None = None) -> int:
    """Run the command. Return 1 if a layer of this package is wrong, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="default: 15")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON to write, and a PNG beside it")
    parser.add_argument("--table", action="store_true", help="measure nothing: write docs/comparison.md's tables")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.table:
        PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), newest()), encoding="utf-8")
        return 0
    show = terminal()
    peers, notes = peers_layers.load()
    document = measure(SHAPES, (0.0, 0.1), args.rounds, show, peers)
    document["notes"] = notes + document["notes"]
    for table in tables(document):
        show.table(*table, words=True)
    if args.out and importlib.util.find_spec("matplotlib"):
        peers_plot.draw(document, FLOOR, (OURS, FUSED), args.out.with_suffix(".png"))
    return close(document, args.out, show)


if __name__ == "__main__":
    sys.exit(main())
