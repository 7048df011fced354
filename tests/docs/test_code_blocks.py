"""Every Python block of README and the documentation runs, and what a shell block names exists.

The blocks of one page run in order in one namespace and in an empty folder. `setup/<page>.py` runs first, if there is
one, and defines the names that the page takes for granted. A comment in front of a block may give a line to run before
it, ``<!-- run first: CODE -->``, or say why the block cannot run, ``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import continuous
from support.documentation import PAGES, ROOT, blocks, name_of

import lora_kernels

SETUP = Path(__file__).parent / "setup"
OPTIONAL = ("peft", "bitsandbytes", "transformers", "trl", "diffusers", "sentence_transformers", "torchao")
MOST_NOT_RUN = 1
"""The number of blocks that may be marked as not run."""


def with_blocks(language: str) -> list[Any]:
    return [pytest.param(page, id=name_of(page)) for page in PAGES if any(b.language == language for b in blocks(page))]


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [block for block in blocks(page) if block.language == "python" and block.not_run is None]
    setup = SETUP / f"{page.stem.lower()}.py"
    prepared = setup.read_text(encoding="utf-8") if setup.exists() else ""
    for package in OPTIONAL:
        asked = re.compile(rf"^\s*(import|from) {package}\b", re.MULTILINE)
        if any(asked.search(code) for code in (prepared, *(block.code for block in run))):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "documentation"}
    lacking = [block for block in run if "ContinuousBatchingConfig" in block.code and continuous.lacks()]
    run = [block for block in run if block not in lacking]
    exec(compile(prepared, str(setup), "exec"), namespace)
    try:
        for block in run:
            exec(block.first, namespace)
            code = "\n" * (block.line - 1) + block.code  # a traceback then has the page's line numbers
            exec(compile(code, str(page), "exec"), namespace)
    finally:
        if "peft" in sys.modules:
            lora_kernels.disable()  # what a page has enabled ends with it, also on an error
    if lacking:
        pytest.skip(f"all blocks but that of line {lacking[0].line} have run: {continuous.lacks()}")


def test_few_blocks_are_not_run() -> None:
    marked = [f"{name_of(page)}:{block.line}" for page in PAGES for block in blocks(page) if block.not_run]
    assert len(marked) <= MOST_NOT_RUN, marked


def test_every_fence_that_looks_like_python_says_so() -> None:
    wrong = [
        f"{name_of(page)}:{block.line}"
        for page in PAGES
        for block in blocks(page)
        if block.language not in ("python", "sh") and re.search(r"^(import|from) \w+", block.code, re.MULTILINE)
    ]
    assert not wrong


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page) if block.language == "sh" for line in block.code.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_make_targets_modules_and_files_of_shell_blocks_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, words
        if "-m" in words:
            assert importlib.util.find_spec(words[words.index("-m") + 1]), words
        for word in words:
            if re.search(r"\w/\w.*\.(py|sh)$", word):
                assert (ROOT / word).is_file(), words
