"""Memory that is freed and taken again stays with the process, for a while."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from contextlib import nullcontext

import torch

from casn_plugin.heap import kept_heap


def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


torch.ones(8).sum()
before = faults()
with kept_heap():
    faults()  # until the heap has its size
    kept, held = min(faults() for _ in range(3)), resident()  # it may grow once more
released = resident()
after = faults()
print(before, kept, after, held - released)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_pages_are_taken_once_and_given_back():
    before, kept, after, released = _faults()
    assert kept < 200  # a page is 4 KiB: four times 64 MiB are 65,536, of which many may be huge
    assert before > 4 * max(kept, 25) and after > 4 * max(kept, 25)
    assert released > 15_000  # the 64 MiB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_the_environment_says_of_memory_stands():
    before, kept, *_ = _faults(MALLOC_ARENA_MAX="2")
    assert kept > before / 2


def test_another_c_library_is_left_alone(monkeypatch):
    from casn_plugin import heap

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    with heap.kept_heap():
        pass
    with pytest.raises(KeyError), heap.kept_heap():
        raise KeyError


def _faults(**environment: str) -> list[int]:
    """Runs the program; returns what it prints."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=own | environment
    )
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]
