"""The sweep over ranks and choices of weights, for README.md and docs/ranks.md."""

from __future__ import annotations

import statistics
from typing import Any

from readme_tables import Run, Runs, markdown

NO_RUN = "No run on record yet: `python examples/rank_sweep.py --record`, then `python scripts/update_readme.py`."


def short(runs: Runs) -> str:
    """Return the picture with two lines: the accuracy of each choice of weights at equal cost, and from the lowest to
    the highest rank."""
    return "\n".join(map(_short, runs["ranks"][:1])) or NO_RUN


def _short(run: Run) -> str:
    cost, page = run.document["equal"]["parameters"], run.link(run.root / "docs" / "ranks.md")
    equal = [point for point in run.document["points"] if _is_equal(run, point)]
    at_cost = ", ".join(f"{_mean(p):.0%} on {p['weights']} at rank {p['r']}" for p in equal)
    spans = ", ".join(
        f"{name} {_mean(points[0]):.0%} to {_mean(points[-1]):.0%}" for name, points in _by_weights(run).items()
    )
    low, high = (f(p["r"] for p in run.document["points"]) for f in (min, max))
    return "\n".join(
        [
            _picture(run),
            f"A small vision transformer on a new task: {cost:,} parameters reach {at_cost}.",
            f"From rank {low} to rank {high}: {spans}. {_cut(run)} [How to choose]({page}).",
        ]
    )


def _cut(run: Run) -> str:
    """Return a sentence about the update that was cut to a middle rank, beside the one that was trained at it."""
    cut = run.document["cut"]
    point = cut["points"][len(cut["points"]) // 2]
    beside = next(p for p in _by_weights(run)[cut["weights"]] if p["r"] == point["r"])
    return (
        f"Trained at rank {cut['from']} and cut to {point['r']} by `resize_adapter`, {cut['weights']} reach "
        f"{_mean(point):.0%}; trained at {point['r']}, {_mean(beside):.0%}."
    )


def full(runs: Runs) -> str:
    """Return the conditions, the picture and the tables of the sweep."""
    return "\n\n".join(map(_full, runs["ranks"][:1])) or NO_RUN


def _full(run: Run) -> str:
    document, setting = run.document, run.document["setting"]
    head = (
        f"`{document['command']}` on {run.machine()}, torch {document['versions']['torch']}, {document['date'][:10]} "
        f"([all numbers]({run.link()})): {setting['steps']} steps with batches of {setting['batch']}, AdamW with a "
        f"learning rate of {setting['rate']:g}, s = {setting['alpha']}/√r, mean and half the range of "
        f"{setting['seeds']} seeds. Without an adapter {setting['rotated']:.1%} of the rotated digits are right."
    )
    by_weights = _by_weights(run)
    ranks = sorted(set.intersection(*({p["r"] for p in points} for points in by_weights.values())))
    table = [[name, *(_told(p) for r in ranks for p in points if p["r"] == r)] for name, points in by_weights.items()]
    cut = document["cut"]
    own = {p["r"]: _told(p) for p in cut["points"]}
    table.append([f"{cut['weights']}, cut from {cut['from']}", *(own.get(r, "") for r in ranks)])
    rows = [
        [p["weights"], str(p["r"]), f"{p['parameters']:,}", _told(p)] for p in document["points"] if _is_equal(run, p)
    ]
    cost = f"at most {document['equal']['parameters']:,} parameters"
    return "\n\n".join(
        [
            head,
            _picture(run),
            markdown(["weights", *(f"r {r}" for r in ranks)], table),
            markdown([cost, "rank", "parameters", "accuracy"], rows),
        ]
    )


def _by_weights(run: Run) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for point in run.document["points"]:
        found.setdefault(point["weights"], []).append(point)
    return found


def _is_equal(run: Run, point: dict[str, Any]) -> bool:
    return bool(run.document["equal"]["ranks"][point["weights"]] == point["r"])


def _mean(point: dict[str, Any]) -> float:
    return statistics.fmean(point["accuracies"])


def _told(point: dict[str, Any]) -> str:
    values = point["accuracies"]
    return f"{_mean(point):.1%} ± {50 * (max(values) - min(values)):.1f}"


def _picture(run: Run) -> str:
    text = "Accuracy by rank and by trained parameters, for four choices of weights"
    return f"![{text}]({run.link(run.path.with_suffix('.png'))})"
