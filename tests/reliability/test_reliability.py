"""A small seeded share of the long run, in processes of its own: its command is run.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "program", [("kill.py", "3", "0"), ("damage.py", "300", "0")], ids=lambda program: program[0]
)
def test_nothing_is_lost_and_nothing_is_run(program):
    name, *options = program
    ran = subprocess.run(
        [sys.executable, HERE / name, *options], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ("'lost': 0" if name == "kill.py" else "'executed': 0") in ran.stdout, ran.stdout


def test_wrong_arguments_give_clear_errors_and_no_silent_results():
    ran = subprocess.run(
        [sys.executable, HERE / "arguments.py", "1500", "0"], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    clean = "'raw errors': 0, 'errors of others': 0, 'silent': 0"
    assert clean in ran.stdout, ran.stdout
