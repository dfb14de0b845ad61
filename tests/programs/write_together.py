"""One of two writers of an index, who open it anew all the time: write_together.py FOLDER RANK."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader

from casn_plugin import CASN, Encoding, GalleryIndex

folder, rank = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = CASN(
    nn.Sequential(nn.Conv2d(3, 4, 3, stride=8)), hidden_dim=8, input_size=(48, 24),
    forward=lambda net, imgs: (None, net(imgs).mean((2, 3))),
)  # fmt: skip
imgs = torch.rand(3, 3, 48, 24, generator=torch.Generator().manual_seed(rank))
images = model.encode(imgs)
index = GalleryIndex(folder)
for run in range(20):
    if run % 2:
        index = GalleryIndex(folder)
    names = [f"{rank}-{run}-{row}" for row in range(3)]
    some = Encoding(images.features + run, basis=images.basis)
    index.add(some, names=names, pids=[run] * 3, camids=[rank] * 3)
    index.extend(model, DataLoader(imgs, 2))  # images without names
    index = GalleryIndex(folder)
    while True:  # the last image of what this process has added, by its name
        try:
            index.remove([index.names.index(names[2])])
            break
        except ValueError as error:
            assert "open it anew" in str(error), error
            index = GalleryIndex(folder)
print("done")
