"""Put the results of gpu_check.py into the checkout: README's table, the pictures, and the evidence that is shipped.

    python scripts/gpu_report.py [--check] RESULT ...

Each RESULT is a file that gpu_check.py has written, or its folder: `evidence.json` of verify, and `llama.json` and
`sweep.json` of the bench. Results that were measured with other kernels than those of this checkout are refused, and so
are those without verdicts on the kernels of their GPU.

``--check`` changes nothing: the exit status is 1 if the checkout does not hold what the results give.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "csrc"))

import native_nvcc
import update_readme

from lora_kernels.bench import plot
from lora_kernels.evidence import file, find, identity
from lora_kernels.evidence.file import Evidence, Unreadable
from lora_kernels.testing import machine

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("llama", "sweep")
"""The suites of the bench whose documents are kept."""
NAMES = ("evidence.json", *(f"{suite}.json" for suite in SUITES))
"""The files that are taken from a folder."""


class Refused(ValueError):
    """A result cannot be shown."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="a file or a folder of gpu_check.py")
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if something is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md and benchmarks/results")
    args = parser.parse_args(argv)
    try:
        places = dict(_places(args.results, args.root))
    except (OSError, Refused) as error:
        print(f"✗ {error}")
        return 1
    stale = [place for source, place in places.items() if not (place.exists() and filecmp.cmp(source, place, False))]
    if args.check:
        for place in stale:
            print(f"{place.relative_to(args.root)} is stale: run python scripts/gpu_report.py")
        return max(int(bool(stale)), update_readme.main(["--root", str(args.root), "--check"]))
    for source, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
        print(f"Written: {place.relative_to(args.root)}")
        if place.parent.name == "gpu":
            _draw(place)
    return update_readme.main(["--root", str(args.root)])


def _places(results: Sequence[Path], root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield every result with its place in the checkout. Raises Refused for one that cannot be shown."""
    files = [path for result in results for path in ([result] if result.is_file() else _inside(result))]
    evidence = {path: found for path in files if (found := _evidence(path))}
    judged = {each.identity for each in evidence.values()}
    for path, found in evidence.items():
        name = find.cache_path(found.identity).name.removeprefix("evidence-")
        yield path, root / find.SHIPPED.relative_to(ROOT) / name
    for path in files:
        if path not in evidence:
            document = json.loads(path.read_text(encoding="utf-8"))
            _judge(path, document, judged)
            name = f"{document['date'][:10]}-{machine.kind(document['device'])}-{document['suite']}.json"
            yield path, root / "benchmarks" / "results" / "gpu" / name


def _inside(folder: Path) -> list[Path]:
    found = [folder / name for name in NAMES if (folder / name).exists()]
    if not found:
        raise Refused(f"{folder}: there is no {', no '.join(NAMES)}")
    return found


def _evidence(path: Path) -> Evidence | None:
    """Return the evidence in a file, or None if the file is a document of the bench."""
    if "content" not in json.loads(path.read_text(encoding="utf-8")):
        return None
    try:
        found = file.read(path)
    except Unreadable as error:
        raise Refused(f"{path}: {error}") from error
    if not found.verdicts:
        raise Refused(f"{path}: it has no verdicts on kernels; run lora_kernels verify on that machine")
    _same_kernels(path, found.identity)
    return found


def _judge(path: Path, document: dict[str, Any], judged: set[identity.Identity]) -> None:
    """Raise Refused for a document of the bench that cannot be shown."""
    if document.get("suite") not in SUITES or not document.get("identity"):
        raise Refused(f"{path}: it is no run of the suites {' and '.join(SUITES)} on a GPU")
    here = identity.Identity(**document["identity"])
    _same_kernels(path, here)
    if not document["timings"]:
        raise Refused(f"{path}: it has no times")
    if here not in judged:
        raise Refused(f"{path}: there are no verdicts: add the evidence.json that verify wrote on that machine")


def _same_kernels(path: Path, there: identity.Identity) -> None:
    """Raise Refused where the kernels are not those of this checkout."""
    states = [(there.sources, identity.source_hash(), "the kernels' Python sources")]
    if there.extension is not None:
        states.append((there.extension.split()[0], native_nvcc.source_hash(), "csrc/cuda"))
    for then, now, what in states:
        if then != now:
            raise Refused(f"{path}: it was measured with state {then} of {what}, and this checkout has {now}")


def _draw(path: Path) -> None:
    try:
        plot.draw_all(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png"))
    except ImportError as error:
        print(f"No picture: {error} (pip install matplotlib)")


if __name__ == "__main__":
    sys.exit(main())
