"""Equality with torchreid's evaluation, whatever the ties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchreid import metrics

from casn_plugin import evaluation, positions
from casn_plugin.evaluation import (
    evaluate_rank,
    verification_auc,
)
from casn_plugin.ranked import ranked_lists


def make(seed, queries, galleries, pids, camids, dtype=torch.float32, levels=0):
    """Returns random arguments of evaluate_rank; with levels, distances that take few values."""
    rng = np.random.default_rng(seed)
    distmat = rng.random((queries, galleries))
    if levels:
        distmat = np.floor(distmat * levels) / levels
    sizes = ((pids, queries), (pids, galleries), (camids, queries), (camids, galleries))
    return torch.from_numpy(distmat).to(dtype), *(rng.integers(0, high, n) for high, n in sizes)


def as_numpy(distmat):
    return (distmat.float() if distmat.dtype == torch.bfloat16 else distmat).numpy()


def plain(distmat, q_pids, g_pids, q_camids, g_camids):
    """Returns the 0-based ranks of each query's matches, and its number of valid entries."""
    ranks, valid = [], []
    for order, pid, camid in zip(np.argsort(as_numpy(distmat), 1), q_pids, q_camids, strict=True):
        kept = [i for i in order if not (g_pids[i] == pid and g_camids[i] == camid)]
        ranks.append([rank for rank, i in enumerate(kept) if g_pids[i] == pid])
        valid.append(len(kept))
    return ranks, valid


def check(arguments, max_rank=50, **options):
    """Compares with torchreid up to the rank to which all its rows reach, and with a plain loop."""
    ranks, valid = plain(*arguments)
    found = [(row, n) for row, n in zip(ranks, valid, strict=True) if row]
    if not found:
        with pytest.raises(ValueError, match="none of the"):
            evaluate_rank(*arguments, max_rank=max_rank, **options)
        return None
    ours = evaluate_rank(*arguments, max_rank=max_rank, **options)
    reach = min(max_rank, *(n for _, n in found))
    cmc, mean_ap = metrics.evaluate_rank(as_numpy(arguments[0]), *arguments[1:], max_rank=reach)
    assert ours.cmc.dtype == cmc.dtype == np.float32
    assert ours.cmc.shape == (min(max_rank, arguments[0].shape[1]),)
    np.testing.assert_array_equal(ours.cmc[:reach], cmc)
    curve = [sum(row[0] <= k for row, _ in found) / len(found) for k in range(len(ours.cmc))]
    np.testing.assert_array_equal(ours.cmc, np.array(curve, dtype=np.float32))
    assert abs(ours.mean_ap - mean_ap) <= 1e-12
    assert abs(ours.mean_inp - np.mean([len(row) / (row[-1] + 1) for row, _ in found])) <= 1e-12
    assert ours.first_match.tolist() == [row[0] if row else -1 for row in ranks]
    ap = [
        np.mean([(i + 1) / (k + 1) for i, k in enumerate(row)]) if row else np.nan for row in ranks
    ]
    np.testing.assert_allclose(ours.ap, ap, rtol=0, atol=1e-12)
    return ours


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(1, 12),
    galleries=st.integers(1, 150),
    pids=st.integers(1, 20),
    camids=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    levels=st.sampled_from([0, 0, 1, 2, 5, 30, 300]),
    max_rank=st.integers(1, 200),
    max_memory=st.sampled_from([1, 10_000, 2**28]),
)
def test_equals_torchreid(
    seed, queries, galleries, pids, camids, dtype, levels, max_rank, max_memory
):
    arguments = make(seed, queries, galleries, pids, camids, dtype, levels)
    check(arguments, max_rank, max_memory=max_memory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [0, 1, 3, 1000])
def test_equals_torchreid_on_long_rows(dtype, levels):
    check(make(0, 20, 3000, 60, 4, dtype, levels))


def test_rows_without_ties_need_no_sort(monkeypatch):
    arguments = make(2, 30, 200, 9, 3, torch.float64)
    arguments[0][:, arguments[2] > 6] = torch.inf
    queries = arguments[1] <= 6
    monkeypatch.setattr(positions, "order_of", None)
    check(
        (
            arguments[0][queries],
            arguments[1][queries],
            arguments[2],
            arguments[3][queries],
            arguments[4],
        )
    )


def test_ties_among_matches_or_with_junk_need_no_sort(monkeypatch):
    distmat = torch.tensor([[0.5, 0.5, 0.5, 0.1, 0.9, 0.9]])
    ids = [np.array(x) for x in ([1], [1, 1, 1, 2, 3, 4], [0], [1, 2, 0, 0, 0, 0])]
    monkeypatch.setattr(positions, "order_of", None)
    assert check((distmat, *ids)).first_match.tolist() == [1]


def test_ties_next_to_each_other_in_floats_are_told_apart(monkeypatch):
    monkeypatch.setattr(positions, "order_of", None)
    ids = [np.array(x) for x in ([1], [1, 2, 3], [0], [1, 0, 0])]
    for value in (0.0, -0.0, 1e-45, 1.0, -1.0, 3e38):
        middle = torch.tensor(value)
        steps = [
            middle,
            middle.nextafter(torch.tensor(9e38)),
            middle.nextafter(-torch.tensor(9e38)),
        ]
        assert check((torch.stack(steps)[None], *ids)).first_match.tolist() == [1]


def test_negative_zero_ties_with_zero():
    for signs in ([0.0, -0.0] * 30, [-0.0, 0.0] * 30):
        _, *ids = make(1, 1, 60, 2, 3)
        check((torch.tensor([signs]), *ids))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("galleries", [40, 700])
def test_rows_with_infinities(dtype, galleries):
    for seed in range(8):
        arguments = make(seed, 10, galleries, 6, 3, dtype)
        pool = torch.tensor([torch.inf, -torch.inf, 0.5], dtype=dtype)
        where = torch.rand(arguments[0].shape) < (0.02, 0.3, 1.0)[seed % 3]
        arguments[0][where] = pool[torch.randint(3, (int(where.sum()),))]
        check(arguments)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.001])
def test_nan_is_no_distance_and_no_score(share):
    """All NaN would be an mAP of 0.75 and an AUC of 1."""
    distmat, *ids = make(4, 20, 100, 3, 3)
    bad = distmat.clone()
    bad.view(-1)[: max(int(share * bad.numel()), 1)] = torch.nan
    number = rf"must not be NaN, but {int(bad.isnan().sum())} of 2000 are"
    with pytest.raises(ValueError, match=rf"distmat {number}"):
        evaluate_rank(bad, *ids)
    for matrices in ((bad, distmat), (distmat, bad)):
        with pytest.raises(ValueError, match=rf"distmat {number}"):
            ranked_lists(*matrices, *ids)
    with pytest.raises(ValueError, match=rf"scores {number}"):
        verification_auc(bad, distmat > 0.5)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["match", "junk", "other"])
def test_one_special_value(value, kind):
    distmat, *_ = make(3, 1, 30, 1, 1)
    q_pids, q_camids = np.array([1]), np.array([0])
    g_pids = np.array([1] * 10 + [2] * 20)
    g_camids = np.array([0] * 5 + [1] * 25)
    distmat[0, {"junk": 2, "match": 7, "other": 20}[kind]] = value
    check((distmat, q_pids, g_pids, q_camids, g_camids))


def test_queries_without_a_match_do_not_count():
    distmat, *_ = make(4, 4, 6, 1, 1)
    q_pids, q_camids = np.array([1, 9, 2, 3]), np.array([0, 0, 0, 0])
    g_pids, g_camids = np.array([1, 1, 2, 2, 3, 5]), np.array([0, 0, 1, 0, 1, 1])
    ours = check((distmat, q_pids, g_pids, q_camids, g_camids))  # 1: all junk, 9: nowhere
    assert (ours.first_match == -1).tolist() == [True, True, False, False]
    assert np.isnan(ours.ap).tolist() == [True, True, False, False]


def test_one_gallery_image():
    one, two = np.array([1]), np.array([2])
    ours = check((torch.tensor([[0.3]]), one, one, one, two))
    assert (ours.cmc.tolist(), ours.mean_ap, ours.mean_inp) == ([1.0], 1.0, 1.0)


@pytest.mark.parametrize(
    ("shape", "g_pids", "g_camids"),
    [
        ((1, 2), [1, 5], [0, 1]),
        ((1, 2), [5, 6], [1, 1]),
        ((1, 0), [], []),
        ((0, 2), [1, 2], [0, 0]),
    ],
)
def test_no_valid_query_is_an_error(shape, g_pids, g_camids):
    ids = np.ones(shape[0], dtype=int), np.array(g_pids, dtype=int)
    camids = np.zeros(shape[0], dtype=int), np.array(g_camids, dtype=int)
    with pytest.raises(ValueError, match=f"none of the {shape[0]} queries"):
        evaluate_rank(torch.rand(shape), *ids, *camids)


def test_cmc_ends_at_one_where_junk_makes_rows_ragged():
    arguments = make(5, 9, 12, 2, 2)
    with pytest.raises(ValueError, match="inhomogeneous"):
        metrics.evaluate_rank(arguments[0].numpy(), *arguments[1:], max_rank=12)
    assert check(arguments, 1000).cmc[-1] == 1


def test_mean_inp_by_hand():
    distmat = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    ids = [np.array(x) for x in ([1, 1], [1, 2, 1, 3], [0, 0], [1, 1, 2, 2])]
    assert evaluate_rank(distmat, *ids).mean_inp == (2 / 3 + 2 / 4) / 2


def test_blocks_are_bounded_and_do_not_matter(monkeypatch):
    arguments = make(6, 40, 500, 20, 4, levels=2000)
    whole = evaluate_rank(*arguments)
    sizes, function = [], evaluation.positions

    def spy(distmat, *rest):
        sizes.append(len(distmat))
        return function(distmat, *rest)

    monkeypatch.setattr(evaluation, "positions", spy)
    for max_memory, least in ((1, 40), (60_000, 5), (2**30, 1)):
        sizes.clear()
        split = evaluate_rank(*arguments, max_memory=max_memory)
        assert len(sizes) >= least
        assert sum(sizes) == 40
        for name, value in vars(whole).items():
            np.testing.assert_array_equal(getattr(split, name), value)


def test_memory_grows_with_the_block_only():
    arguments = make(7, 600, 4000, 80, 4)
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as p:
        evaluate_rank(*arguments, max_memory=2**20)
    largest = max(e.self_cpu_memory_usage for e in p.events())
    assert 0 < largest <= 2**20


def test_tensors_any_layout_and_gradients_are_accepted():
    distmat, *ids = make(8, 10, 50, 6, 3, levels=10)
    expected = evaluate_rank(distmat, *ids)
    strided = distmat.T.contiguous().T.requires_grad_()
    tensors = [torch.from_numpy(x).to(torch.int32) for x in ids]
    readonly = [np.broadcast_to(x[::-1], x.shape)[::-1].astype(np.uint8) for x in ids]
    readonly[0].flags.writeable = False
    for other in (tensors, readonly):
        found = evaluate_rank(strided, *other, progress=True)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"distmat": np.zeros((2, 3))}, TypeError, "distmat must be a float tensor, got ndarray"),
        ({"distmat": torch.zeros(2, 3).long()}, TypeError, r"float tensor, got torch\.int64"),
        ({"distmat": torch.zeros(3)}, ValueError, r"\(queries, galleries\), got \(3,\)"),
        ({"q_pids": np.zeros(3, int)}, ValueError, r"q_pids .* \(2,\), .* got shape \(3,\)"),
        ({"g_camids": np.zeros((3, 1), int)}, ValueError, r"g_camids .* got shape \(3, 1\)"),
        ({"g_pids": np.array([0, -2, 0])}, ValueError, "g_pids must be >= 0, or -1 .* got -2"),
        ({"g_pids": ["a", "b", "c"]}, TypeError, "g_pids must be integers, got <U1"),
        ({"q_pids": [True, False]}, TypeError, "q_pids must be integers, got bool"),
        ({"g_pids": np.zeros(3)}, TypeError, "g_pids must be integers, got float64"),
        ({"q_camids": torch.zeros(2)}, TypeError, "q_camids must be integers, got float32"),
        ({"max_rank": 0}, ValueError, "max_rank must be at least 1, got 0"),
        ({"max_memory": 0}, ValueError, "max_memory must be at least 1, got 0"),
    ],
)
def test_bad_input(unchecked, changes, error, message):
    arguments = {
        "distmat": torch.zeros(2, 3), "q_pids": np.zeros(2, int), "g_pids": np.zeros(3, int),
        "q_camids": np.zeros(2, int), "g_camids": np.ones(3, int),
    }  # fmt: skip
    evaluate_rank(**arguments)
    with pytest.raises(error, match=message):
        evaluate_rank(**arguments | changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [0, 1, 1000])
def test_cuda_equals_cpu(dtype, levels):
    distmat, *ids = make(9, 30, 2000, 40, 4, dtype, levels)
    distmat[::3, ::7] = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)[
        torch.randint(3, distmat[::3, ::7].shape)
    ]
    expected = evaluate_rank(distmat, *ids)
    for max_memory in (200_000, 2**28):
        tensors = [torch.from_numpy(x).cuda() for x in ids]
        found = evaluate_rank(distmat.cuda(), *tensors, max_memory=max_memory)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), value)


def test_auc_counts_pairs_in_the_right_order():
    scores = torch.randint(0, 5, (6, 7)).double()
    same = torch.rand(6, 7) > 0.6
    wins = [
        1.0 if s > d else 0.5 if s == d else 0.0
        for s in scores[same].tolist()
        for d in scores[~same].tolist()
    ]
    assert verification_auc(scores, same) == pytest.approx(np.mean(wins))
    assert np.isnan(verification_auc(scores, torch.ones(6, 7, dtype=torch.bool)))


def test_unknown_identities_and_cameras_are_equal_to_nothing():
    distmat = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])
    g_pids, g_camids = [-1, 7, 8, 7], [1, 1, 1, 1]
    found = evaluate_rank(distmat, [7, -1], g_pids, [0, 0], g_camids)
    assert found.first_match.tolist() == [1, -1] and np.isnan(found.ap[1])
    assert found.mean_ap == pytest.approx((1 / 2 + 2 / 4) / 2)  # the unknown one is somebody else
    nobody = evaluate_rank(distmat[:1], [7], [-1, 7, None, 7], [0], g_camids)
    assert nobody.mean_ap == found.mean_ap
    with pytest.raises(ValueError, match="none of the 2 queries has a match"):
        evaluate_rank(distmat, [-1, None], [-1, None, 1, 2], [0, 0], g_camids)
    # an unknown camera is not the query's own: everything counts
    for camids in ([-1], None, [None]):
        assert evaluate_rank(distmat[:1], [7], g_pids, camids, [-1] * 4).mean_ap == found.mean_ap
        assert evaluate_rank(distmat[:1], [7], g_pids, camids).mean_ap == found.mean_ap
    lists = ranked_lists(distmat, distmat, [7, -1], g_pids, [0, -1], [1, 1, -1, 1])
    assert lists.nearest.tolist() == [[0, 1, 2, 3]] * 2  # listed all the same
    assert lists.right.tolist() == [[False, True, False, True], [False] * 4]
    assert lists.truth.tolist() == [1, -1] and np.isnan(lists.ap[1]) and lists.worst() == [0]


def test_junk_is_left_out_by_request():
    distmat = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    ids = [7], [-1, 7, 8, 7], [0], [1, 1, 1, 1]
    found = evaluate_rank(distmat, *ids, junk_pids=[-1])
    assert found.mean_ap == pytest.approx((1 + 2 / 3) / 2) and found.cmc.tolist() == [1.0] * 3
    assert evaluate_rank(distmat, *ids).mean_ap == 0.5
    lists = ranked_lists(distmat, distmat, *ids, junk_pids=[-1])
    assert lists.nearest.tolist() == [[1, 2, 3, -1]] and lists.truth_rank.tolist() == [1]
    assert lists.feature_ranks.tolist() == [[1, 2, 3, 0]]
    tied = torch.zeros(1, 4)  # the slow way, by sorting
    kept = [1, 2, 3]
    sorted_out = evaluate_rank(tied[:, kept], [7], [7, 8, 7], [0], [1, 1, 1])
    assert evaluate_rank(tied, *ids, junk_pids=(-1,)).mean_ap == sorted_out.mean_ap


def test_one_camera_ranks_by_request():
    distmat, _, g_pids, _, _ = make(3, 6, 40, 5, 1)
    q_pids, camids = np.arange(6) % 5, np.zeros(40, int)
    with pytest.raises(ValueError, match="of its pid from another camera"):
        evaluate_rank(distmat, q_pids, g_pids, camids[:6], camids)
    ids = q_pids, g_pids, camids[:6], camids
    found = evaluate_rank(distmat, *ids, cross_camera=False)
    elsewhere = evaluate_rank(distmat, q_pids, g_pids, camids[:6], camids + 1)
    np.testing.assert_array_equal(found.ap, elsewhere.ap)
    one = ranked_lists(distmat, distmat, *ids, cross_camera=False)
    other = ranked_lists(distmat, distmat, q_pids, g_pids, camids[:6], camids + 1)
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name))
