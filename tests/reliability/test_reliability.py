"""A small seeded share of the long run, in processes of its own: its command is run.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARES = {
    "kill.py": ["3", "0"],
    "damage.py": ["300", "0"],
    "manifests.py": ["300", "0"],
    "pictures.py": ["600", "0"],
    "two_writers.py": ["1", "0"],
    "soak.py": ["--rounds", "10"],
}


def share(name, *options):
    """Returns what a program prints; it has to end well."""
    ran = subprocess.run(
        [sys.executable, HERE / name, *options], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("name", SHARES)
def test_nothing_is_lost_read_wrongly_or_run(name):
    assert "{" in share(name, *SHARES[name])


def test_wrong_arguments_give_clear_errors_and_no_silent_results():
    printed = share("arguments.py", "1500", "0")
    assert "'raw errors': 0, 'errors of others': 0, 'silent': 0" in printed, printed
