"""Ranks, alone or as one of two processes, and keeps what is found: rank_together.py FOLDER [RANK].

Two processes also read a gallery that is broken in one of them.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from casn_plugin import Compute, Encoding, PairClassifier, attention_distmat, rank_gallery
from casn_plugin.ranking import same_identity_logits

folder, rank = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None
distributed = rank is not None
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Module()
model.pair_classifier = PairClassifier(24, 16)
affine = nn.Module()
affine.pair_classifier = nn.Linear(24, 2)
features = torch.rand(30, 24).repeat_interleave(2, 0)  # two at each distance
images = Encoding(features, basis=torch.rand(60, 24, 8, 3))
query, gallery = images[:7], images[7:]
if distributed:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
compute = Compute(max_memory=200_000, distributed=distributed)
found = [
    attention_distmat(model, query, gallery, compute=compute),
    attention_distmat(affine, query, gallery, compute=compute),
    attention_distmat(model, query, gallery, shortlist=9, compute=compute),
    *vars(rank_gallery(model, query, gallery, topk=5, compute=compute)).values(),
    *vars(rank_gallery(model, query, gallery, topk=5, exact=False, compute=compute)).values(),
    same_identity_logits(model, query, gallery, compute=compute),
]
found = [each for each in found if isinstance(each, torch.Tensor | int)]
torch.save(found, f"{folder}/process{rank}.pt" if distributed else f"{folder}/alone.pt")


class Broken:
    """A gallery whose maps process 1 can't read."""

    def __len__(self) -> int:
        return len(gallery)

    def __getitem__(self, rows: slice | torch.Tensor) -> Encoding:
        if rank and len(gallery.features[rows]):
            raise OSError("no such disk")
        return gallery[rows]

    def features_of(self, rows: slice | torch.Tensor) -> torch.Tensor:
        return gallery.features[rows]


if distributed:
    for function in (attention_distmat, rank_gallery):
        try:
            function(model, query, Broken(), compute=compute)
        except (OSError, RuntimeError) as error:
            message = str(error)
        else:
            raise SystemExit("no error")
        assert message == ("no such disk" if rank else "process 1 failed: OSError('no such disk')")
    dist.destroy_process_group()
