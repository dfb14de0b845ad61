"""Starts the programs of tests/programs, alone or as the two processes of a gloo group."""

import os
import subprocess
import sys
from pathlib import Path

import casn_plugin

PROGRAMS = Path(__file__).with_name("programs")


def start(program: str, *arguments: object) -> "subprocess.Popen[str]":
    """Starts a program with the package that is tested, on one thread."""
    root = str(Path(casn_plugin.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, str(PROGRAMS / f"{program}.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )  # fmt: skip


def finish_two(program: str, *arguments: object, timeout: float = 120) -> list[str]:
    """Returns what two processes of a program print, given their rank last; both must succeed."""
    processes = [start(program, *arguments, rank) for rank in range(2)]
    try:
        outputs = []
        for process in processes:
            output, errors = process.communicate(timeout=timeout)
            assert process.returncode == 0, errors
            outputs.append(output)
        return outputs
    finally:
        for process in processes:
            process.kill()
