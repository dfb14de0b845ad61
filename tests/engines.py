"""Small engines and what they train on, for the tests of the engine."""

import random
from pathlib import Path

import numpy as np
import torch
import torchreid
from conftest import TinyBackbone, tiny_forward

from casn_plugin import CASN, ImageCASNEngine, PairSampler

SIZE = (48, 24)


def seed_all(seed: int = 0) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


class Backbone(TinyBackbone):
    """As torchreid's: gives logits in training and features in eval mode."""

    loss = "softmax"

    def forward(self, imgs):
        logits, features = tiny_forward(self, imgs)
        if not self.training:
            return features
        return logits if self.loss == "softmax" else (logits, features)


def manager(root: Path, pairs: bool = True, **kwargs):
    options = {
        "height": SIZE[0], "width": SIZE[1], "batch_size_train": 8, "batch_size_test": 16,
        "workers": 0, "use_gpu": False, **kwargs,
    }  # fmt: skip
    datamanager = torchreid.data.ImageDataManager(root=str(root), sources="market1501", **options)
    return PairSampler.install(datamanager) if pairs else datamanager


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def make_engine(
    root: Path, *, scheduler: bool = True, wrap=lambda model: model, optimize=sgd, **kwargs
):
    seed_all()
    datamanager = manager(root)
    model = CASN(Backbone(datamanager.num_train_pids), input_size=SIZE, hidden_dim=16)
    optimizer = optimize(model)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2]) if scheduler else None
    return ImageCASNEngine(datamanager, wrap(model), optimizer, schedule, **kwargs)


class Recorder:
    """Collects the loss terms of every step of an engine."""

    def __init__(self, engine) -> None:
        self.steps: list[dict[str, float]] = []
        inner = engine.forward_backward

        def forward_backward(data):
            self.steps.append(inner(data))
            return self.steps[-1]

        engine.forward_backward = forward_backward

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]
