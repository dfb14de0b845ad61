"""The losses in a plain loop: L falls, attention is trained, torchreid is not imported."""

import sys

import torch

from casn_plugin import IdentificationAttentionLoss, PairClassifier, SiameseAttentionLoss
from casn_plugin.losses import casn_loss, identification_loss

torch.manual_seed(0)
body = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 4), torch.nn.ReLU())
classifier, pairs = torch.nn.Linear(16, 4), PairClassifier(16, 32)
loss_ia, loss_sa = IdentificationAttentionLoss(), SiameseAttentionLoss()
modules = torch.nn.ModuleList([body, classifier, pairs])
optimizer = torch.optim.SGD(modules.parameters(), lr=0.05, momentum=0.9)
colours = torch.rand(4, 3, 1, 1)
pids = torch.tensor([0, 0, 1, 1, 2, 3, 1, 2])
losses = []
for _ in range(60):
    imgs = colours[pids] + 0.1 * torch.rand(8, 3, 32, 16)
    activations = body(imgs)
    features = activations.mean((2, 3))
    logits = classifier(features)
    loss = casn_loss(
        identification_loss(logits, pids),
        loss_ia(
            lambda masked: classifier(body(masked).mean((2, 3))),
            imgs,
            pids,
            logits,
            activations,
            modules,
        ),
        loss_sa(pairs, features, pids, activations),
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], losses
assert "torchreid" not in sys.modules
