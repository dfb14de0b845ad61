#!/usr/bin/env python
"""Trains CASN on a timm network to tell animals (or vehicles) apart, and ranks them.

    pip install timm
    python examples/wildlife_timm.py --root data/whales

The folder is laid out as wildlife-datasets and wildlife-tools have it: a metadata.csv with the
columns `path` (below the folder), `identity` and `split` ("train" or "test"), one row a picture.
The first test picture of every identity is looked for among the others.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from casn_plugin import (
    CASN,
    IdentificationAttentionLoss,
    PairSampler,
    Preprocessing,
    SiameseAttentionLoss,
    attention_distmat,
    fuse_distmats,
)
from casn_plugin.doors import check_count
from casn_plugin.evaluation import evaluate_rank
from casn_plugin.loading import encode_loader
from casn_plugin.losses import identification_loss
from casn_plugin.objective import loss_terms
from casn_plugin.packages import check_device


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures and identities of some rows of a metadata.csv."""

    def __init__(self, root: Path, rows: Sequence[dict[str, str]], prepare: Preprocessing) -> None:
        self.paths = [root / row["path"] for row in rows]
        known = sorted({row["identity"] for row in rows})
        self.pids = [known.index(row["identity"]) for row in rows]
        self.prepare = prepare

    def __len__(self) -> int:
        """Returns the number of pictures."""
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        """Returns a picture and whom it shows."""
        return self.prepare.load(self.paths[row]), self.pids[row]


def train(model: CASN, data: Pictures, args: argparse.Namespace) -> None:
    """Trains L = L_ide + λ1 L_ia + λ2 L_sa (Eq. 6) on rows of pairs."""
    pairs = PairSampler(data.pids, batch_size=args.batch_size)
    loader = DataLoader(data, batch_size=args.batch_size, sampler=pairs)
    identification, siamese = IdentificationAttentionLoss(), SiameseAttentionLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    for epoch in range(args.epochs):
        total = 0.0
        for imgs, pids in loader:
            imgs, pids = imgs.to(args.device), pids.to(args.device)
            output = model(imgs, pids, identification, siamese)
            loss_ide = identification_loss(output.logits, pids)
            loss, terms = loss_terms(output, pids, loss_ide, siamese=siamese)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += terms["loss"].item() / len(loader)
        print(f"Epoch {epoch + 1}/{args.epochs}: loss {total:.3f}")


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains and ranks; returns the mAP of features, attention and both fused."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(usage="%(prog)s --root FOLDER [options]", description=about)
    parser.add_argument("--root", type=Path, required=True, help="folder with the metadata.csv")
    parser.add_argument("--model", default="resnet18", help="a convolutional network of timm")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--size", type=int, default=224, help="rows and columns of a picture")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not (args.root / "metadata.csv").is_file():
        parser.error(f"--root: there is no file {args.root / 'metadata.csv'}")
    if ":" not in args.model and not timm.is_model(args.model):  # hf-hub:... is asked for there
        parser.error(f"--model: timm has no {args.model}: timm.list_models() names all")
    try:
        for name in ("size", "epochs", "batch_size"):
            check_count(f"--{name.replace('_', '-')}", getattr(args, name))
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    with (args.root / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    split = {name: [row for row in rows if row["split"] == name] for name in ("train", "test")}
    classes = len({row["identity"] for row in split["train"]})
    net: nn.Module = timm.create_model(args.model, args.pretrained, num_classes=classes)
    model = CASN(net, input_size=(args.size, args.size)).to(args.device)
    train(model.train(), Pictures(args.root, split["train"], model.preprocessing), args)

    test = Pictures(args.root, split["test"], model.preprocessing)
    images, pids, _ = encode_loader(model.eval(), DataLoader(test, batch_size=args.batch_size))
    query = [test.pids.index(pid) for pid in sorted(set(test.pids))]
    gallery = [row for row in range(len(test)) if row not in set(query)]
    found = images[torch.tensor(query)], images[torch.tensor(gallery)]
    qf, gf = (nn.functional.normalize(each.features) for each in found)
    distmats = {"features": torch.cdist(qf, gf), "attention": attention_distmat(model, *found)}
    distmats["fused"] = fuse_distmats(distmats["features"], distmats["attention"])
    ids = pids[query], pids[gallery]
    results = {name: evaluate_rank(each, *ids).mean_ap for name, each in distmats.items()}
    print(", ".join(f"mAP of {name} {value:.1%}" for name, value in results.items()))
    return results


if __name__ == "__main__":
    main()
