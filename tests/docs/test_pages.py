"""README is short, links lead somewhere, and the API reference holds every public name."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from support.documentation import DOCS, PAGES, ROOT, name_of

import lora_kernels

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as both GitHub and MkDocs make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_resolves(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_readme_has_absolute_links_to_files_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI shows README without the files beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    links = importlib.import_module("links")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert links.absolute(text) == text, "run python scripts/update_readme.py"
    named = LINK.findall(text)
    own = [link for link in named if link.startswith((links.FILES, links.PICTURES))]
    assert len(own) > 20 and all("://" in link for link in named)
    for link in own:
        path, _, anchor = link.removeprefix(links.FILES).removeprefix(links.PICTURES).partition("#")
        assert (ROOT / path).is_file(), link
        assert not anchor or anchor in anchors(ROOT / path), link
    assert all(link.endswith(".png") == link.startswith(links.PICTURES) for link in own)


def test_links_become_absolute_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    links = importlib.import_module("links")
    page = "[a](docs/a.md#b) ![c](d.png) [e](https://example.org) [f](#g)"
    made = links.absolute(page)
    assert made == f"[a]({links.FILES}docs/a.md#b) ![c]({links.PICTURES}d.png) [e](https://example.org) [f](#g)"
    assert links.absolute(made) == made and links.REPOSITORY in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_readme_is_at_most_130_lines_and_shows_numbers_early() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert lines.index("<!-- numbers:begin -->") < 40 and lines.index("<!-- chart:begin -->") < 40


def test_every_public_name_is_in_the_api_reference() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: lora_kernels\.(\w+)$", pages, re.MULTILINE))
    assert set(lora_kernels.__all__) <= documented


@pytest.mark.parametrize("door", lora_kernels._DOORS)
def test_every_name_of_a_public_module_is_in_the_api_reference(door: str) -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    module = importlib.import_module(f"lora_kernels.{door}")
    for name in getattr(module, "__all__", ()):
        home = getattr(getattr(module, name), "__module__", module.__name__)
        entries = {f"lora_kernels.{name}", f"lora_kernels.{door}.{name}", f"{home}.{name}", module.__name__, home}
        assert entries & documented, f"lora_kernels.{door}.{name}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    missing = [page for page in DOCS.rglob("*.md") if f": {page.relative_to(DOCS).as_posix()}\n" not in navigation]
    assert not missing


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings_handlers.python")
    pytest.importorskip("material")
    import logging

    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.utils import CountHandler

    handler = CountHandler()
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("mkdocs")
    logger.addHandler(handler)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
        build(config)
    finally:
        logger.removeHandler(handler)
    assert (tmp_path / "site" / "index.html").is_file()
