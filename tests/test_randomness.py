"""The random state of every generator comes back, from a file and after an exception."""

import random

import numpy as np
import pytest
import torch

from casn_plugin.checkpoint import load_checkpoint, save_checkpoint
from casn_plugin.randomness import preserved_random_state, random_state, set_random_state


def draw() -> tuple[float, ...]:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.rand(3)


def test_the_random_state_comes_back(tmp_path):
    state = random_state()
    first = draw()
    save_checkpoint({"epoch": 1, "random_state": state}, tmp_path / "file")
    draw()
    set_random_state(load_checkpoint(tmp_path / "file")["random_state"])
    assert draw() == first
    set_random_state(state)
    with pytest.raises(RuntimeError), preserved_random_state():
        draw()
        raise RuntimeError
    assert draw() == first
