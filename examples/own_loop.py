#!/usr/bin/env python
"""The losses of CASN in a plain PyTorch loop, without torchreid, on a few rendered pedestrians.

python examples/own_loop.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader

from casn_plugin import (
    IdentificationAttentionLoss,
    PairClassifier,
    PairSampler,
    SiameseAttentionLoss,
)
from casn_plugin.losses import casn_loss, identification_loss
from casn_plugin.pedestrians import render_pedestrian

torch.manual_seed(0)
shots = [(person, camera, index) for person in range(8) for camera in (0, 4) for index in range(4)]
pictures = [render_pedestrian(p + 1, c, i, height=64, width=32)[0] for p, c, i in shots]
images = [torch.tensor(picture).permute(2, 0, 1) / 127.5 - 1 for picture in pictures]
pids, camids, _ = map(list, zip(*shots, strict=True))
pairs = PairSampler(pids, camids, batch_size=16)  # rows 2i and 2i+1 of a batch are pair i
loader = DataLoader[object](list(zip(images, pids, strict=True)), batch_size=16, sampler=pairs)  # type: ignore[arg-type]

body = nn.Sequential(nn.Conv2d(3, 32, 5, 4), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2))
pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
classifier = nn.Linear(64, 8)
network = nn.Sequential(body, pool, classifier)
pair_classifier = PairClassifier(64)
identification, siamese = IdentificationAttentionLoss(), SiameseAttentionLoss()
optimizer = torch.optim.Adam([*network.parameters(), *pair_classifier.parameters()], lr=0.003)

for epoch in range(20):
    for imgs, ids in loader:
        activations = body(imgs)  # the last feature map, over which attention is spread
        features = pool(activations)
        logits = classifier(features)
        loss_ide = identification_loss(logits, ids)
        loss_ia = identification(network, imgs, ids, logits, activations)
        loss_sa = siamese(pair_classifier, features, ids, activations)
        loss = casn_loss(loss_ide, loss_ia, loss_sa)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"Epoch {epoch + 1}: L_ide {loss_ide:.2f}, L_ia {loss_ia:.2f}, L_sa {loss_sa:.2f}")
