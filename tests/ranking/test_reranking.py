"""k-reciprocal re-ranking: torchreid's answer on sparse rows, and from lists of neighbours."""

import tracemalloc

import numpy as np
import pytest
import reference
import torch
import torchreid
from hypothesis import example, given, settings
from hypothesis import strategies as st

from casn_plugin import Reciprocity, rerank, rerank_neighbours


def distances(images: int, *, seed: int = 0, spread: float = 0.7, dim: int = 16) -> torch.Tensor:
    """Symmetric distances of images of some identities."""
    torch.manual_seed(seed)
    centres = torch.randn(max(1, images // 8), dim)
    features = centres[torch.randint(len(centres), (images,))] + spread * torch.randn(images, dim)
    distmat = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.maximum(distmat, distmat.T)


def parts(distmat, queries):
    return distmat[:queries, queries:], distmat[:queries, :queries], distmat[queries:, queries:]


def theirs(distmat, queries, k1=20, k2=6, original_weight=0.3):
    given = (np.asarray(part) for part in parts(distmat, queries))
    return torchreid.utils.re_ranking(*given, k1, k2, original_weight)


def dense(lists, shape):
    """The distances of lists as a matrix, infinite where there are none."""
    whole = np.full(shape, np.inf)
    rows, places = (lists.indices >= 0).nonzero(as_tuple=True)
    whole[rows, lists.indices[rows, places]] = lists.distances[rows, places]
    return whole


@pytest.mark.parametrize(("images", "queries"), [(300, 60), (3000, 400)])
def test_it_is_torchreids_within_rounding(images, queries):
    distmat = distances(images)
    found = rerank(*parts(distmat, queries))
    np.testing.assert_allclose(found, theirs(distmat, queries), rtol=0, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(2, 60),
    share=st.floats(0, 1),
    k1=st.integers(1, 25),
    k2=st.integers(1, 8),
    original_weight=st.sampled_from([0.0, 0.3, 1.0]),
    ties=st.sampled_from([0, 1, 2]),
    double=st.booleans(),
)
@example(seed=0, images=40, share=0.5, k1=20, k2=6, original_weight=0.3, ties=1, double=False)
def test_any_size_and_any_parameters_ties_included(
    seed, images, share, k1, k2, original_weight, ties, double
):
    distmat = distances(images, seed=seed)
    if ties:  # many of one distance, or images that are equal
        distmat = (distmat * ties).round() / ties
        distmat.fill_diagonal_(0)
    distmat = distmat.double() if double else distmat
    queries = min(max(1, int(share * images)), images - 1)
    if float(distmat.amax(1).min()) == 0:
        return  # torchreid divides by 0
    found = rerank(*parts(distmat, queries), Reciprocity(k1, k2, original_weight))
    expected = theirs(distmat, queries, k1, k2, original_weight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (7, 1), (1, 3)])
def test_it_agrees_with_the_reference(k1, k2):
    distmat = distances(70).double()
    expected = reference.reranked(distmat.numpy(), 20, k1, k2, 0.3)
    found = rerank(*parts(distmat, 20), Reciprocity(k1, k2))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    near = distmat.sort(dim=1)
    lists = rerank_neighbours(
        near.indices, near.values, 20, parameters=Reciprocity(k1, k2), topk=50
    )
    whole = dense(lists, expected.shape)
    known = np.isfinite(whole)  # the furthest of all is as good as unknown
    assert known.sum() >= known.size - 20
    np.testing.assert_allclose(whole[known], expected[known], rtol=0, atol=2e-6)
    assert (expected[~known] > 1 - 1e-6).all()
    assert (lists.distances.diff(dim=1)[lists.distances[:, 1:] < torch.inf] >= 0).all()


@pytest.mark.parametrize("with_greatest", [False, True])
@pytest.mark.parametrize("lists_itself", [False, True])
def test_what_is_in_no_list_counts_as_furthest(with_greatest, lists_itself):
    distmat, queries, width = distances(60).double(), 15, 12
    near = distmat.sort(dim=1)
    start = 0 if lists_itself else 1
    indices, values = near.indices[:, start:width], near.values[:, start:width]
    greatest = distmat.amax(1) if with_greatest else values.amax(1)
    known = torch.full_like(distmat, float("inf")).scatter(1, near.indices[:, :width], 0) == 0
    known = known | known.T
    partial = distmat.where(known, 1e6)
    # distances further than the row's greatest count as that: the reference cuts them there
    expected = reference.reranked(partial.numpy(), queries, 8, 4, 0.3, greatest.tolist())
    found = rerank_neighbours(
        indices.numpy(), values.numpy(), queries,
        parameters=Reciprocity(8, 4), greatest=greatest if with_greatest else None, topk=45,
    )  # fmt: skip
    whole = dense(found, expected.shape)
    there = np.isfinite(whole)
    assert 0.05 < there.mean() < 0.9
    np.testing.assert_allclose(whole[there], expected[there], rtol=0, atol=2e-6)
    assert (expected[~there] > 1 - 1e-6).all()


def test_short_rows_and_a_shorter_answer():
    near = distances(40).sort(dim=1)
    indices, values = near.indices[:, :10].clone(), near.values[:, :10].clone()
    whole = rerank_neighbours(indices, values, 10)
    assert whole.indices.shape == (10, 10)
    few = rerank_neighbours(indices, values, 10, topk=3)
    assert torch.equal(few.indices, whole.indices[:, :3])
    indices[5, 4:], values[5, 4:] = -1, float("nan")  # as FAISS fills up a row
    short = rerank_neighbours(indices, values, 10)
    assert not torch.equal(short.distances, whole.distances)
    alone = torch.arange(4)[:, None]
    nothing = rerank_neighbours(alone, torch.zeros(4, 1), 2, topk=2)
    assert (nothing.indices == -1).all() and (nothing.distances == torch.inf).all()


def test_memory_grows_as_the_number_of_images():
    def peak(images: int) -> int:
        positions = torch.rand(images, dtype=torch.float64).sort().values * images
        reach = torch.arange(-15, 16)
        indices = (torch.arange(images)[:, None] + reach).remainder(images)
        values, order = (positions[indices] - positions[:, None]).abs().sort(dim=1)
        indices = indices.gather(1, order)
        tracemalloc.start()
        rerank_neighbours(indices.numpy(), values.numpy(), 200)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    small, large = peak(10_000), peak(40_000)
    assert large < 5 * small
    assert large < 40_000**2 / 4  # a quarter byte for each pair


def test_nothing_is_wrong_in_silence(unchecked):
    distmat = distances(30)
    with pytest.raises(TypeError, match="query_gallery must be a float tensor, got list"):
        rerank([[1.0]], distmat, distmat)
    with pytest.raises(ValueError, match=r"query_query must be of shape \(10, 10\)"):
        rerank(distmat[:10, 10:], distmat, distmat[10:, 10:])
    with pytest.raises(ValueError, match="gallery_gallery must be symmetric"):
        rerank(*parts(distmat, 10)[:2], torch.rand(20, 20))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        broken = distmat.clone()
        broken[25, 28] = broken[28, 25] = broken[3, 28] = broken[28, 3] = wrong
        with pytest.raises(ValueError, match="finite"):
            rerank(*parts(broken, 10))
    with pytest.raises(ValueError, match="none but the first 0"):
        rerank(torch.zeros(0, 3), torch.zeros(0, 0), torch.zeros(3, 3))
    for options in ({"k1": 0}, {"k2": 0}, {"original_weight": 1.1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Reciprocity(**options)
    near = distmat.sort(dim=1)
    good = near.indices[:, :5], near.values[:, :5]
    outside = good[0].clone().index_fill_(1, torch.tensor(4), 30)
    bad = {
        "one shape": (good[0], good[1][:, :4]),
        "integers": (good[1], good[1]),
        r"lie in \[-1, 30\), got 0 to 30": (outside, good[1]),
        "at the end of rows only": (good[0].clone().index_fill_(1, torch.tensor(2), -1), good[1]),
        "twice": (good[0][:, [0, 1, 1, 2, 3]], good[1]),
        "finite where": (good[0], good[1] * torch.nan),
        "ascend": (good[0], good[1].flip(1)),
    }  # fmt: skip
    for message, lists in bad.items():
        with pytest.raises((ValueError, TypeError), match=message):
            rerank_neighbours(*lists, 10)
    with pytest.raises(ValueError, match="a gallery, got 30 of 30"):
        rerank_neighbours(*good, 30)
    with pytest.raises(ValueError, match="no less than a listed distance"):
        rerank_neighbours(*good, 10, greatest=torch.full((30,), 0.1))
    with pytest.raises(ValueError, match="topk must be at least 1"):
        rerank_neighbours(*good, 10, topk=0)


def test_images_that_are_all_one_stay_so():
    found = rerank(torch.zeros(3, 5), torch.zeros(3, 3), torch.zeros(5, 5))
    assert (found < 1e-6).all()
    # and rounding below 0, as of cosines, is not what is nearest
    distmat = distances(60)
    distmat = (distmat / distmat.max()).double()
    below = distmat - 1e-3
    expected = theirs(below, 20)
    np.testing.assert_allclose(rerank(*parts(below, 20)), expected, rtol=0, atol=2e-6)
