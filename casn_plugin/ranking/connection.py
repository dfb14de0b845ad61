"""A connection to Milvus: a server by its address, or a file in this process."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from casn_plugin.packages import needed

_opened: Counter[str] = Counter()  # files, and by how many in this process


def connect(uri: str, token: str) -> Any:
    """Returns a client of a server, or of a file in this process.

    Raises:
        ImportError: pymilvus or milvus-lite is not installed.
        OSError: a file or an address that can't be opened: of a file, one process at a time.
        ValueError: a path that does not end in ".db".
    """
    with needed("milvus"):
        from pymilvus import MilvusClient

    local = _is_file(uri)
    if local and not uri.endswith(".db"):
        raise ValueError(f"uri must be an address, or a path that ends in .db, got {uri!r}")
    try:
        with quiet():
            if local:
                Path(uri).parent.mkdir(parents=True, exist_ok=True)
            client = MilvusClient(uri, token=token, dedicated=True)
    except Exception as error:  # of pymilvus, milvus-lite and grpc, each its own
        if "milvus-lite is required" in str(error):
            raise ImportError(
                "a file needs milvus-lite: pip install 'casn-plugin[milvus]'"
            ) from error
        hint = " (one process at a time can)" if local else ""
        raise OSError(f"Milvus can't open {uri}{hint}: {error}") from error
    if local:
        _opened[os.path.abspath(uri)] += 1
    return client


def disconnect(client: Any, uri: str) -> None:
    """Lets go of a client, and of its file where no other in this process has it."""
    client.close()
    path = os.path.abspath(uri)
    if not _is_file(uri):
        return
    _opened[path] -= 1
    if not _opened[path]:
        from milvus_lite.server_manager import server_manager_instance

        server_manager_instance.release_server(path)


def _is_file(uri: str) -> bool:
    """Returns whether it is a path and no address."""
    return "://" not in uri


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps pymilvus from writing errors to the terminal that are raised anyway.

    Example:
        >>> with quiet():
        ...     logging.getLogger("pymilvus").error("this is not seen")
    """
    loggers = [logging.getLogger(name) for name in ("pymilvus", "milvus_lite")]
    levels = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
