#!/usr/bin/env python
"""pytorch-metric-learning's loss, miner and sampler together with the losses of CASN.

pip install pytorch-metric-learning
python examples/metric_loop.py
"""

import numpy as np
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import nn
from torch.utils.data import DataLoader

from casn_plugin import BatchPairs, PairClassifier, SiameseAttentionLoss
from casn_plugin.losses import IdentificationAttentionLoss, casn_loss, identification_loss
from casn_plugin.pedestrians import render_pedestrian

torch.manual_seed(0)
np.random.seed(0)  # of the sampler
shots = [(person, camera, index) for person in range(8) for camera in (0, 4) for index in range(4)]
pictures = [render_pedestrian(p + 1, c, i, height=64, width=32)[0] for p, c, i in shots]
images = [torch.tensor(picture).permute(2, 0, 1) / 127.5 - 1 for picture in pictures]
pids, camids, _ = map(list, zip(*shots, strict=True))
balanced = MPerClassSampler(pids, m=4, batch_size=16, length_before_new_iter=len(pids))
rows = list(zip(images, pids, camids, strict=True))
loader = DataLoader[object](rows, batch_size=16, sampler=balanced)  # type: ignore[arg-type]

body = nn.Sequential(nn.Conv2d(3, 32, 5, 4), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2))
pool = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
classifier = nn.Linear(64, 8)
network = nn.Sequential(body, pool, classifier)
pair_classifier = PairClassifier(64)
triplets, miner = TripletMarginLoss(margin=0.2), BatchHardMiner()
identification = IdentificationAttentionLoss()
siamese = SiameseAttentionLoss(pairs=BatchPairs())  # pairs are chosen inside of each batch
optimizer = torch.optim.Adam([*network.parameters(), *pair_classifier.parameters()], lr=0.003)

for epoch in range(20):
    terms = []
    for imgs, ids, cameras in loader:
        activations = body(imgs)  # the last feature map, over which attention is spread
        features = pool(activations)
        logits = classifier(features)
        loss_ide = identification_loss(logits, ids)
        loss_t = triplets(features, ids, miner(features, ids))
        loss_ia = identification(network, imgs, ids, logits, activations)
        loss_sa = siamese(pair_classifier, features, ids, activations, cameras)
        loss = casn_loss(loss_ide + loss_t, loss_ia, loss_sa)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms.append(torch.stack([loss_ide, loss_t, loss_ia, loss_sa]).detach())
    means = zip(("L_ide", "L_t", "L_ia", "L_sa"), torch.stack(terms).mean(0), strict=True)
    print(f"Epoch {epoch + 1}:", ", ".join(f"{name} {value:.3f}" for name, value in means))
