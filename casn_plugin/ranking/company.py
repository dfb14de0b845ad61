"""Several processes and one folder: one changes it at a time, each writes aside until it may.

What an index holds is read without a lock. It is changed under one: what others have done is
looked at, new files are moved to their place, what no longer counts is deleted. What takes long,
encoding and writing, is done before, in a folder of the writer's own.
"""

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from casn_plugin.files import TEMPORARY

LOCK = "index.lock"
"""The file that is locked; it stays."""

SHARD = r"[0-9a-f]{24}\.safetensors"
"""The names of shards, as a regular expression."""

_ASIDE = re.compile(r"[0-9a-f]{32}\.new")
# the last are safetensors' own, which versions before 0.2 wrote into the folder itself
_OWN_FILE = re.compile(rf"{SHARD}|{TEMPORARY}|\.tmp[0-9A-Za-z]{{6}}")


@contextmanager
def locked(folder: Path, timeout: float) -> Iterator[None]:
    """Keeps every other writer out of a folder; it is not entered twice.

    Args:
        folder: of an index.
        timeout: so many seconds are waited for another writer to finish.

    Raises:
        TimeoutError: it has not finished.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as name, locked(Path(name), timeout=1.0):
        ...     [path.name for path in Path(name).iterdir()]
        ['index.lock']
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise TimeoutError(
            f"another process is changing the index in {folder}, and has not finished within "
            f"{timeout:g} s: nothing has been changed"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """Yields a new folder within another, for what does not count yet; deleted at the end.

    It is entered while the other is :func:`locked`, and may be used and left after that:
    :func:`tidy` lets it be as long as its process lives.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as name:
        ...     with aside(Path(name)) as path:
        ...         tidy(Path(name), named=())
        ...         print(path.is_dir())
        ...     print(path.is_dir())
        True
        False
    """
    path = folder / f"{uuid.uuid4().hex}.new"
    path.mkdir()
    lock = FileLock(path / "lock")
    lock.acquire(blocking=False)
    try:
        yield path
    finally:
        lock.release()
        shutil.rmtree(path, ignore_errors=True)


def tidy(folder: Path, named: "set[str] | tuple[str, ...]") -> None:
    """Deletes shards that are not named, and what killed processes have left.

    It is called while the folder is :func:`locked`.
    """
    for path in folder.iterdir():
        if _ASIDE.fullmatch(path.name) and path.is_dir():
            if _abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        elif _OWN_FILE.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    """Returns whether the process that writes into a folder of :func:`aside` lives no more."""
    lock = FileLock(path / "lock")
    with suppress(Timeout, OSError):
        lock.acquire(blocking=False)
        lock.release()
        return True
    return False
