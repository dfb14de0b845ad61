"""Top-k search: what brute force finds, with fewer pairs."""

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
