"""Counts what torch.compile makes of models: count_breaks.py NETWORK ...

Prints a line of JSON a network of timm: graphs and breaks of a training step's loss, and of the
features in eval mode. (In the tests themselves, shapes are checked by what can't be compiled.)
"""

import json
import sys

import timm
import torch

from casn_plugin import CASN, IdentificationAttentionLoss, SiameseAttentionLoss
from casn_plugin.losses import identification_loss
from casn_plugin.objective import loss_terms

SIZE = (64, 64)


def count(name: str) -> dict[str, list[int]]:
    options = {"img_size": SIZE, "depth": 4} if "vit" in name else {}
    model = CASN(timm.create_model(name, num_classes=5, **options), input_size=SIZE).train()
    imgs, pids = torch.rand(4, 3, *SIZE), torch.tensor([0, 0, 3, 4])
    identification, siamese = IdentificationAttentionLoss(), SiameseAttentionLoss()

    def loss(imgs: torch.Tensor) -> torch.Tensor:
        output = model(imgs, pids, identification, siamese)
        return loss_terms(output, pids, identification_loss(output.logits, pids))[0]

    counts = {}
    for mode in ("train", "eval"):
        torch.compiler.reset()
        with torch.set_grad_enabled(mode == "train"):
            found = torch._dynamo.explain(loss if mode == "train" else model.eval())(imgs)
        counts[mode] = [found.graph_count, found.graph_break_count]
    return counts


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(count(name)))
