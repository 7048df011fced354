"""README.md and docs/measuring.md show the newest runs in benchmarks/results, with links that hold from each page."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType

import pytest
from support import measured_pages
from support.measured_pages import page_of_measurements, put
from support.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def script() -> ModuleType:
    return measured_pages.load_script()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return measured_pages.checkout(tmp_path / "checkout")


def document(kind: str = ".") -> dict:
    """The newest run on record of a kind, on a CPU."""
    documents = [json.loads(path.read_text()) for path in (RESULTS / kind).glob("*.json")]
    return max((each for each in documents if each["device"]["type"] == "cpu"), key=lambda each: each["date"])


def test_both_pages_are_written_and_checked(script, root, capsys):
    run = document()
    newest = put(root, "2030-01-01-a.json", run, png=True)
    put(root, "2031-01-01-b.json", run | {"date": "2020-01-01T00:00:00+00:00"})
    words = ["--root", str(root)]
    assert script.main([*words, "--check"]) == 1
    said = capsys.readouterr().out
    assert "README.md is stale" in said and "docs/measuring.md is stale" in said
    assert script.main(words) == 0 == script.main([*words, "--check"])
    readme, measuring = ((root / name).read_text() for name in ("README.md", "docs/measuring.md"))
    for text in (readme, measuring):
        assert text.startswith("# before\n") and text.endswith("after\n") and "old" not in text
    assert f"]({script.links.FILES}benchmarks/results/2030-01-01-a.json)" in readme
    assert f"]({script.links.PICTURES}benchmarks/results/2030-01-01-a.png)" in readme
    assert "](../benchmarks/results/2030-01-01-a.json)" in measuring
    assert "](../benchmarks/results/2030-01-01-a.png)" in measuring
    cells = [e for e in run["timings"] if (e["shape"], e["p"], e["pass"]) == ("gpt2-mlp-up", 0.1, "forward + backward")]
    mine = next(e for e in cells if e["automatic"])
    assert f"gpt2-mlp-up: {run['shapes']['gpt2-mlp-up']['size']}" in measuring
    assert f"**×{mine['ratio'][1]:.2f}** (`{mine['backend']}`)" in measuring
    newest.unlink()
    assert script.main([*words, "--check"]) == 1, "another run is the newest now"


def test_the_numbers_of_readme_are_those_of_the_documents(script, root):
    run, quantised = document(), document("quantised")
    put(root, "a.json", run)
    put(root, "quantised/b.json", quantised)
    assert script.main(["--root", str(root)]) == 0
    lines = (root / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "benchmarks/results" in line]
    assert len(rows) == 3
    timings = [e for e in run["timings"] if (e["shape"], e["p"]) == ("gpt2-mlp-up", 0.1)]
    ours = next(e for e in timings if e["automatic"] and e["pass"] == "forward + backward")
    peft = next(e for e in timings if e["variant"] == "PEFT" and e["pass"] == "forward + backward")
    assert rows[0][1:3] == [f"**×{ours['ratio'][1]:.2f}**", f"×{peft['ratio'][1]:.2f}"]
    memory = {m["variant"]: m for m in run["memory"] if (m["shape"], m["p"]) == ("gpt2-mlp-up", 0.1)}
    saved = [f"{memory[name]['saved_bytes'] / 2**20:.1f} MiB" for name in (ours["variant"], "PEFT")]
    assert rows[1][1:3] == [f"**{saved[0]}**", saved[1]]
    steps = {row["name"]: row["seconds"][1] * 1e3 for row in quantised["rows"] if row["M"] == 1}
    mine, theirs = (
        [f"{steps[f'{name} {d}']:.2f}" for d in ("bf16", "fp32")] for name in ("nf4", "PEFT + bitsandbytes")
    )
    assert rows[2][1:3] == [f"**{' / '.join(mine)} ms**", f"{' / '.join(theirs)} ms"]
    for row, measured in zip(rows, (run, run, quantised), strict=True):
        assert f"{measured['device']['name']}, {measured['device']['threads']} threads" in row[3]


def test_quantised_layers_and_generation_have_their_tables(root):
    quantised = document("quantised")
    put(root, "quantised/a.json", quantised)
    put(root, "generation/a.json", document("generation"))
    text = page_of_measurements(root)
    entry = quantised["memory"][-1]
    assert f"({entry['name']}, M = {entry['M']}; ≤ {entry['most']:.0f}" in text
    assert "**nf4 fp32**" in text and "(../benchmarks/results/quantised/a.json)" in text
    assert "| **apply_lora(quant=" in text and "(../benchmarks/results/generation/a.json)" in text
    assert "No run on record yet" in text, "there is no run of the bench"


def test_a_run_without_peft_has_no_number(script, root):
    run = copy.deepcopy(document())
    run["timings"] = [entry for entry in run["timings"] if entry["variant"] != "PEFT"]
    run["memory"] = [entry for entry in run["memory"] if entry["variant"] != "PEFT"]
    put(root, "a.json", run)
    assert script.main(["--root", str(root)]) == 0
    assert "No run on record yet" in (root / "README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "docs/measuring.md"])
def test_a_page_without_its_markers_is_an_error(name, script, root, capsys):
    (root / name).write_text("# before\n")
    assert script.main(["--root", str(root)]) == 1
    assert f"{name} needs one line" in capsys.readouterr().out


def test_the_pages_are_fresh(script):
    assert script.main(["--check"]) == 0
