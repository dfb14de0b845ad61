"""Ranked lists, against a plain loop, whatever the ties."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import as_numpy, make, plain

from casn_plugin import positions, ranked
from casn_plugin.evaluation import evaluate_rank
from casn_plugin.ranked import ranked_lists


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 8),
    galleries=st.integers(1, 40),
    pids=st.integers(1, 6),
    camids=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    levels=st.sampled_from([0, 1, 3, 30]),
    feature_levels=st.sampled_from([0, 0, 2, 30]),
    infinite=st.sampled_from([0, 0, 0.1, 0.6]),
    topk=st.integers(1, 12),
    memory=st.sampled_from([1, 4000, 2**26]),
)
def test_ranked_lists_are_those_of_a_plain_loop(
    seed, queries, galleries, pids, camids, dtype, levels, feature_levels, infinite, topk, memory
):
    fused, *ids = make(seed, queries, galleries, pids, camids, dtype, levels)
    features = make(seed + 1, queries, galleries, pids, camids, dtype, feature_levels)[0]
    for distmat in (fused, features):
        values = torch.rand(distmat.shape, generator=torch.Generator().manual_seed(seed))
        distmat[values < infinite] = torch.inf
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ranked, "_MEMORY", memory)
        found = ranked_lists(features, fused, *ids, topk=topk)
    if any(plain(fused, *ids)[0]):
        evaluated = evaluate_rank(fused, *ids)
        np.testing.assert_array_equal(found.ap, evaluated.ap)
        np.testing.assert_array_equal(found.truth_rank, evaluated.first_match + 1)  # ties too
    else:  # listed all the same
        assert np.isnan(found.ap).all() and found.worst() == [] and not found.truth_rank.any()
    assert found.nearest.shape == found.right.shape == (queries, min(topk, galleries))
    q_pids, g_pids, q_camids, g_camids = ids
    for q in range(queries):
        of_query = q_pids[q], g_pids, q_camids[q], g_camids
        by_fused = reference.ranked_list(as_numpy(fused[q]), *of_query)
        by_features = dict(reference.ranked_list(as_numpy(features[q]), *of_query))
        shown = [int(g) for g in found.nearest[q] if g >= 0]
        assert shown == [g for g, _ in by_fused[:topk]]
        assert (found.nearest[q, len(shown) :] == -1).all()
        assert not found.right[q, len(shown) :].any()
        assert found.right[q, : len(shown)].tolist() == [
            bool(g_pids[g] == q_pids[q]) for g in shown
        ]
        expected = [by_features[g] for g in shown]
        assert found.feature_ranks[q].tolist() == expected + [0] * (
            len(found.right[q]) - len(shown)
        )
        truths = [(rank, g) for g, rank in by_fused if g_pids[g] == q_pids[q]]
        if truths:
            rank, truth = min(truths)
            assert (found.truth[q], found.truth_rank[q]) == (truth, rank)
            assert found.truth_feature_rank[q] == by_features[truth]
        else:
            assert (found.truth[q], found.truth_rank[q], found.truth_feature_rank[q]) == (-1, 0, 0)
    valid = [q for q in range(queries) if found.truth[q] >= 0]
    worst = found.worst()
    assert sorted(worst) == valid and found.best() == worst[::-1]
    assert (np.diff(found.ap[worst]) >= 0).all()
    assert found.failures() == [q for q in worst if found.truth_rank[q] > 1]
    assert found.worst(2) == worst[:2] and found.best(1) == worst[-1:]
    assert found.failures(1) == found.failures()[:1]


def test_ranked_lists_without_ties_need_no_order(monkeypatch):
    fused, *ids = make(5, 40, 400, 9, 3, torch.float64)
    features = make(6, 40, 400, 9, 3, torch.float64)[0]
    for room in (positions, ranked):
        monkeypatch.setattr(room, "order_of", None)
    found = ranked_lists(features, fused, *ids)
    np.testing.assert_array_equal(found.ap, evaluate_rank(fused, *ids).ap)


def test_ranked_lists_order_infinite_features():
    features = torch.tensor([[torch.inf, 0.1, torch.inf, torch.inf], [0.1, 0.2, 0.3, 0.4]])
    fused = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)
    found = ranked_lists(features, fused, [7, 8], [7, 8, 8, 9])
    assert found.nearest.tolist() == [[0, 1, 2, 3]] * 2
    assert found.feature_ranks.tolist() == [[2, 1, 3, 4], [1, 2, 3, 4]]
    assert found.truth_feature_rank.tolist() == [2, 2]


@pytest.mark.parametrize("distance", [0.5, torch.inf])
def test_ranked_lists_find_the_truth_among_matches_that_tie(distance):
    """Behind a nearest entry that ties with none: the order among them is that of np.argsort."""
    for seed in range(20):
        _, *ids = make(seed, 1, 300, 2, 2)
        fused = torch.full((1, 300), distance)
        fused[0, int(np.flatnonzero(ids[1] != ids[0])[0])] = 0.0
        features = make(seed, 1, 300, 2, 2, torch.float64)[0]
        found = ranked_lists(features, fused, *ids, topk=1)
        order = reference.ranked_list(fused[0].numpy(), ids[0][0], ids[1], ids[2][0], ids[3])
        expected = [(g, rank) for g, rank in order if ids[1][g] == ids[0][0]]
        assert (found.truth[0], found.truth_rank[0]) == expected[0]


def test_ranked_lists_leave_out_the_same_junk_as_evaluation():
    fused, *ids = make(7, 30, 60, 6, 3, levels=8)
    features = make(8, 30, 60, 6, 3, levels=20)[0]
    for options in ({"junk_pids": (2, 4)}, {"cross_camera": False}, {"junk_pids": range(6)}):
        found = ranked_lists(features, fused, *ids, topk=60, **options)
        left = ~np.isin(ids[1], list(options.get("junk_pids", [])))
        if left.any():
            evaluated = evaluate_rank(fused, *ids, **options)
            np.testing.assert_array_equal(found.truth_rank, evaluated.first_match + 1)
            np.testing.assert_array_equal(found.ap, evaluated.ap)
        shown = [set(row[row >= 0]) for row in found.nearest]
        for query, rows in enumerate(shown):
            junk = (
                (ids[1] == ids[0][query])
                & (ids[3] == ids[2][query])
                & ("cross_camera" not in options)
            )
            assert rows == set(np.flatnonzero(left & ~junk))
            ranks = found.feature_ranks[query]
            assert sorted(ranks[ranks > 0]) == [*range(1, len(rows) + 1)]


def test_ranked_lists_put_infinite_distances_before_junk():
    distmat = torch.tensor([[0.0, torch.inf, torch.inf, 0.5]])
    ids = np.array([7]), np.array([7, 7, 8, 9]), np.array([0]), np.array([0, 1, 1, 1])
    found = ranked_lists(distmat, distmat, *ids)
    assert found.nearest[0].tolist() == [3, 1, 2, -1] and found.truth[0] == 1
    assert found.feature_ranks[0].tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_that_collapsed_are_no_success(dtype):
    """All distances are one: the ranks are those that CMC and mAP count by."""
    distmat = torch.ones(12, 12, dtype=dtype, requires_grad=True)
    pids, camids = np.arange(12) // 2, np.arange(12) % 2
    found = ranked_lists(distmat, distmat, pids, pids, camids, camids)
    evaluated = evaluate_rank(distmat, pids, pids, camids, camids)
    assert (found.truth_rank == 1).mean() == pytest.approx(evaluated.cmc[0]) and found.failures()
    np.testing.assert_array_equal(found.truth_rank, evaluated.first_match + 1)
    np.testing.assert_array_equal(found.right[:, 0], found.truth_rank == 1)


def test_ranked_lists_refuse_bad_arguments(unchecked):
    distmat, ids = (
        torch.rand(1, 2),
        (np.array([1]), np.array([1, 2]), np.array([0]), np.ones(2, int)),
    )
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        ranked_lists(distmat, distmat, *ids, topk=0)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 3\) and \(1, 2\)"):
        ranked_lists(torch.rand(1, 3), distmat, *ids)
    for matrices in ((distmat.numpy(), distmat), (distmat, distmat.long())):
        with pytest.raises(TypeError, match="distmat must be a float tensor"):
            ranked_lists(*matrices, *ids)
