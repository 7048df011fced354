"""The folders of this checkout that tests read files from."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
HELPERS = SUPPORT.parent
"""The folder from which `support` is imported. pyproject.toml puts it on sys.path, and nothing else is in it."""
ROOT = HELPERS.parents[1]
