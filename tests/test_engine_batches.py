"""The engine on identity-balanced batches and with metric losses, beside torchreid's own."""

import importlib

import numpy as np
import pytest
import torch
import torchreid
from engines import SIZE, Backbone, Recorder, manager, seed_all
from pytorch_metric_learning import losses as metric_losses
from pytorch_metric_learning import miners
from torch import nn

from casn_plugin import (
    CASN,
    BatchPairs,
    ImageCASNEngine,
    MetricOptions,
    PairSampler,
    SiameseAttentionLoss,
)

# beartype draws from Python's random numbers, as torchreid's sampler does: where batches must be
# the same ones, it is off
drawn_alike = pytest.mark.usefixtures("unchecked")
BALANCED = {"train_sampler": "RandomIdentitySampler", "num_instances": 4}


def parts_of(root, build, *, options=BALANCED, more=()):
    """A data manager of identity-balanced batches, a model, and its optimizer, all seeded."""
    seed_all()
    datamanager = manager(root, pairs=False, **options)
    model = build(datamanager.num_train_pids)
    groups = [{"params": model.parameters()}, *({"params": each.parameters()} for each in more)]
    return datamanager, model, torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=1e-3)


def backbone(classes: int, loss: str) -> Backbone:
    net = Backbone(classes)
    net.loss = loss
    return net


def casn(loss: str = "triplet"):
    return lambda classes: CASN(backbone(classes, loss), input_size=SIZE, hidden_dim=16)


def balanced_engine(root, more=(), **kwargs) -> ImageCASNEngine:
    kwargs.setdefault("siamese", SiameseAttentionLoss(pairs=BatchPairs()))
    return ImageCASNEngine(*parts_of(root, casn(), more=more), None, **kwargs)


@drawn_alike
@pytest.mark.parametrize("loss", ["softmax", "triplet"])
@pytest.mark.parametrize(
    ("weight_t", "weight_x", "margin", "smooth"),
    [(1.0, 1.0, 0.3, True), (0.7, 1.0, 0.5, False), (1.0, 0.0, 0.3, True), (0.0, 0.5, 0.3, True)],
)
def test_without_lambdas_it_is_the_triplet_engine_step_for_step(
    market_root, loss, weight_t, weight_x, margin, smooth
):
    metric = MetricOptions(weight_t, weight_x, margin)
    datamanager, model, optimizer = parts_of(market_root, casn(loss))
    engine = ImageCASNEngine(
        datamanager, model, optimizer, label_smooth=smooth, lambda_ia=0.0, lambda_sa=0.0,
        metric=metric,
    )  # fmt: skip
    rest = parts_of(market_root, lambda classes: backbone(classes, "triplet"))
    theirs = torchreid.engine.ImageTripletEngine(
        *rest, margin=margin, weight_t=weight_t, weight_x=weight_x, label_smooth=smooth
    )
    assert isinstance(theirs.criterion_t, hard_mine_triplet_loss())
    recorders = Recorder(engine), Recorder(theirs)
    for each in (engine, theirs):
        seed_all(1)
        each.max_epoch, each.writer = 2, None
        for each.epoch in range(2):
            each.train(print_freq=100)
    mine, others = recorders
    assert len(mine.steps) == len(others.steps) > 4
    for name, other in (("loss_t", "loss_t"), ("loss_ide", "loss_x"), ("acc", "acc")):
        if other in others.steps[0]:
            assert mine.of(name) == others.of(other)
    assert ("loss_t" in mine.steps[0]) == bool(weight_t)
    assert ("loss_ide" in mine.steps[0]) == bool(weight_x)
    for one, other in zip(model.backbone.parameters(), rest[1].parameters(), strict=True):
        assert torch.equal(one, other)


def hard_mine_triplet_loss() -> type:
    """torchreid's own, wherever this torchreid keeps it."""
    name = torchreid.losses.TripletLoss.__module__
    assert name.endswith("hard_mine_triplet_loss")
    return importlib.import_module(name).TripletLoss


def test_balanced_batches_train_everything_at_once(market_root, tmp_path):
    engine = balanced_engine(market_root, metric=MetricOptions(weight_t=0.5))
    recorder = Recorder(engine)
    engine.run(max_epoch=1, save_dir=str(tmp_path))
    for step in recorder.steps:
        total = step["loss_ide"] + 0.5 * step["loss_t"]
        total += 0.5 * step["loss_ia"] + 0.05 * step["loss_sa"]
        assert step["loss"] == pytest.approx(total, rel=1e-5)
    assert {"loss_t", "loss_sa", "pair_acc"} <= set(engine.history[0])
    assert 0 < engine.results["market1501"]["fused"]["mAP"] <= 1


def test_cameras_reach_the_choice_of_pairs(market_root, monkeypatch):
    seen = []

    def draw(self, pids, camids=None):
        seen.append((pids.tolist(), camids.tolist()))
        return torch.tensor([[0, 1]])

    monkeypatch.setattr(BatchPairs, "draw", draw)
    engine = balanced_engine(market_root)
    data = next(iter(engine.train_loader))
    engine.forward_backward(data)
    assert seen == [(data["pid"].tolist(), data["camid"].tolist())]
    assert len(set(seen[0][1])) > 1


@drawn_alike
def test_resuming_gives_the_losses_of_an_uninterrupted_run(market_root, tmp_path):
    """The proxies of a metric loss, and the pairs, go on too."""

    def make():
        torch.manual_seed(0)
        proxies = metric_losses.ProxyAnchorLoss(4, 6)
        metric = MetricOptions(metric_loss=proxies)
        return balanced_engine(market_root, [proxies], metric=metric), proxies

    whole, expected_proxies = make()
    expected = Recorder(whole)
    before = expected_proxies.proxies.detach().clone()
    whole.run(save_dir=str(tmp_path / "whole"), max_epoch=2, eval_freq=-1)
    assert not torch.equal(expected_proxies.proxies, before)
    first, _ = make()
    first.run(save_dir=str(tmp_path / "part"), max_epoch=1)
    second, proxies = make()
    seed_all(99)
    nn.init.zeros_(proxies.proxies)
    resumed = Recorder(second)
    start = second.resume(tmp_path / "part")
    second.run(save_dir=str(tmp_path / "part"), start_epoch=start, max_epoch=2)
    assert resumed.steps == expected.steps[len(expected.steps) // 2 :]
    assert torch.equal(proxies.proxies, expected_proxies.proxies)
    with pytest.raises(ValueError, match="of another metric loss"):
        balanced_engine(market_root).resume(tmp_path / "part")


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_miner_of_pytorch_metric_learning(market_root, autocast):
    metric = MetricOptions(
        metric_loss=metric_losses.TripletMarginLoss(), miner=miners.BatchHardMiner()
    )
    engine = balanced_engine(market_root, metric=metric, autocast=autocast)
    terms = [engine.forward_backward(data) for data in engine.train_loader]
    assert np.isfinite([list(each.values()) for each in terms]).all()
    assert max(each["loss_t"] for each in terms) > 0


def test_a_batch_without_a_pair_is_a_step_like_any_other(market_root):
    options = {"train_sampler": "SequentialSampler"}
    datamanager, model, optimizer = parts_of(market_root, casn(), options=options)
    siamese = SiameseAttentionLoss(pairs=BatchPairs(positive_fraction=1.0))
    engine = ImageCASNEngine(datamanager, model, optimizer, siamese=siamese)
    data = next(iter(engine.train_loader))
    rows = [int((data["pid"] == pid).nonzero()[0]) for pid in data["pid"].unique()]
    single = {name: [value[row] for row in rows] if isinstance(value, list) else value[rows]
              for name, value in data.items()}  # fmt: skip
    terms = engine.forward_backward(single)
    assert terms["loss_sa"] == terms["pair_acc"] == 0 and terms["loss"] > 0


def test_what_a_batch_is_is_said_or_refused(market_root):
    datamanager, model, optimizer = parts_of(market_root, casn())
    message = r"SiameseAttentionLoss\(pairs=BatchPairs\(\)\) .* that RandomIdentitySampler draws"
    for siamese in (None, SiameseAttentionLoss()):
        with pytest.raises(ValueError, match=message):
            ImageCASNEngine(datamanager, model, optimizer, siamese=siamese)
    chosen = SiameseAttentionLoss(pairs=BatchPairs())
    ImageCASNEngine(PairSampler.install(datamanager), model, optimizer, siamese=chosen)
    metric = MetricOptions(metric_loss=metric_losses.ProxyAnchorLoss(4, 6))
    message = "lacks 1 of .*, metric_loss.proxies among them: .*a metric loss as another group"
    with pytest.raises(ValueError, match=message):
        ImageCASNEngine(datamanager, model, optimizer, metric=metric)


def test_data_parallel_chooses_pairs_of_each_replicas_own_rows(market_root):
    datamanager, model, optimizer = parts_of(market_root, casn())
    siamese = SiameseAttentionLoss(pairs=BatchPairs())
    wrapped = nn.DataParallel(model)
    if torch.cuda.is_available():
        wrapped = wrapped.cuda()
    engine = ImageCASNEngine(datamanager, wrapped, optimizer, siamese=siamese)
    assert engine.forward_backward(next(iter(engine.train_loader)))["loss_sa"] > 0
