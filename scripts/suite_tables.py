"""The tables and the picture of a suite of the bench that has cells of its own."""

from __future__ import annotations

from typing import Any

from readme_tables import Run, markdown


def of_run(run: Run, report: Any, picture: str, targets: str, floor: str) -> str:
    """Return what a page shows of a run: the machine, the picture, the tables that `report` makes, a sentence on
    `targets`, and how far the layer `floor` differs from itself."""
    document = run.document
    device, versions = document["device"], document["versions"]
    peft = f", PEFT {versions['peft']}" if versions["peft"] else ""
    checks = [check["green"] for check in document["gate"]]
    parts = [
        f"**{device['name']} ({device['isa']}), {device['threads']} threads**, torch {versions['torch']}{peft}, "
        f"{document['date'][:10]}, median of {document['rounds']} interleaved rounds ([all numbers]({run.link()})). "
        f"Every number stands behind a check against fp64 in the same run: {sum(checks)} of {len(checks)} were right."
    ]
    if (drawn := run.path.with_suffix(".png")).exists():
        parts.append(f"![{picture}]({run.link(drawn)})")
    for title, header, rows in report.tables(document):
        ours = header.index("ours") if "ours" in header else None
        bold = [[f"**{cell}**" if i == ours else cell for i, cell in enumerate(row)] for row in rows]
        parts += [f"{title}:", markdown(header, bold)]
    noise = [entry["ratio"] for entry in document["noise"]]
    parts.append(targets)
    parts.append(
        f"{floor} measured against itself in the same way (widest quartiles of all cells): "
        f"×{min(r[0] for r in noise):.2f} to ×{max(r[2] for r in noise):.2f}."
    )
    return "\n\n".join(parts)
