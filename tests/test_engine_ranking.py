"""What the engine ranks, shows and explains: evaluation, TensorBoard, explained matches."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torchreid
from engines import SIZE, Backbone, make_engine, manager, seed_all
from torch.utils.data import DataLoader

import casn_plugin.engine
import casn_plugin.retrieval
from casn_plugin import CASN, ImageCASNEngine, Preprocessing
from casn_plugin.evaluation import Evaluation
from casn_plugin.explanation import FixedPairs, log_results
from casn_plugin.loading import encode_loader
from casn_plugin.ranked import ranked_lists
from casn_plugin.ranking import Compute, RankingOptions
from casn_plugin.retrieval import RANKINGS


@pytest.mark.parametrize("dist_metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalize_feature", [False, True])
@pytest.mark.parametrize("rerank", [False, True])
def test_features_alone_rank_as_torchreid_ranks_them(
    market_root, dist_metric, normalize_feature, rerank, capsys
):
    engine = make_engine(market_root)
    engine.casn.backbone.embed[0].weight.data *= 20  # features far enough apart for float32
    options = {"dist_metric": dist_metric, "normalize_feature": normalize_feature, "ranks": [1, 3]}
    options["rerank"] = rerank
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
    engine = make_engine(market_root, ranking=RankingOptions(normalization, 0.5))
    plain = engine.test()
    cmc = engine.results["market1501"]["fused"]["cmc"]
    assert plain == cmc[0] and type(plain) is float
    engine.test(rerank=True)
    assert engine.results["market1501"]["fused"]["mAP"] > 0


def test_a_gallery_on_disk_ranks_as_one_in_memory(market_root, tmp_path, capsys):
    engine = make_engine(market_root)
    engine.test()
    expected = engine.results
    on_disk = make_engine(
        market_root,
        ranking=RankingOptions(gallery_dir=str(tmp_path / "spill"), compute=Compute(2**20)),
    )
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
    engine = make_engine(market_root, ranking=RankingOptions(attention_weight=0.5))
    engine.test(normalize_feature=True)
    expected = engine.results["market1501"]
    short = make_engine(market_root, ranking=RankingOptions(attention_weight=0.5, shortlist=10**6))
    short.casn.load_state_dict(engine.casn.state_dict())
    short.test(normalize_feature=True)
    assert short.results["market1501"]["fused"]["mAP"] == pytest.approx(expected["fused"]["mAP"])
    short.ranking = RankingOptions(
        shortlist=1
    )  # the nearest stays the nearest, whatever its attention
    short.test(normalize_feature=True)
    assert short.results["market1501"]["fused"]["cmc"] == expected["features"]["cmc"]


def test_a_shortlist_goes_with_reranking(market_root):
    engine = make_engine(market_root)
    plain = engine.test(rerank=True), engine.results["market1501"]
    engine.ranking = RankingOptions(shortlist=10**6)
    assert (engine.test(rerank=True), engine.results["market1501"]) == plain
    engine.test()
    without = engine.results["market1501"]
    assert without["attention"] == plain[1]["attention"]  # which is not re-ranked
    assert without["fused"] != plain[1]["fused"] and without["features"] != plain[1]["features"]


def test_evaluation_is_that_of_torchreid_and_has_minp(market_root, monkeypatch, capsys):
    engine = make_engine(market_root)
    engine.casn.backbone.embed[0].weight.data *= 20  # features far enough apart for float32
    engine.test()
    printed = capsys.readouterr().out
    assert "mINP" in printed and "TAR@1%" in printed
    assert "-: no distance lets so few pairs of two people pass" in printed
    ours = engine.results["market1501"]
    assert 0 < ours["fused"]["mINP"] <= 1
    loaders = engine.test_loader["market1501"]
    queries, gallery = (np.array([row[1] for row in loaders[part].dataset.data])
                        for part in ("query", "gallery"))  # fmt: skip
    assert 100 <= (queries[:, None] != gallery).sum() < 1000
    for name in ("features", "fused"):  # of attention alone, too many distances are 0 here
        assert 0 <= ours[name]["TAR@1%"] <= 1 and math.isnan(ours[name]["TAR@0.1%"])

    def theirs(distmat, *ids, **counting):
        cmc, mean_ap = torchreid.metrics.evaluate_rank(distmat.numpy(), *ids)
        return Evaluation(cmc, float(mean_ap), 0.0, np.zeros(1), np.zeros(1, dtype=np.int64))

    monkeypatch.setattr(casn_plugin.retrieval, "evaluate_rank", theirs)
    engine.test()
    for name in ("features", "attention", "fused"):
        cmc = engine.results["market1501"][name]["cmc"]  # torchreid's ends with the shortest row
        assert cmc == ours[name]["cmc"][: len(cmc)] and len(cmc) > 5
        assert engine.results["market1501"][name]["mAP"] == pytest.approx(ours[name]["mAP"])


def test_without_weight_the_fused_ranking_is_that_of_the_features(market_root):
    engine = make_engine(market_root, ranking=RankingOptions("query", 0.0))
    engine.test()
    results = engine.results["market1501"]
    # but for thresholds: each query's nearest is at 0 in this reading
    results = {
        name: {what: value for what, value in found.items() if not what.startswith("TAR@")}
        for name, found in results.items()
        if name not in ("auc", "evidence")
    }
    assert results["fused"] == results["features"] != results["attention"]


def test_tensorboard_gets_every_term(market_root, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_engine(market_root).run(save_dir=str(tmp_path), max_epoch=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {f"Train/{name}" for name in ("loss", "loss_ide", "loss_ia", "loss_sa", "loss_bce",
                                           "attention_distance", "acc", "pair_acc")}  # fmt: skip
    for name in ("features", "attention", "fused"):
        wanted |= {f"Test/market1501/{name}/{what}" for what in ("rank1", "mAP")}
    assert wanted | {"Test/market1501/rank1", "Test/market1501/pair_auc"} <= tags


def test_tensorboard_gets_the_rates_that_are_known():
    figures = {"mAP": 0.5, "cmc": [0.25, 1.0], "TAR@1%": 0.75, "TAR@0.1%": math.nan}
    logged = {}
    writer = SimpleNamespace(add_scalar=lambda tag, value, _: logged.update({tag: value}))
    log_results(writer, "x", {**dict.fromkeys(RANKINGS, figures), "auc": 0.9}, 3)
    assert logged["Test/x/fused/TAR@1%"] == 0.75
    assert not any("TAR@0.1%" in tag for tag in logged)


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
    monkeypatch.setattr(casn_plugin.engine, "retrieve", None)
    explained = engine.explain(topk=3)
    results = engine.results["market1501"]
    assert len(explained) == 12
    assert (explained.ranked.truth_rank == 1).mean() == pytest.approx(results["fused"]["cmc"][0])
    assert np.nanmean(explained.ranked.ap) == pytest.approx(results["fused"]["mAP"])
    loaders = engine.test_loader["market1501"]
    again = casn_plugin.explain_ranking(engine.model, loaders["query"], loaders["gallery"], topk=10)
    # torchreid's loaders, and the fused distance of rank_gallery: the same lists
    np.testing.assert_array_equal(again.ranked.nearest, explained.ranked.nearest)
    # "by features" is the engine's own ranking by features, of which it gives CMC and mAP
    (qf, *q_ids), (gf, *g_ids) = (
        encode_loader(engine.casn, map(engine.parse_data_for_eval, loader))
        for loader in (loaders["query"], loaders["gallery"])
    )
    distmat = torchreid.metrics.compute_distance_matrix(qf.features, gf.features)
    by_features = ranked_lists(
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
    with pytest.raises(ValueError, match="topk must be at most 10, got 11"):
        engine.explain(topk=11)
    engine.siamese.row_threshold = 0.35
    assert engine.explain()[0].matches[0].pair.row_threshold == 0.35
    monkeypatch.undo()
    monkeypatch.setattr(casn_plugin.engine, "retrieve", None)
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

    # and so have those in TensorBoard, with the attention of their pairs
    assert engine.casn.preprocessing == Preprocessing(SIZE, mean, std)
    drawn = []
    engine.writer = SimpleNamespace(
        add_image=lambda tag, picture, *_, **__: drawn.append(picture), add_scalar=lambda *_: None
    )
    engine.max_epoch, engine.logged_pairs = 1, 3
    engine.train()
    sets = [engine.test_loader["market1501"][part].dataset for part in ("query", "gallery")]
    expected = FixedPairs(*sets, 3).mosaic(engine.casn)
    np.testing.assert_array_equal(drawn[0], expected)


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


def test_evaluation_leaves_the_random_state_as_found(market_root):
    engine = make_engine(market_root)
    seed_all(3)
    expected = torch.rand(1), np.random.rand(), random.random()
    seed_all(3)
    engine.test(use_metric_cuhk03=True)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected


def test_an_unknown_normalization_is_refused(unchecked):
    with pytest.raises(ValueError, match="'unit', 'query' or 'global', got 'max'"):
        RankingOptions(normalization="max")
