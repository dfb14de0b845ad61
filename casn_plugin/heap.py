"""Memory of the host that is freed and taken again: it stays with the process for a while."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_DEFAULTS = ((_TRIM_THRESHOLD, 128 * 2**10), (_MMAP_THRESHOLD, 32 * 2**20), (_MMAP_MAX, 65536))
_OWN = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


@contextmanager
def kept_heap() -> Iterator[None]:
    """Keeps what is freed for what is allocated next, and gives it back to the system at the end.

    glibc takes every tensor of more than 32 MiB from the system anew, page by page, and gives it
    back when it is freed. A training step on the CPU does so at every layer, twice with attention
    losses. Nothing is done with another C library, nor where the environment says how memory is
    allocated.

    Example:
        >>> with kept_heap():
        ...     sum(len(bytes(2**26)) for _ in range(3)) // 2**26
        3
    """
    glibc = _glibc()
    if glibc is None or any(name.startswith(_OWN) for name in os.environ):
        yield
        return
    glibc.mallopt(_MMAP_MAX, 0)
    glibc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for option, value in _DEFAULTS:
            glibc.mallopt(option, value)
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Returns the C library, None where it is another one."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # not of POSIX
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
