"""One of two processes that fill one index, and fail together: extend_together.py FOLDER RANK."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from casn_plugin import CASN, GalleryIndex
from casn_plugin.ranking.shards import Manifest

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
    timeout=timedelta(seconds=30),
)  # fmt: skip


def make(seed):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    return CASN(
        backbone,
        hidden_dim=8,
        input_size=(48, 24),
        forward=lambda net, imgs: (None, net(imgs).mean((2, 3))),
    )


class Images(Dataset):
    def __init__(self, n, labels):
        self.imgs = torch.rand(n, 3, 48, 24, generator=torch.Generator().manual_seed(n))
        self.labels = labels

    def __len__(self):
        return len(self.imgs)

    def __getitem__(self, i):
        if self.labels == "broken" and i == 5:
            raise OSError("a broken image")
        if not self.labels:
            return self.imgs[i]
        return {"img": self.imgs[i], "pid": i // 2, "camid": i % 2, "impath": f"img{i}.jpg"}


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.rand(3, 48, 24)


def manifest(index):
    return Manifest.read(index.folder)


def everywhere(name):
    if rank == 0:
        GalleryIndex.create(f"{folder}/{name}", model)
    dist.barrier()
    return GalleryIndex(f"{folder}/{name}")


def fails(kind, message, function):
    try:
        function()
    except kind as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"no error: {message}")


model = make(0)
settings = [
    (11, 2, 4, True, False),
    (11, 3, 4, False, False),
    (1, 4, 4, True, False),
    (7, 2, 1, True, True),
    (12, 2, 4, False, False),
]
joint = everywhere("joint")
single = GalleryIndex.create(f"{folder}/single{rank}", model)
for n, batch, shard, labels, drop_last in settings:
    loader = DataLoader(Images(n, labels), batch, drop_last=drop_last)
    single.extend(model, loader, shard_size=shard)
    dist.barrier()
    joint.extend(model, loader, shard_size=shard, distributed=True)
    assert len(joint) == len(single)
    assert joint.names == single.names and manifest(joint) == manifest(single)
    assert torch.equal(joint[:].maps, single[:].maps)

loader = DataLoader(Images(8, "broken"), 1)  # image 5 is in the share of process 1
kind, message = (OSError, "a broken image") if rank else (RuntimeError, "process 1 failed: OSError")
fails(kind, message, lambda: joint.extend(model, loader, shard_size=1, distributed=True))
good = DataLoader(Images(4, True), 1)
kind, message = (ValueError, "other weights") if rank else (RuntimeError, "process 1 failed")
fails(kind, message, lambda: joint.extend(make(rank), good, shard_size=1, distributed=True))
genuine = Manifest.write


def no_space(*_):
    raise OSError("no space left")


Manifest.write = no_space
kind, message = (RuntimeError, "process 0 failed") if rank else (OSError, "no space left")
fails(kind, message, lambda: joint.extend(model, good, shard_size=1, distributed=True))
Manifest.write = genuine
for loader in (DataLoader(Endless(), 1), DataLoader(Images(3, True), batch_sampler=[[0]])):
    fails(
        ValueError,
        "needs a loader with a batch_size",
        lambda loader=loader: joint.extend(model, loader, distributed=True),
    )
# process 1 works in a folder of its own, as on a machine without a shared disk
before = manifest(single)
own = single if rank else joint
kind, message = (FileNotFoundError, "lacks its shard")
if rank:
    kind, message = RuntimeError, "process 0 failed"
fails(kind, message, lambda: own.extend(model, good, shard_size=1, distributed=True))
if rank:
    single.add(single[:1])
fails(
    ValueError,
    "not all processes have opened the same",
    lambda: own.extend(model, good, shard_size=1, distributed=True),
)
assert manifest(joint) == before
print("done", len(joint))
