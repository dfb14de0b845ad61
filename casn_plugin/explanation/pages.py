"""Pages for any browser: templates that escape all that is put into them, and their files."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from casn_plugin.explanation.pictures import (
    RIGHT,
    WRONG,
    colour_key,
    jpeg_uri,
    png_uri,
    verdict,
)
from casn_plugin.files import replacing

if TYPE_CHECKING:
    from jinja2 import Template


def page_template(name: str) -> "Template":
    """Returns a page with blanks, by the name of its file.

    Example:
        >>> page_template("report").name
        'report.html.jinja'
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("casn_plugin.explanation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {
        "RIGHT": RIGHT,
        "WRONG": WRONG,
        "colour_key": colour_key,
        "jpeg_uri": jpeg_uri,
        "png_uri": png_uri,
        "verdict": verdict,
    }
    return environment.get_template(f"{name}.html.jinja")


def save_page(path: str | os.PathLike[str], page: str) -> Path:
    """Returns the path of a saved page; the file is whole or not there.

    Args:
        path: of the file, an existing one is replaced.
        page: what it holds; file names in it that are no UTF-8 are shown with "?".

    Raises:
        OSError: a folder that can't be made or written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_page(f"{folder}/page.html", "<h1>Hello</h1>").name
        'page.html'
    """
    with replacing(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
    return Path(path)
