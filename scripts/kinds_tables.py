"""The tables of layers that are no plain linear ones, for README.md and docs/measuring.md."""

from __future__ import annotations

import suite_tables
from many_tables import THEN
from readme_tables import Run, Runs

from lora_kernels.bench.kinds import report
from lora_kernels.bench.kinds.cells import OURS, PEFT

NO_RUN = f"No run on record yet: `python -m lora_kernels bench --suite kinds --plot`, {THEN}"


def layers(runs: Runs) -> str:
    return "\n\n".join(map(_layers, runs["kinds"][:1])) or NO_RUN


def _layers(run: Run) -> str:
    met, count = report.counted(run.document)
    targets = f"{met} of {count} targets are met."
    return suite_tables.of_run(
        run, report, "Layers with an adapter, over the frozen layer", targets, "The frozen layer"
    )


def number(run: Run) -> tuple[str, str, str] | None:
    """Return what is measured, our numbers and PEFT's: the first row of each kind that both ways have."""
    timings = {(e["cell"], e["way"]): e for e in run.document["timings"]}
    found = {}
    for kind in report.kinds(run.document):
        names = [name for name, cell in run.document["cells"].items() if cell["kind"] == kind and cell["backward"]]
        name = next((name for name in names if {(name, OURS), (name, PEFT)} <= timings.keys()), None)
        if name is not None:
            found[kind] = [f"×{timings[name, way]['ratio'][1]:.2f}" for way in (OURS, PEFT)]
    if not found:
        return None
    ours, theirs = zip(*found.values(), strict=True)
    kinds = " / ".join(found)
    what = f"The same for other layers: {kinds} ([tables](docs/measuring.md#other-kinds-of-layers))"
    return what, " / ".join(ours), " / ".join(theirs)
