"""Top-k search: what brute force finds, with fewer pairs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_heads import CHANNELS, CLASSIFIERS, HEADS, Model, encode, pooled
from torch import nn

from casn_plugin import Compute, Encoding, PairClassifier, attention_distmat, rank_gallery


def brute_force(model, query, gallery, topk, weight):
    """Returns indices and distances by the whole matrices."""
    qf, gf = (nn.functional.normalize(each.features) for each in (query, gallery))
    distmat = (qf[:, None] - gf[None]).norm(dim=2)
    attention = attention_distmat(model, query, gallery, unit=True)
    fused = distmat + weight * attention
    best = fused.sort(dim=1, stable=True)
    return best.indices[:, :topk], best.values[:, :topk], distmat, attention


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 6),
    galleries=st.integers(1, 40),
    topk=st.integers(1, 50),
    weight=st.sampled_from([0.0, 0.01, 0.1, 0.5, 3.0]),
    spread=st.sampled_from([0.0, 0.1, 1.0]),
    name=st.sampled_from(["pooled", "parts"]),
    max_memory=st.sampled_from([1, 40_000, None]),
    classifier=st.sampled_from(["two layers", "affine", "smooth"]),
)
def test_search_finds_what_brute_force_finds(
    seed, queries, galleries, topk, weight, spread, name, max_memory, classifier
):
    torch.manual_seed(seed)
    centres = torch.rand(4, CHANNELS, 7, 3, dtype=torch.float64)
    maps = centres[torch.randint(4, (queries + galleries,))]
    maps = maps + spread * torch.rand_like(maps)
    encoding = encode(HEADS[name][0], maps)
    query, gallery = encoding[:queries], encoding[queries:]
    model = Model(CLASSIFIERS[classifier](encoding.features.shape[1]).double())
    found = rank_gallery(
        model,
        query,
        gallery,
        topk=topk,
        attention_weight=weight,
        compute=Compute(max_memory=max_memory),
    )
    _, distances, by_features, attention = brute_force(model, query, gallery, topk, weight)
    assert found.indices.shape == (queries, min(topk, galleries))
    # equal images may come in either order, so distances tell
    torch.testing.assert_close(found.distances, distances, rtol=0, atol=1e-7)
    for own, matrix in (
        (found.feature_distances, by_features),
        (found.attention_distances, attention),
    ):
        torch.testing.assert_close(own, matrix.gather(1, found.indices), rtol=0, atol=1e-7)
    assert all(len(set(row)) == len(row) for row in found.indices.tolist())
    assert found.scored >= found.indices.numel()


def test_search_scores_only_what_the_bound_cannot_exclude():
    torch.manual_seed(1)
    maps = torch.rand(50, CHANNELS, 7, 3, dtype=torch.float64) ** 4
    encoding = encode(pooled, maps)
    query, gallery = encoding[:3], encoding[3:]
    model = Model(PairClassifier(CHANNELS, 16).double())
    topk, weight = 2, 0.05
    _, _, by_features, attention = brute_force(model, query, gallery, topk, weight)
    nearest = by_features.topk(topk, largest=False).indices
    bound = (by_features + weight * attention).gather(1, nearest).amax(1, keepdim=True)
    expected = int((by_features <= bound).sum())
    assert (
        rank_gallery(model, query, gallery, topk=topk, attention_weight=weight).scored == expected
    )
    assert expected < 3 * 47


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_the_bound_holds_where_matrix_products_are_coarse(weight, monkeypatch):
    """As with TF32: what is compared with the bound is not made of float32 products."""
    torch.manual_seed(3)
    features = torch.rand(64) + 0.05 * torch.randn(300, 64)
    encoding = Encoding(features, basis=torch.rand(300, 64, 6, 2))
    model, addmm = Model(PairClassifier(64, 16)), torch.addmm
    distances = brute_force(model, encoding[:20], encoding, 5, weight)[1]

    def coarse(bias, first, second, **kwargs):
        if first.dtype == torch.float32:
            first, second = first.bfloat16().float(), second.bfloat16().float()
        return addmm(bias, first, second, **kwargs)

    monkeypatch.setattr(torch, "addmm", coarse)
    found = rank_gallery(model, encoding[:20], encoding, topk=5, attention_weight=weight)
    torch.testing.assert_close(found.distances, distances, rtol=0, atol=1e-5)


def test_bad_options_of_a_search_say_what_was_expected(unchecked):
    encoding = encode(pooled, torch.rand(4, CHANNELS, 7, 3))
    model = Model(PairClassifier(CHANNELS, 16))
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        rank_gallery(model, encoding, encoding, topk=0)
    with pytest.raises(ValueError, match=r"row_threshold must lie in \[0, 1\), got -0.1"):
        rank_gallery(model, encoding, encoding, row_threshold=-0.1)
    with pytest.raises(ValueError, match="gallery is empty"):
        rank_gallery(model, encoding, encoding[:0])
    with pytest.raises(ValueError, match="attention_weight must be >= 0 and finite, got -1"):
        rank_gallery(model, encoding, encoding, attention_weight=-1)
    with pytest.raises(ValueError, match="finite, got inf"):
        rank_gallery(model, encoding, encoding, attention_weight=float("inf"))
    assert rank_gallery(model, encoding[:0], encoding, topk=2).indices.shape == (0, 2)


def test_nobody_passes_a_threshold_that_is_too_low(unchecked):
    encoding = encode(pooled, torch.rand(9, CHANNELS, 7, 3))
    found = rank_gallery(Model(PairClassifier(CHANNELS, 16)), encoding[:3], encoding[3:], topk=4)
    threshold = float(found.distances[1, 2])
    passing = found.passing(threshold)
    assert passing[1].tolist() == [True, True, True, False]
    assert torch.equal(passing, found.distances <= threshold)
    assert not found.passing(0).any()
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold must be >= 0 and finite"):
            found.passing(wrong)


def candidates_of(queries, galleries, listed, seed=0):
    """Random rows for each query, the last of some missing, in any order."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack(
        [torch.randperm(galleries, generator=generator)[:listed] for _ in range(queries)]
    )
    return rows.masked_fill(torch.rand(rows.shape, generator=generator) < 0.3, -1)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    listed=st.integers(1, 12),
    topk=st.integers(1, 14),
    name=st.sampled_from(["pooled", "parts"]),
    max_memory=st.sampled_from([1, 40_000, None]),
    as_array=st.booleans(),
)
def test_of_candidates_the_nearest_by_brute_force_are_found(
    seed, listed, topk, name, max_memory, as_array
):
    torch.manual_seed(seed)
    encoding = encode(HEADS[name][0], torch.rand(24, CHANNELS, 7, 3, dtype=torch.float64))
    query, gallery = encoding[:4], encoding[4:]
    model = Model(PairClassifier(encoding.features.shape[1], 16).double())
    rows = candidates_of(4, 20, listed, seed)
    found = rank_gallery(
        model, query, gallery, topk=topk, candidates=rows.numpy() if as_array else rows,
        compute=Compute(max_memory=max_memory),
    )  # fmt: skip
    _, _, by_features, attention = brute_force(model, query, gallery, 20, 0.1)
    fused = by_features + 0.1 * attention
    assert found.indices.shape == (4, min(topk, listed)) and found.scored == (rows >= 0).sum()
    for i, some in enumerate(rows):
        some = some[some >= 0]
        best = some[fused[i, some].argsort()][:topk]
        assert found.indices[i, : len(best)].tolist() == best.tolist()
        torch.testing.assert_close(found.distances[i, : len(best)], fused[i, best])
        torch.testing.assert_close(found.feature_distances[i, : len(best)], by_features[i, best])
        torch.testing.assert_close(found.attention_distances[i, : len(best)], attention[i, best])
        assert (found.indices[i, len(best) :] == -1).all()
        assert found.distances[i, len(best) :].isposinf().all()
        assert not found.passing(1e9)[i, len(best) :].any()


class Watched:
    """A gallery that notes which rows are read."""

    def __init__(self, encoding):
        self.encoding, self.read = encoding, []

    def __len__(self):
        return len(self.encoding)

    def __getitem__(self, rows):
        self.read += torch.arange(len(self))[rows].tolist()
        return self.encoding[rows]

    def features_of(self, rows):
        raise AssertionError("features are read with the maps")


def test_nothing_but_the_candidates_is_read_of_a_gallery():
    encoding = encode(pooled, torch.rand(50, CHANNELS, 7, 3))
    gallery = Watched(encoding[3:])
    rows = torch.tensor([[40, 7, -1], [7, 2, 9], [-1, -1, -1]])
    found = rank_gallery(
        Model(PairClassifier(CHANNELS, 16)), encoding[:3], gallery, candidates=rows
    )
    assert set(gallery.read) == {2, 7, 9, 40}
    assert found.indices[2].tolist() == [-1] * 3 and found.scored == 5


def test_candidates_that_cannot_be_are_refused(unchecked):
    encoding = encode(pooled, torch.rand(7, CHANNELS, 7, 3))
    model, query, gallery = Model(PairClassifier(CHANNELS, 16)), encoding[:2], encoding[2:]
    for wrong, message in (
        (torch.tensor([[0, 5], [1, 2]]), "rows of a gallery of 5, .* got 0 to 5"),
        (torch.tensor([[0, -2], [1, 2]]), "got -2 to 2"),
        (torch.tensor([[0, 1]]), r"of shape \(2, K\), some for each query, got \(1, 2\)"),
        (torch.zeros(2, 0, dtype=torch.long), r"got \(2, 0\)"),
        (torch.tensor([[0, 1, 2], [4, 1, 4]]), "row 4 stands twice among those of query 1"),
        (torch.tensor([0, 1]), r"must be of shape \(queries, listed\)"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_gallery(model, query, gallery, candidates=wrong)
    for wrong in (torch.zeros(2, 1), [[0], [1]], torch.zeros(2, 1, dtype=torch.bool), "ab"):
        with pytest.raises(TypeError, match="candidates must be a tensor of integers"):
            rank_gallery(model, query, gallery, candidates=wrong)
    nobody = rank_gallery(model, query, gallery, candidates=-np.ones((2, 3), dtype=np.int32))
    assert nobody.indices.tolist() == [[-1] * 3] * 2 and nobody.scored == 0
