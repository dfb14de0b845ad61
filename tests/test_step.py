"""What a training step asks of the device, and the tools that look at it or compile it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import build_backbone
from engines import SIZE, Backbone, make_engine, manager, seed_all, sgd
from reads import META, Reads
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from casn_plugin import (
    CASN,
    BatchPairs,
    IdentificationAttentionLoss,
    ImageCASNEngine,
    SiameseAttentionLoss,
    grad_cam,
    identification_loss,
)
from casn_plugin.attention import siamese_attention
from casn_plugin.losses import identification_attention_loss
from casn_plugin.objective import MetricOptions, loss_terms

PIDS = torch.tensor([0, 0, 3, 4, 2, 2, 1, 4])
IA = IdentificationAttentionLoss()


def loss_of(model, imgs, pids=PIDS, siamese=None, camids=None):
    """The loss of a loop of one's own; `siamese` None: L_ide alone."""
    output = model(imgs, pids, siamese and IA, siamese, camids)
    loss_ide = identification_loss(output.logits, pids)
    return loss_terms(output, pids, loss_ide, siamese=siamese)[0]


def network(name, size=SIZE):
    """A network of torchreid, or one of timm without dropout."""
    if not name.startswith("timm:"):
        return CASN(build_backbone(name), input_size=size, hidden_dim=16).train()
    timm = pytest.importorskip("timm")
    options = {"img_size": size} if "vit" in name else {}
    net = timm.create_model(name.removeprefix("timm:"), num_classes=5, drop_rate=0.0, **options)
    return CASN(net, input_size=size, hidden_dim=16).train()


def spread(features, pids):
    """A metric loss that reads nothing."""
    return (features - features[pids.argsort()]).square().mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"siamese": SiameseAttentionLoss(pairs=BatchPairs())},
        {"accumulate": 2},
        {"metric": MetricOptions(metric_loss=spread)},
        {"identification": IdentificationAttentionLoss("logit", trains="network")},
        {"optimize": lambda model: torch.optim.AdamW(model.parameters())},
    ],
    ids=["rows", "chosen pairs", "parts", "metric loss", "network", "AdamW"],
)
def test_a_step_of_the_engine_reads_the_device_once(market_root, monkeypatch, options):
    engine = make_engine(market_root, **options)
    engine.casn.to(META)
    engine.criterion.use_gpu = True
    monkeypatch.setattr(type(engine), "_device", META)
    data = next(iter(engine.train_loader))
    for _ in range(2):
        with Reads() as reads:
            terms = engine.forward_backward(data)
        assert reads.calls == ["tolist"]
        assert {"loss_ide", "loss_ia", "loss_sa"} <= set(terms)


@pytest.mark.parametrize("name", ["osnet_x0_25", "pcb_p6", "timm:vit_tiny_patch16_224"])
def test_forward_and_backward_read_nothing_of_the_device(name):
    model = network(name, (64, 32)).to(META)
    imgs, camids = torch.rand(8, 3, 64, 32, device=META), torch.arange(8) % 2
    for siamese in (SiameseAttentionLoss(), SiameseAttentionLoss(pairs=BatchPairs("all"))):
        with Reads() as reads:
            loss_of(model, imgs, PIDS, siamese, camids).backward()
        assert not reads.calls
        with Reads() as reads:  # identities that are on the device already are read once
            loss_of(model, imgs, PIDS.to(META), siamese, camids).backward()
        assert reads.calls == ["cpu"]


def test_what_is_counted_as_a_read():
    there = torch.rand(3, device=META)
    with Reads() as reads:
        bool(there[0]), int(there[0]), there[0].item(), there.tolist(), there.cpu(), float(there[0])
    assert len(reads.calls) == 6
    with Reads(), pytest.raises(NotImplementedError):
        there.nonzero()
    with Reads(), pytest.raises(NotImplementedError):
        there.to("cpu")


def test_flops_of_a_step_are_at_the_floor():
    model = network("osnet_x0_25", (64, 32))
    imgs = torch.rand(8, 3, 64, 32)
    flops = {}
    for siamese in (None, SiameseAttentionLoss(), SiameseAttentionLoss(pairs=BatchPairs())):
        with FlopCounterMode(display=False) as counter:
            loss_of(model, imgs, siamese=siamese).backward()
        flops[siamese] = counter.get_total_flops()
        assert any("conv2" in name for name in counter.get_flop_counts())
    plain, rows, chosen = flops.values()
    assert rows == chosen
