"""How a file comes into its place: written beside it, safely on disk, moved there in one step.

Whatever interrupts that, the place holds the old file or the new one, whole. What a killed process
has left half-written is told from what is being written by a lock, which ends with its process.
"""

import errno
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = r"[0-9a-f]{32}\.tmp"
"""The names of files that are not in their place yet, as a regular expression."""

_DAY = 86400.0


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """Yields the path of a new, empty file in a folder, to be filled; it is deleted at the end.

    :func:`clear` lets it be as long as its process lives.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, temporary(Path(folder)) as path:
        ...     move(path.write_text("whole") and path, Path(folder, "file"))
        ...     print([each.name for each in Path(folder).iterdir()])
        ['file']
    """
    while True:
        path = folder / f"{uuid.uuid4().hex}.tmp"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            _hold(descriptor)
            if path.exists():
                break
        except BlockingIOError:  # held by one that takes it for abandoned
            pass
        os.close(descriptor)
    if fcntl is None:  # an open file can't be moved
        os.close(descriptor)
    try:
        yield path
    finally:
        if fcntl is not None:
            os.close(descriptor)
        path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Deletes what killed processes have left half-written in a folder.

    Where a file system or Windows does not tell who lives, what a day has not changed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder, temporary(Path(folder)) as path:
        ...     Path(folder, f"{'0' * 32}.tmp").touch()
        ...     clear(Path(folder))
        ...     print([each == path for each in Path(folder).iterdir()])
        [True]
    """
    for path in folder.glob("*.tmp"):
        if not re.fullmatch(TEMPORARY, path.name):
            continue
        with suppress(OSError):  # BlockingIOError: its process lives
            with path.open("rb+") as file:
                held = _hold(file.fileno())
                if held:
                    path.unlink()
            if not held and time.time() - path.stat().st_mtime > _DAY:
                path.unlink()


def _hold(descriptor: int) -> bool:
    """Returns whether a file is this process's until it is closed; False: that can't be known.

    Raises:
        BlockingIOError: it is another one's.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return False
    return True


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

    After an exception the place is left as it was. The folder is made if need be, and what killed
    processes have left half-written in it is deleted.

    Raises:
        FileNotFoundError: nothing has been written.
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
        clear(target.parent)
        with temporary(target.parent) as path:
            yield path
            if not path.exists() or not path.stat().st_size:
                raise FileNotFoundError(errno.ENOENT, "nothing was written", str(target))
            move(path, target)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error  # a full disk, by name
