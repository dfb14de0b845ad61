"""Fills an index and is killed before it moves its second shard: extend_and_die.py FOLDER."""

import os
import signal
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader

from casn_plugin import CASN, GalleryIndex

torch.manual_seed(0)
model = CASN(
    nn.Sequential(nn.Conv2d(3, 4, 3, stride=8)), hidden_dim=8, input_size=(48, 24),
    forward=lambda net, imgs: (None, net(imgs).mean((2, 3))),
)  # fmt: skip
imgs = torch.rand(9, 3, 48, 24)
gallery = GalleryIndex.create(sys.argv[1], model)
gallery.extend(model, DataLoader(imgs[:3], 1))
genuine, calls = os.replace, []


def replace(source: str, target: str) -> None:
    """Moves a file, once."""
    calls.append(source)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    genuine(source, target)


os.replace = replace
gallery.extend(model, DataLoader(imgs, 1), shard_size=3)
