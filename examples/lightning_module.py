#!/usr/bin/env python
"""The losses of CASN in a LightningModule, without torchreid, on a few rendered pedestrians.

python examples/lightning_module.py
"""

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from casn_plugin import CASN, IdentificationAttentionLoss, PairSampler, SiameseAttentionLoss
from casn_plugin.losses import identification_loss
from casn_plugin.objective import loss_terms
from casn_plugin.pedestrians import render_pedestrian


def forward(network: Any, imgs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits and features of a network: the map between is tapped by CASN."""
    features = network["pool"](network["body"](imgs))
    return network["classifier"](features), features


class Network(lightning.LightningModule):
    """A small network that learns by all three losses of Eq. 6."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        body = nn.Sequential(nn.Conv2d(3, 32, 5, 4), nn.ReLU(), nn.Conv2d(32, 64, 3, 2))
        pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        layers = {"body": body, "pool": pool, "classifier": nn.Linear(64, classes)}
        self.casn = CASN(nn.ModuleDict(layers), forward=forward, input_size=(64, 32))
        self.identification, self.siamese = IdentificationAttentionLoss(), SiameseAttentionLoss()

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Returns L of a batch whose rows 2i and 2i+1 are pair i."""
        imgs, pids = batch
        output = self.casn(imgs, pids, self.identification, self.siamese)
        loss, terms = loss_terms(output, pids, identification_loss(output.logits, pids))
        self.log_dict(terms, on_step=False, on_epoch=True, batch_size=len(imgs))
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns the pairs; where Lightning runs several processes, each draws its share."""
        shots = [(person, camera, i) for person in range(8) for camera in (0, 4) for i in range(4)]
        pictures = [render_pedestrian(p + 1, c, i, height=64, width=32)[0] for p, c, i in shots]
        images = [torch.tensor(picture).permute(2, 0, 1) / 127.5 - 1 for picture in pictures]
        pids, camids, _ = map(list, zip(*shots, strict=True))
        pairs = PairSampler(pids, camids, batch_size=16)
        return DataLoader(list(zip(images, pids, strict=True)), batch_size=16, sampler=pairs)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam over the network and the pair classifier."""
        return torch.optim.Adam(self.parameters(), lr=0.003)


def main(**options: Any) -> lightning.Trainer:
    """Trains; returns the trainer, whose `logged_metrics` are the means of the last epoch."""
    lightning.seed_everything(0)
    settings = {"max_epochs": 10, "logger": False, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(use_distributed_sampler=False, **settings)
    trainer.fit(Network(8))
    return trainer


if __name__ == "__main__":
    print({name: round(float(value), 3) for name, value in main().logged_metrics.items()})
