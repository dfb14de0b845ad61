"""Ranked lists: explained as they are ranked, with the truth where it stands."""

import copy
import dataclasses
import itertools

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TinyBackbone, tiny_forward
from planted import SIZE, detecting_casn, patched, people, tiny_casn
from torch import nn
from torch.utils.data import DataLoader

from casn_plugin import (
    CASN,
    Preprocessing,
    RankingOptions,
    explain_pair,
    explain_ranking,
    rank_gallery,
)
from casn_plugin.explanation import ExplainedRankings
from casn_plugin.loading import image_loader


@pytest.fixture
def detector():
    return detecting_casn()


@pytest.fixture
def tiny():
    return tiny_casn()


@pytest.mark.parametrize("topk", [1, 4])
def test_ranked_lists_are_those_of_rank_gallery(tiny, topk):
    query, gallery = people()[::3], people()
    explained = explain_ranking(
        tiny,
        query,
        gallery,
        topk=topk,
        ranking=RankingOptions(attention_weight=0.5),
        row_threshold=0.3,
    )
    assert len(explained) == 3 and len(explained[:2]) == 2
    encode = [tiny.encode(torch.stack([img for img, *_ in data])) for data in (query, gallery)]
    ranking = rank_gallery(
        tiny, *encode, topk=len(gallery), attention_weight=0.5, row_threshold=0.3
    )
    by_features = (
        nn.functional.normalize(encode[0].features)[:, None]
        - nn.functional.normalize(encode[1].features)
    ).norm(dim=2)
    for i, found in enumerate(explained):
        _, pid, camid = query[i]
        assert (found.query, found.pid, found.camid) == (i, pid, camid)
        junk = [g for g, (_, p, c) in enumerate(gallery) if (p, c) == (pid, camid)]
        order = [g for g in ranking.indices[i].tolist() if g not in junk]
        assert [match.row for match in found.matches] == order[:topk]
        kept = [g for g in by_features[i].argsort().tolist() if g not in junk]
        for match in (*found.matches, *filter(None, [found.truth])):
            assert match.rank == 1 + order.index(match.row)
            assert match.feature_rank == 1 + kept.index(match.row)
            assert match.right == (gallery[match.row][1] == pid) == bool(match.pair.same)
            assert (match.pid, match.camid) == gallery[match.row][1:]
            alone = explain_pair(tiny, query[i][0], gallery[match.row][0], row_threshold=0.3)
            assert match.pair.probability == pytest.approx(alone.probability, abs=1e-6)
            assert match.pair.row_threshold == 0.3
            torch.testing.assert_close(match.pair.first.attention, alone.first.attention)
            torch.testing.assert_close(match.pair.second.attention, alone.second.attention)
        assert (found.truth is None) == any(match.right for match in found.matches)


def test_a_failure_shows_where_the_truth_stands(detector):
    """The query is red: by features, other red people come before its own green picture."""
    red, green = patched(1, 1), PIL.Image.new("RGB", SIZE[::-1], (0, 255, 0))
    gallery = [(red, 2, 1), (red, 3, 1), (red, 2, 2), (green, 1, 1), (red, 1, 0)]
    query = [(red, 1, 0), (red, 2, 0)]
    explained = explain_ranking(detector, query, gallery, topk=2)
    (failure,) = explained.failures()
    assert failure.query == 0 and failure.failed and not explained[1].failed
    assert [match.right for match in failure.matches] == [False, False]
    moved = dataclasses.replace(explained.ranked, truth_feature_rank=np.array([9, 9]))
    data = [image_loader("people", each, Preprocessing(SIZE)).dataset for each in (query, gallery)]
    elsewhere = ExplainedRankings(detector, *data, moved, topk=2)[0].truth
    assert (elsewhere.rank, elsewhere.feature_rank) == (4, 9)
    success = explained[1]
    assert failure.found is failure.truth and success.found is success.matches[0]
    assert failure.truth.row == 3 and failure.truth.rank == 4 and failure.truth.right
    assert "wrong at rank 1, found at rank 4" in failure.headline()
    assert "rank 4 (by features 4): same person" in failure.describe()
    assert [each.query for each in explained.worst()] == [0, 1]
    assert [each.query for each in explained.best(1)] == [1]
    assert [each.query for each in explained.worst(1)] == [0] and not list(explained.failures(0))

    figure = failure.plot()
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "query"
    assert [title for title in titles if "person" in title] == [
        "✗ other person", "✗ other person", "✓ same person",
    ]  # fmt: skip
    framed = {
        axis.get_title(): axis.spines["top"].get_edgecolor()
        for axis in figure.axes
        if "person" in axis.get_title()
    }
    right, wrong = framed["✓ same person"], framed["✗ other person"]
    assert right[1] > 2 * right[0] and wrong[0] > 2 * wrong[1]  # green and red
    assert any("(features: 4)" in axis.get_xlabel() for axis in figure.axes)
    figure.canvas.draw()
    places = [axis.get_position() for axis in figure.axes if "person" in axis.get_title()]
    gaps = [after.x0 - before.x1 for before, after in itertools.pairwise(places)]
    assert gaps[1] > 2 * gaps[0]  # the truth stands apart
    assert failure._repr_html_().startswith("<img") and "truth" not in repr(failure)


def test_a_query_without_a_match_is_said_to_have_none(detector):
    red = patched(1, 1)
    explained = explain_ranking(detector, [(red, 1, 0), (red, 9, 0)], [(red, 1, 1), (red, 1, 0)])
    alone = explained[1]
    assert alone.truth is None and np.isnan(alone.ap) and "nobody to be found" in alone.headline()
    assert len(alone.matches) == 2 and len(explained[0].matches) == 1  # junk is left out
    assert [each.query for each in explained.worst()] == [0] and not list(explained.failures())
    assert alone.plot() and explained[0].plot()


def test_any_mean_and_std_is_undone(tiny):
    pair = patched(2, 1), PIL.Image.new("RGB", SIZE[::-1], (0, 255, 0))
    tiny.preprocessing = Preprocessing(SIZE, (0.1, 0.5, 0.9), (1.0, 0.5, 0.25))
    data = [(pair[0], 1, 0)], [(pair[1], 1, 1)]
    ranked = explain_ranking(tiny, *data)[0]
    np.testing.assert_allclose(ranked.picture, np.asarray(pair[0]) / 255, atol=1e-6)
    shown = ranked.matches[0].pair.second.picture
    np.testing.assert_allclose(shown, np.asarray(pair[1]) / 255, atol=1e-6)


def test_loaders_paths_and_tensors_are_ranked_alike(tiny, tmp_path):
    data = []
    for i, (row, pid) in enumerate(((0, 1), (3, 1), (5, 2), (7, 2))):
        patched(row, i).save(tmp_path / f"{i}.png")
        data.append((str(tmp_path / f"{i}.png"), pid, i % 2, 0))  # as torchreid's lists are
    loader = DataLoader(image_loader("people", data, Preprocessing(SIZE)).dataset, batch_size=3)
    by_path = explain_ranking(tiny, data, data)
    by_loader = explain_ranking(tiny, loader, loader)
    np.testing.assert_array_equal(by_path.ranked.nearest, by_loader.ranked.nearest)
    shortlist = explain_ranking(tiny, data, data, ranking=RankingOptions(shortlist=4))
    np.testing.assert_array_equal(by_path.ranked.nearest, shortlist.ranked.nearest)
    # a loader that shuffles or drops: rows are those of its data set all the same
    generator = torch.Generator().manual_seed(1)
    other = DataLoader(
        loader.dataset, batch_size=3, shuffle=True, drop_last=True, generator=generator
    )
    by_other = explain_ranking(tiny, other, other)
    np.testing.assert_array_equal(by_path.ranked.nearest, by_other.ranked.nearest)


def test_a_query_with_nothing_but_junk_is_shown_alone(tiny):
    (img, *_), *_ = people()
    alone = explain_ranking(tiny, [(img, 1, 0), (img, 1, 1)], [(img, 1, 0)])[0]
    assert not alone.matches and not alone.failed and alone.truth is None
    assert "nobody to be found. Nothing to compare with. Evidence: " in alone.describe()
    assert "Nothing to compare with" in alone._repr_html_()


def test_models_and_images_of_any_dtype_and_mode(tiny):
    query, gallery = people()[::3], people()
    expected = explain_ranking(tiny, query, gallery)
    wide = [(img.double(), pid, camid) for img, pid, camid in gallery]
    halved = [(img.half(), pid, camid) for img, pid, camid in gallery]
    assert explain_ranking(tiny, query, halved)[0].matches
    custom = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2))
    own = CASN(TinyBackbone(), forward=tiny_forward, pair_classifier=custom, input_size=SIZE)
    for model in (tiny, own):
        with torch.inference_mode():
            found = explain_ranking(model, query, gallery)
            assert found[0].plot() and explain_pair(model, query[0][0], gallery[1][0]).plot()
    double = copy.deepcopy(tiny).double()
    for images in (gallery, wide):
        again = explain_ranking(double, query, images)
        np.testing.assert_array_equal(again.ranked.nearest, expected.ranked.nearest)
    for call in (
        lambda model: explain_ranking(model, query, gallery),
        lambda model: explain_pair(model, query[0][0], query[1][0]),
    ):
        with pytest.raises(TypeError, match="needs float32 or wider"):
            call(copy.deepcopy(tiny).bfloat16())
    with pytest.raises(ValueError, match="must be finite"):
        explain_pair(tiny, query[0][0] * torch.nan, query[1][0])


def test_long_lists_and_shortlists(tiny):
    query, gallery = people(4)[::3], people(4)
    assert len(explain_ranking(tiny, query, gallery, topk=11)[0].matches) == 11
    others = [row for row in gallery if row[2]]  # no junk
    fused, listed = (
        explain_ranking(
            tiny,
            query,
            others,
            topk=8,
            ranking=RankingOptions(attention_weight=5.0, shortlist=shortlist),
        ).ranked.feature_ranks
        for shortlist in (None, 1)
    )
    assert (listed == np.arange(1, 9)).all() and (fused != np.arange(1, 9)).any()


@pytest.mark.parametrize(
    ("query", "gallery", "error", "message"),
    [
        ([], people(), ValueError, "query is empty"),
        (people(), [], ValueError, "gallery is empty"),
        ("query", people(), TypeError, "query must be a DataLoader or a sequence of"),
        (["a.png"], people(), TypeError, r"query must hold \(image, pid, camid\), got 'a.png'"),
        ([(torch.zeros(3, 8, 8), 1, 0), *people()], people(), ValueError, "must be of one size"),
        ([(people()[0][0], 0.5, 0)], people(), TypeError, "pids must be integers, got float64"),
    ],
)
def test_bad_data_is_refused(tiny, unchecked, query, gallery, error, message):
    with pytest.raises(error, match=message):
        explain_ranking(tiny, query, gallery)


def test_bad_lists_are_refused(tiny):
    explained = explain_ranking(tiny, people(), people())
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        explain_ranking(tiny, people(), people(), topk=0)
    with pytest.raises(ValueError, match="ranked lists of 9 queries for 3 queries"):
        ExplainedRankings(tiny, people()[:3], people(), explained.ranked)
    with pytest.raises(ValueError, match="a gallery longer than 3 images"):
        ExplainedRankings(tiny, people(), people()[:3], explained.ranked)
    with pytest.raises(ValueError, match="attention_weight must be >= 0 and finite, got -1.0"):
        explain_ranking(tiny, people(), people(), ranking=RankingOptions(attention_weight=-1.0))
    with pytest.raises(IndexError):
        explained[9]


@pytest.mark.parametrize("unknown", [-1, None])
def test_unknown_people_are_listed_without_a_verdict(tiny, unknown):
    """Five strangers of nobody's name are not one person."""
    query, gallery = people(), [(img, unknown, 1) for img, *_ in people()[:5]]
    explained = explain_ranking(tiny, [(query[0][0], unknown, 0), query[1]], gallery)
    for found in explained:
        assert [match.right for match in found.matches] == [None] * 5
        assert [match.rank for match in found.matches] == [1, 2, 3, 4, 5]
        assert found.found is None and not found.failed and np.isnan(found.ap)
        assert "? not known" in [axis.get_title() for axis in found.plot().axes]
        assert "rank 1" in found.describe() and "not known" in found.describe()
    assert explained[0].headline() == "Somebody unknown of camera 0: who it is, is not known"
    assert explained.ranked.worst() == []
    pair = explained[0].matches[0].pair
    assert pair.same is None and "it is" not in pair.headline()


def test_a_loader_without_labels_is_listed(tiny):
    imgs = torch.stack([img for img, *_ in people()[:6]])
    loader = torch.utils.data.DataLoader(list(imgs), batch_size=4)
    found = explain_ranking(tiny, loader, loader)[2]
    assert found.matches[0].row == 2 and found.matches[0].pid == found.matches[0].camid == -1
    assert found.headline() == "Somebody unknown: who it is, is not known"
    labelled = [(img, torch.tensor(pid)) for img, pid, _ in people()[:6]]
    listed = explain_ranking(tiny, torch.utils.data.DataLoader(labelled, batch_size=4), loader)
    assert listed[0].pid == people()[0][1]
