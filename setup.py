"""Packaging. On a package index the links and pictures of the README become public ones."""

import configparser
import re
from pathlib import Path

from setuptools import setup

FOLDER = Path(__file__).parent


def public_address() -> str:
    """Returns where this folder is public: "Source" of setup.cfg's project_urls; "" if nowhere."""
    settings = configparser.ConfigParser()
    settings.read(FOLDER / "setup.cfg", encoding="utf-8")
    urls = settings.get("metadata", "project_urls", fallback="").strip().splitlines()
    known = dict(line.replace(" ", "").split("=", 1) for line in urls if "=" in line)
    return known.get("Source", "").rstrip("/")


def readme_for_an_index(text: str, address: str) -> str:
    """Returns the README with absolute links; without an address, links of ours are plain words."""

    def absolute(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if re.match(r"\w+:|#", target):
            return found[0]
        if not address:
            return "" if picture else words
        return f"{picture}[{words}]({address}/{'raw' if picture else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", absolute, text)


if __name__ == "__main__":
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=readme_for_an_index(readme, public_address()),
        long_description_content_type="text/markdown",
    )
