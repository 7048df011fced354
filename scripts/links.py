"""The addresses of this project's files on the web. PyPI shows README without the files beside it, so README names them
by these."""

from __future__ import annotations

import re

REPOSITORY = "https://github.com/lora-kernels/lora_kernels"
FILES = f"{REPOSITORY}/blob/main/"
"""What a link to a file begins with."""
PICTURES = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/"
"""What the address of a picture begins with: the file itself, not the page that shows it."""

_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^)\s]+)\)")


def absolute(page: str) -> str:
    """Return a page of the root of the repository with its relative links made absolute. Links within the page stay."""

    def repoint(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link[0]
        return f"{picture}[{text}]({PICTURES if picture else FILES}{target})"

    return _LINK.sub(repoint, page)
