"""CASN inside the torchreid engine: its run() and all that it takes."""

import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torchreid
from conftest import MOBILENET, WARD, TinyBackbone, tiny_forward
from torch import nn
from torch.utils.data import DataLoader

import casn_plugin.engine
from casn_plugin import (
    CASN,
    IdentificationAttentionLoss,
    ImageCASNEngine,
    PairSampler,
    SiameseAttentionLoss,
)
from casn_plugin.engine import EMBEDDED_DATASET
from casn_plugin.evaluation import Evaluation
from casn_plugin.ranking import pair_attention
from casn_plugin.visualization import denormalize, pair_mosaic

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


def make_engine(root: Path, *, scheduler: bool = True, wrap=lambda model: model, **kwargs):
    seed_all()
    datamanager = manager(root)
    model = CASN(Backbone(datamanager.num_train_pids), input_size=SIZE, hidden_dim=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
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


def test_three_lines(market_root, tmp_path, capsys):
    datamanager = torchreid.data.ImageDataManager(
        root=str(market_root), sources="market1501", height=64, width=32, batch_size_train=8,
        workers=0, use_gpu=False,
    )  # fmt: skip
    backbone = torchreid.models.build_model(
        "osnet_x0_25", datamanager.num_train_pids, pretrained=False, use_gpu=False
    )
    model = CASN(backbone)
    datamanager = PairSampler.install(datamanager)
    optimizer = torchreid.optim.build_optimizer(model, lr=0.001)
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, stepsize=1)
    engine = ImageCASNEngine(datamanager, model, optimizer, scheduler)
    engine.run(max_epoch=2, save_dir=str(tmp_path), print_freq=1, eval_freq=1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("features", "attention", "fused", "mAP", "Rank-1 "))
    assert "AUC" in printed and "loss_ia" in printed
    results = engine.results["market1501"]
    assert set(results) == {"features", "attention", "fused", "auc"}
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model.pth.tar-1", "model.pth.tar-2",
    ]  # fmt: skip
    assert [entry["epoch"] for entry in engine.history] == [1, 2]


def test_without_lambdas_it_is_the_softmax_engine_step_for_step(market_root, tmp_path):
    engine = make_engine(market_root, lambda_ia=0.0, lambda_sa=0.0)
    mine = Recorder(engine)
    seed_all(1)
    engine.run(max_epoch=2, save_dir=str(tmp_path / "mine"))

    seed_all()
    datamanager = manager(market_root)
    backbone = Backbone(datamanager.num_train_pids)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    plain = torchreid.engine.ImageSoftmaxEngine(datamanager, backbone, optimizer, scheduler)
    theirs = Recorder(plain)
    seed_all(1)
    plain.run(max_epoch=2, save_dir=str(tmp_path / "theirs"), ranks=[1])
    assert len(mine.steps) == len(theirs.steps) > 4
    assert mine.of("loss") == theirs.of("loss") and mine.of("acc") == theirs.of("acc")
    for one, other in zip(engine.casn.backbone.parameters(), backbone.parameters(), strict=True):
        assert torch.equal(one, other)
    rank1 = plain.test(ranks=[1])
    assert engine.results["market1501"]["features"]["cmc"][0] == pytest.approx(rank1)


@pytest.mark.parametrize("dist_metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalize_feature", [False, True])
def test_features_alone_rank_as_torchreid_ranks_them(
    market_root, dist_metric, normalize_feature, capsys
):
    engine = make_engine(market_root)
    options = {"dist_metric": dist_metric, "normalize_feature": normalize_feature, "ranks": [1, 3]}
    engine.test(**options)
    ours = engine.results["market1501"]["features"]
    plain = torchreid.engine.ImageSoftmaxEngine(
        engine.datamanager, engine.casn, engine.optimizer, use_gpu=False
    )
    capsys.readouterr()
    rank1 = plain.test(**options)
    assert ours["cmc"][0] == pytest.approx(rank1)
    assert f"mAP: {ours['mAP']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("normalization", ["unit", "query", "global"])
def test_every_reading_of_normalized_ranks_and_reranks(market_root, normalization):
    engine = make_engine(market_root, normalization=normalization, attention_weight=0.5)
    plain = engine.test()
    cmc = engine.results["market1501"]["fused"]["cmc"]
    assert plain == cmc[0] and type(plain) is float
    engine.test(rerank=True)
    assert engine.results["market1501"]["fused"]["mAP"] > 0


def test_a_gallery_on_disk_ranks_as_one_in_memory(market_root, tmp_path, capsys):
    engine = make_engine(market_root)
    engine.test()
    expected = engine.results
    on_disk = make_engine(market_root, gallery_dir=str(tmp_path / "spill"), max_memory=2**20)
    on_disk.casn.load_state_dict(engine.casn.state_dict())
    capsys.readouterr()
    for rerank in (False, True):
        on_disk.test(rerank=rerank)
        assert str(tmp_path / "spill") in capsys.readouterr().out
        assert list((tmp_path / "spill").iterdir()) == []
        if not rerank:
            for name in ("features", "attention", "fused"):
                for measure in ("mAP", "mINP"):
                    assert on_disk.results["market1501"][name][measure] == pytest.approx(
                        expected["market1501"][name][measure], abs=1e-6
                    )


def test_a_shortlist_as_long_as_the_gallery_changes_nothing(market_root):
    engine = make_engine(market_root, attention_weight=0.5)
    engine.test(normalize_feature=True)
    expected = engine.results["market1501"]
    short = make_engine(market_root, attention_weight=0.5, topk=10**6)
    short.casn.load_state_dict(engine.casn.state_dict())
    short.test(normalize_feature=True)
    assert short.results["market1501"]["fused"]["mAP"] == pytest.approx(expected["fused"]["mAP"])
    short.topk = 1  # the nearest stays the nearest, whatever its attention
    short.test(normalize_feature=True)
    assert short.results["market1501"]["fused"]["cmc"] == expected["features"]["cmc"]


def test_a_shortlist_goes_with_unit_length_and_without_reranking(market_root):
    with pytest.raises(ValueError, match="topk needs normalization='unit', got 'query'"):
        make_engine(market_root, normalization="query", topk=5)
    with pytest.raises(ValueError, match="topk must be None"):
        make_engine(market_root, topk=5).test(rerank=True)


def test_evaluation_is_that_of_torchreid_and_has_minp(market_root, monkeypatch, capsys):
    engine = make_engine(market_root)
    engine.test()
    assert "mINP" in capsys.readouterr().out
    ours = engine.results["market1501"]
    assert 0 < ours["fused"]["mINP"] <= 1

    def theirs(distmat, *ids):
        cmc, mean_ap = torchreid.metrics.evaluate_rank(distmat.numpy(), *ids)
        return Evaluation(cmc, float(mean_ap), 0.0, np.zeros(1), np.zeros(1, dtype=np.int64))

    monkeypatch.setattr(casn_plugin.engine, "evaluate_rank", theirs)
    engine.test()
    for name in ("features", "attention", "fused"):
        cmc = engine.results["market1501"][name]["cmc"]  # torchreid's ends with the shortest row
        assert cmc == ours[name]["cmc"][: len(cmc)] and len(cmc) > 5
        assert engine.results["market1501"][name]["mAP"] == pytest.approx(ours[name]["mAP"])


def test_without_weight_the_fused_ranking_is_that_of_the_features(market_root):
    engine = make_engine(market_root, normalization="query", attention_weight=0.0)
    engine.test()
    results = engine.results["market1501"]
    assert results["fused"] == results["features"] != results["attention"]


def test_run_arguments_do_what_torchreid_documents(market_root, tmp_path, capsys):
    engine = make_engine(market_root, scheduler=False)
    assert engine.run(test_only=True, save_dir=str(tmp_path), visrank=True, visrank_topk=3) is None
    assert len(list((tmp_path / "visrank_market1501").iterdir())) == 12
    with pytest.raises(ValueError, match="visrank"):
        engine.run(visrank=True, max_epoch=1, save_dir=str(tmp_path))
    engine.run(
        save_dir=str(tmp_path), max_epoch=3, start_eval=2, eval_freq=1, use_metric_cuhk03=True,
        ranks=[1, 2, 500],
    )  # fmt: skip
    assert sorted(path.name[-1] for path in (tmp_path / "model").iterdir()) == ["2", "3"]
    printed = capsys.readouterr().out
    assert "Rank-2 " in printed and "Rank-500" not in printed


def test_fixbase_trains_the_open_layers_only(market_root, tmp_path):
    engine = make_engine(market_root)
    before = {name: p.detach().clone() for name, p in engine.casn.named_parameters()}
    engine.run(
        save_dir=str(tmp_path), max_epoch=1, fixbase_epoch=1,
        open_layers=["classifier", "pair_classifier"],
    )  # fmt: skip
    changed = {
        name for name, p in engine.casn.named_parameters() if not torch.equal(p, before[name])
    }
    assert {name.split(".")[-3 if "pair" in name else -2] for name in changed} == {
        "classifier", "pair_classifier",
    }  # fmt: skip


def test_tensorboard_gets_every_term(market_root, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_engine(market_root).run(save_dir=str(tmp_path), max_epoch=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {f"Train/{name}" for name in ("loss", "loss_ide", "loss_ia", "loss_sa", "loss_bce",
                                           "attention_distance", "acc", "pair_acc")}  # fmt: skip
    for name in ("features", "attention", "fused"):
        wanted |= {f"Test/market1501/{name}/rank1", f"Test/market1501/{name}/mAP"}
    assert wanted | {"Test/market1501/rank1", "Test/market1501/pair_auc"} <= tags


def images_logged(folder: Path) -> dict[str, list]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


def test_tensorboard_shows_the_attention_of_fixed_pairs_every_epoch(market_root, tmp_path):
    engine = make_engine(market_root, logged_pairs=3)
    seed_all(1)
    engine.run(save_dir=str(tmp_path / "logged"), max_epoch=3)
    ((tag, events),) = images_logged(tmp_path / "logged").items()
    assert tag == "Attention/market1501" and [event.step for event in events] == [1, 2, 3]
    raw = [np.frombuffer(event.encoded_image_string, np.uint8) for event in events]
    shown = [cv2.imdecode(each, cv2.IMREAD_COLOR)[..., ::-1] for each in raw]
    rows, columns = SIZE
    assert shown[0].shape == (3 * (rows + 6), 4 * (columns + 4) + 4, 3)
    for tile in (np.s_[2 : 2 + rows, 2 : 2 + columns], np.s_[2 : 2 + rows, -2 - columns : -2]):
        assert (shown[0][tile] == shown[2][tile]).all()  # the same pairs
    assert (shown[0] != shown[2]).any()  # looked at otherwise
    # the first picture is the query's file, un-normalised
    same = engine._logged[2]
    assert same == [True, False, True]
    files = [row[0] for row in engine.test_loader["market1501"]["query"].dataset.data]
    sized = [cv2.resize(cv2.imread(file)[..., ::-1], SIZE[::-1], interpolation=cv2.INTER_AREA)
             for file in files]  # fmt: skip
    difference = [np.abs(shown[0][2 : 2 + rows, 2 : 2 + columns] - each.astype(float)).mean()
                  for each in sized]  # fmt: skip
    assert min(difference) < 12 and sorted(difference)[1] > 15

    with pytest.raises(ValueError, match="logged_pairs must be >= 0, got -1"):
        make_engine(market_root, logged_pairs=-1)
    # and looking changes nothing of the training
    plain = make_engine(market_root, logged_pairs=0)
    seed_all(1)
    plain.run(save_dir=str(tmp_path / "plain"), max_epoch=3)
    assert not images_logged(tmp_path / "plain")
    assert plain.history == engine.history and plain.results == engine.results


def test_matches_are_explained_without_ranking_again(market_root, tmp_path, monkeypatch):
    engine = make_engine(market_root)
    with pytest.raises(ValueError, match=r"engine.run\(\) .* one of \[\], got None"):
        engine.explain()
    engine.casn.backbone.embed[0].weight.data *= 20  # features far enough apart for float32
    engine.test()
    monkeypatch.setattr(casn_plugin.engine, "attention_distmat", None)
    explained = engine.explain(topk=3)
    results = engine.results["market1501"]
    assert len(explained) == 12
    assert (explained.ranked.truth_rank == 1).mean() == pytest.approx(results["fused"]["cmc"][0])
    assert np.nanmean(explained.ranked.ap) == pytest.approx(results["fused"]["mAP"])
    loaders = engine.test_loader["market1501"]
    again = casn_plugin.explain_ranking(
        engine.model, loaders["query"], loaders["gallery"], topk=10, attention_weight=0.1
    )
    # torchreid's loaders, and the fused distance of rank_gallery: the same lists
    np.testing.assert_array_equal(again.ranked.nearest, explained.ranked.nearest)
    # "by features" is the engine's own ranking by features, of which it gives CMC and mAP
    (qf, *q_ids), (gf, *g_ids) = (
        casn_plugin.model.encode_batches(engine.casn, map(engine.parse_data_for_eval, loader))
        for loader in (loaders["query"], loaders["gallery"])
    )
    distmat = torchreid.metrics.compute_distance_matrix(qf.features, gf.features)
    by_features = casn_plugin.evaluation.ranked_lists(
        distmat, distmat, q_ids[0], g_ids[0], q_ids[1], g_ids[1], topk=len(gf)
    ).nearest
    expected = [
        [1 + by_features[q].tolist().index(g) for g in row if g >= 0]
        for q, row in enumerate(explained.ranked.nearest.tolist())
    ]
    assert [[rank for rank in row if rank] for row in explained.ranked.feature_ranks] == expected
    for one, other in zip(explained[:2], again[:2], strict=True):
        assert len(one.matches) == 3 and one.matches[0].row == other.matches[0].row
    by_path = casn_plugin.explain_ranking(
        engine.model, loaders["query"].dataset.data, loaders["gallery"].dataset.data, topk=10
    )
    # files are read and resized as torchreid does
    np.testing.assert_array_equal(by_path.ranked.nearest, explained.ranked.nearest)
    with pytest.raises(ValueError, match=r"one of \['market1501'\], got 'other'"):
        engine.explain("other")
    with pytest.raises(ValueError, match=r"topk must lie in \[1, 10\], got 11"):
        engine.explain(topk=11)
    engine.siamese.threshold = 0.35
    assert engine.explain()[0].matches[0].pair.threshold == 0.35
    monkeypatch.undo()
    monkeypatch.setattr(casn_plugin.engine, "evaluate_rank", None)
    with pytest.raises(TypeError):
        engine.test()
    with pytest.raises(ValueError, match=r"one of \[\]"):  # nothing of an evaluation that failed
        engine.explain()


def test_explained_pictures_have_their_own_colours(market_root):
    mean, std = [0.2, 0.3, 0.4], [0.5, 0.6, 0.7]
    pictures = []
    for options in ({}, {"norm_mean": mean, "norm_std": std}):
        datamanager = manager(market_root, **options)
        model = CASN(Backbone(datamanager.num_train_pids), input_size=SIZE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = ImageCASNEngine(datamanager, model, optimizer)
        engine.test()
        pictures.append(engine.explain()[0].picture)
    np.testing.assert_allclose(*pictures, atol=1e-6)

    drawn = []  # and so have those in TensorBoard, with the attention of their pairs
    engine.writer = SimpleNamespace(add_image=lambda tag, picture, *_, **__: drawn.append(picture))
    engine._log_attention()
    first, second, same = engine._logged
    maps = pair_attention(engine.casn, engine.casn.encode(first), engine.casn.encode(second))
    shown = (denormalize(imgs, mean, std) for imgs in (first, second))
    np.testing.assert_array_equal(drawn[0], pair_mosaic(*shown, *maps, same))


def test_data_sets_that_are_not_torchreids_are_trained_on_and_explained(market_root, tmp_path):
    """They list no images, and transforms may be of any kind, or not there."""
    engine = make_engine(market_root)
    engine.test_loader["market1501"] = {
        part: DataLoader([loader.dataset[i] for i in range(len(loader.dataset))], batch_size=4)
        for part, loader in engine.test_loader["market1501"].items()
    }
    normalize = engine.datamanager.transform_te.transforms[-1]
    with pytest.warns(UserWarning, match="no attention is drawn to TensorBoard"):
        engine.run(save_dir=str(tmp_path), max_epoch=2)
    assert not images_logged(tmp_path)
    shown = []
    for transform in (engine.datamanager.transform_te, normalize):
        engine.datamanager.transform_te = transform
        shown.append(engine.explain()[0].picture)
    del engine.datamanager.transform_te
    shown.append(engine.explain()[0].picture)
    for picture in shown[1:]:
        np.testing.assert_array_equal(picture, shown[0])


def test_pairs_to_log_are_fixed_and_of_both_kinds():
    fixed = casn_plugin.engine._fixed_pairs
    query = [(f"q{pid}", pid, 0, 0) for pid in (1, 1, 2, 3)]
    gallery = [(f"g{pid}{camid}", pid, camid, 0) for pid in (1, 2, 3) for camid in (0, 1)]
    pairs = fixed(query, gallery, 8)
    assert pairs == fixed(query, gallery, 8) and len(pairs) == 8
    for i, (row, column) in enumerate(pairs):
        assert (query[row][1] == gallery[column][1]) == (i % 2 == 0)
        assert i % 2 or gallery[column][2] != query[row][2]
    assert fixed(query[:1], gallery[:1], 2) == [(0, 0), (0, 0)]  # nothing else is there
    assert fixed(query, gallery, 0) == []


@pytest.mark.parametrize("scheduler", [True, False])
def test_resuming_gives_the_losses_of_an_uninterrupted_run(market_root, tmp_path, scheduler):
    whole = make_engine(market_root, scheduler=scheduler)
    expected = Recorder(whole)
    whole.run(save_dir=str(tmp_path / "whole"), max_epoch=4)

    first = make_engine(market_root, scheduler=scheduler)
    first.run(save_dir=str(tmp_path / "part"), max_epoch=2)
    path = tmp_path / "part" / "model" / "model.pth.tar-2"
    checkpoint = torch.load(path, weights_only=True)  # nothing that safe loading rejects
    assert "pair_classifier.0.weight" in checkpoint["state_dict"]

    second = make_engine(market_root, scheduler=scheduler)
    seed_all(99)
    resumed = Recorder(second)
    start = second.resume(str(path))
    assert start == 2
    second.run(save_dir=str(tmp_path / "part"), start_epoch=start, max_epoch=4)
    assert resumed.steps == expected.steps[len(expected.steps) // 2 :]
    assert second.results == whole.results and second.history == whole.history
    for one, other in zip(whole.casn.parameters(), second.casn.parameters(), strict=True):
        assert torch.equal(one, other)


def test_foreign_checkpoints_are_refused(market_root, tmp_path):
    engine = make_engine(market_root)
    with pytest.raises(FileNotFoundError):
        engine.resume(str(tmp_path / "nothing"))
    torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"lacks \['history', 'optimizer'"):
        engine.resume(str(tmp_path / "foreign"))
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    path = tmp_path / "model" / "model.pth.tar-1"
    other = make_engine(market_root)
    other.casn.backbone.classifier = nn.Linear(6, 77)
    with pytest.raises(ValueError, match="of another model"):
        other.resume(str(path))
    checkpoint = torch.load(path, weights_only=True)
    for group in checkpoint["optimizer"]["param_groups"]:
        del group["momentum"]  # as Adam's have none
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"its optimizer lacks \['momentum'\]"):
        make_engine(market_root).resume(str(path))


def test_evaluation_leaves_the_random_state_as_found(market_root):
    engine = make_engine(market_root)
    seed_all(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    seed_all(3)
    engine.test(use_metric_cuhk03=True)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_settings_reach_training(market_root, tmp_path):
    """Warm-up, weights, scores and the pair classifier's own learning rate."""
    engine = make_engine(
        market_root, lambda_ia=0.3, lambda_sa=0.7, ia_start_epoch=1,
        identification=IdentificationAttentionLoss("logit"),
        siamese=SiameseAttentionLoss(attention_weight=0.4, both_orders=False),
    )  # fmt: skip
    recorder = Recorder(engine)
    engine.run(save_dir=str(tmp_path), max_epoch=2)
    per_epoch = len(recorder.steps) // 2
    assert all("loss_ia" not in step for step in recorder.steps[:per_epoch])
    for step in recorder.steps[per_epoch:]:
        loss_sa = step["loss_bce"] + 0.4 * step["attention_distance"]
        assert step["loss_sa"] == pytest.approx(loss_sa, rel=1e-5)
        expected = step["loss_ide"] + 0.3 * step["loss_ia"] + 0.7 * step["loss_sa"]
        assert step["loss"] == pytest.approx(expected, rel=1e-5)
    steps = []
    for factor in (1.0, 3.0):
        engine = make_engine(market_root, pair_lr_mult=factor)
        weight = engine.casn.pair_classifier[0].weight
        before = weight.detach().clone()
        engine.forward_backward(next(iter(engine.train_loader)))
        steps.append(weight.detach() - before)
    torch.testing.assert_close(steps[1], 3 * steps[0], rtol=1e-3, atol=1e-7)


def test_autocast_on_the_cpu(market_root, tmp_path):
    engine = make_engine(market_root, autocast=torch.bfloat16)
    recorder = Recorder(engine)
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    assert np.isfinite(recorder.of("loss")).all()


def test_two_targets_and_several_sources(market_root, tmp_path, monkeypatch):
    """Source and target differ; the embedded data set is registered under its name."""
    from casn_plugin.engine import EmbeddedPedestrians

    monkeypatch.setattr(
        EmbeddedPedestrians, "options",
        {"num_train_pids": 4, "num_test_pids": 4, "images_per_camera": 2, "height": 48,
         "width": 24, "progress": False},
    )  # fmt: skip
    monkeypatch.setenv("CASN_PLUGIN_CACHE", str(tmp_path))
    datamanager = torchreid.data.ImageDataManager(
        root="", sources=EMBEDDED_DATASET, height=SIZE[0], width=SIZE[1],
        batch_size_train=8, workers=0, use_gpu=False,
    )  # fmt: skip
    assert datamanager.num_train_pids == 4 and datamanager.num_train_cams == 4
    assert len(datamanager.test_dataset[EMBEDDED_DATASET]["query"]) == 16


def test_bad_input_says_what_was_expected(market_root):
    datamanager = manager(market_root, pairs=False)
    backbone = Backbone(4)
    model = CASN(backbone, input_size=SIZE, hidden_dim=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(TypeError, match="must be a CASN.*got Backbone"):
        ImageCASNEngine(datamanager, backbone, optimizer)
    with pytest.raises(ValueError, match=r"PairSampler\.install\(datamanager\)"):
        ImageCASNEngine(datamanager, model, optimizer)
    ImageCASNEngine(datamanager, model, optimizer, lambda_sa=0.0)  # needs no pairs
    PairSampler.install(datamanager)
    with pytest.raises(ValueError, match="lacks the pair classifier"):
        ImageCASNEngine(datamanager, model, torch.optim.SGD(backbone.parameters(), lr=0.1))
    several = PairSampler.install(manager(market_root, pairs=False, k_tfm=2))
    engine = ImageCASNEngine(several, model, optimizer)
    with pytest.raises(ValueError, match="k_tfm must be 1"):
        engine.forward_backward(next(iter(engine.train_loader)))


def test_an_unknown_normalization_is_refused(market_root, unchecked):
    with pytest.raises(ValueError, match="'unit', 'query' or 'global', got 'max'"):
        make_engine(market_root, normalization="max")


def test_data_parallel_without_devices_and_its_checkpoint(market_root, tmp_path):
    """nn.DataParallel on the CPU calls the module; checkpoints keep the plain names."""
    engine = make_engine(market_root, wrap=nn.DataParallel)
    if torch.cuda.is_available():
        pytest.skip("runs the CPU path")
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    checkpoint = torch.load(tmp_path / "model" / "model.pth.tar-1", weights_only=True)
    assert "features.0.weight" in checkpoint["state_dict"]
    assert make_engine(market_root).resume(str(tmp_path / "model" / "model.pth.tar-1")) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parallel", [False, True])
def test_on_cuda(market_root, tmp_path, autocast, parallel):
    wrap = (lambda model: nn.DataParallel(model.cuda())) if parallel else lambda m: m.cuda()
    engine = make_engine(market_root, wrap=wrap, autocast=autocast)
    recorder = Recorder(engine)
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    assert np.isfinite(recorder.of("loss")).all()


@pytest.mark.skipif(not WARD.exists(), reason=f"WARD is not at {WARD}")
@pytest.mark.skipif(not MOBILENET.exists(), reason=f"no weights at {MOBILENET}")
def test_real_pictures_with_pretrained_weights(tmp_path):
    """One epoch on WARD finds its people, with features, attention and both."""
    from torchvision.models import mobilenet_v2

    datamanager = torchreid.data.ImageDataManager(
        root=str(WARD), sources="market1501", height=96, width=48, batch_size_train=32,
        batch_size_test=128, workers=0, use_gpu=False,
    )  # fmt: skip
    seed_all()
    net = mobilenet_v2()
    net.load_state_dict(torch.load(MOBILENET, weights_only=True))
    net.classifier[1] = nn.Linear(1280, datamanager.num_train_pids)

    def forward(net, imgs):
        features = net.features(imgs).mean((2, 3))
        return net.classifier(features), features

    model = CASN(net, forward=forward, input_size=(96, 48))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    engine = ImageCASNEngine(
        PairSampler.install(datamanager), model, optimizer, use_gpu=False, pair_lr_mult=20.0
    )
    engine.run(save_dir=str(tmp_path), max_epoch=1)
    results = engine.results["market1501"]
    assert results["features"]["mAP"] > 0.15 and results["fused"]["mAP"] > 0.15  # chance is 0.03
    assert results["auc"] > 0.6


def test_both_layouts_of_torchreid(tmp_path):
    """GitHub's torchreid keeps in torchreid/* what PyPI's keeps in torchreid/reid/*."""
    root = Path(torchreid.__file__).parent
    if (root / "reid").is_dir():  # PyPI's is installed: lay it out as GitHub's
        target = tmp_path / "torchreid"
        shutil.copytree(root / "reid", target, ignore=shutil.ignore_patterns("__pycache__"))
        for file in target.rglob("*.py"):
            file.write_text(file.read_text().replace("torchreid.reid", "torchreid"))
        (target / "__init__.py").write_text(
            "from torchreid import data, engine, losses, metrics, models, optim, utils\n"
        )
    else:
        pytest.skip("GitHub's torchreid is installed: the other tests run on its layout")
    script = (
        "import torchreid, casn_plugin; from casn_plugin import ImageCASNEngine;"
        f"assert torchreid.__file__.startswith({str(tmp_path)!r});"
        "assert ImageCASNEngine.__mro__[1].__module__ == 'torchreid.engine.image.softmax'"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
