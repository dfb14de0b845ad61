"""Normalises a batch of which two processes hold unequal shares: normalise_together.py FOLDER RANK.

Outputs, statistics, gradients and gradients of gradients are kept as FOLDER/process{RANK}.pt.
"""

import sys
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from casn_plugin.batchnorm import shared_batchnorm
from casn_plugin.processes import Processes


def normalised(processes: Processes, kind: str) -> dict[str, torch.Tensor]:
    """What a layer and its derivatives make of this process's share: five rows or three."""
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(4, affine=kind != "plain", track_running_stats=kind != "plain")
    imgs = torch.rand(8, 4, 3, 2) * 3 + 10
    other, weights = torch.rand(8, 4, 3, 2), torch.rand(8, 4, 3, 2)
    if kind == "flat":
        layer = nn.BatchNorm1d(4, momentum=0.3)
        imgs, other, weights = (each.mean((2, 3)) for each in (imgs, other, weights))
    half = torch.autocast("cpu", torch.bfloat16) if kind == "half" else nullcontext()
    layer, imgs, other, weights = (each.double() for each in (layer, imgs, other, weights))
    if kind == "half":
        layer, imgs, other, weights = layer.float(), imgs.bfloat16(), other.float(), weights.float()
    if processes.count > 1:
        rows = slice(0, 5) if processes.rank == 0 else slice(5, 8)
        imgs, other, weights = imgs[rows], other[rows], weights[rows]
    imgs.requires_grad_()
    with shared_batchnorm(processes), half:
        output = layer(imgs)
        with torch.no_grad():
            evaluated = layer.eval()(imgs.detach()) if kind != "plain" else output.detach()
    # as attention does it: a gradient is part of the loss
    (gradient,) = torch.autograd.grad((output * other).square().sum(), imgs, create_graph=True)
    (gradient * weights).sum().backward()
    found = {"output": output, "evaluated": evaluated, "gradient": gradient, "twice": imgs.grad}
    for name, value in layer.state_dict().items():
        found[f"state {name}"] = value
    for name, value in layer.named_parameters():
        if value.grad is not None:
            found[f"sum {name}"] = processes.add(value.grad)
    return {name: value.detach() for name, value in found.items()}


KINDS = ("maps", "flat", "plain", "half")

if __name__ == "__main__":
    folder, rank = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    found = {kind: normalised(Processes(True), kind) for kind in KINDS}
    torch.save(found, f"{folder}/process{rank}.pt")
    dist.destroy_process_group()
