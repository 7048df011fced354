"""What docs/relora.md shows of the newest run of examples/pretrain_relora.py."""

from __future__ import annotations

from typing import Any

from readme_tables import Run, Runs, markdown

NO_RUN = (
    "No run on record yet: `python examples/pretrain_relora.py --seeds 3 --record`, then "
    "`python scripts/update_readme.py`."
)


def measured(runs: Runs) -> str:
    return "\n\n".join(map(_measured, runs["relora"][:1])) or NO_RUN


def _measured(run: Run) -> str:
    document = run.document
    settings, rows = document["settings"], {row["method"]: row for row in document["rows"]}
    count = len(document["starts"])
    seeds = f"{count} seeds, mean ± standard deviation" if count > 1 else "one seed"
    picture = "Perplexity over the steps, and the singular values of what a layer has learned"
    header = ["", "perplexity", "learning rate", "trained", "effective rank of ΔW", "σ > 1 % of σ₁", "a step"]
    return "\n\n".join(
        (
            f"**{run.machine()}**, torch {document['versions']['torch']}, {document['date'][:10]}, "
            f"{seeds} ([all numbers]({run.link()})). "
            f"{document['parameters']:,} parameters, {settings['warm_start']} steps of a warm start in full, then "
            f"{settings['steps']} steps with rank {settings['rank']}, a restart every {settings['every']}, and "
            f"{settings['warmup']} steps of warm-up after it.",
            f"![{picture}]({run.link(run.path.with_suffix('.png'))})",
            markdown(header, [_cells(row) for row in rows.values()]),
            _closed(rows),
        )
    )


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["method"],
        " ± ".join(f"{value:.2f}" for value in row["perplexity"]),
        f"{row['rate']:g}",
        f"{row['trained']:,}",
        f"{row['effective_rank']:.1f}",
        f"{row['above']:.1f}",
        f"{1e3 * row['seconds']:.1f} ms",
    ]


def _closed(rows: dict[str, dict[str, Any]]) -> str:
    """Return a sentence on how far each way comes from LoRA to the full rank, by the perplexity."""
    full, lora = (rows[name]["perplexity"][0] for name in ("full rank", "LoRA"))
    shares = {
        name: (lora - row["perplexity"][0]) / (lora - full)
        for name, row in rows.items()
        if name not in ("full rank", "LoRA")
    }
    told = ", ".join(f"{share:.0%} ({name})" for name, share in shares.items())
    return f"Of the distance from LoRA's perplexity to that of the full rank, each way covers: {told}."
