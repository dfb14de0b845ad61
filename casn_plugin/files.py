"""How a file comes into its place: written beside it, safely on disk, moved there in one step.

Whatever interrupts that, the place holds the old file or the new one, whole.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = r"[0-9a-f]{32}\.tmp"
"""The names of files that are not in their place yet, as a regular expression."""


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """Yields a new path in a folder; what is there at the end is deleted.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, temporary(Path(folder)) as path:
        ...     move(path.write_text("whole") and path, Path(folder, "file"))
        ...     print([each.name for each in Path(folder).iterdir()])
        ['file']
    """
    path = folder / f"{uuid.uuid4().hex}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Moves a file to its place in one step, its content safely on disk first."""
    with source.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to, and moves what is there to its place at the end.

    After an exception the place is left as it was. The folder is made if need be.

    Raises:
        OSError: a folder or a file that can't be written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "file")) as path:
        ...         _ = path.write_text("whole")
        ...     print(Path(folder, "file").read_text())
        whole
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary(target.parent) as path:
            yield path
            move(path, target)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error  # a full disk, by name
