"""Listed pairs: the nearest by features, and their distances."""

import sys

import pytest
import torch
from small_heads import CHANNELS, Model, encode, parts, pooled
from torch import nn

from casn_plugin import PairClassifier, attention_distmat, rank_gallery
from casn_plugin.ranking import feature_candidates


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("with_faiss", [False, True])
def test_a_shortlist_compares_the_nearest_by_features_only(unit, with_faiss, monkeypatch):
    if with_faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    encoding = encode(parts, torch.rand(30, CHANNELS, 9, 3))
    features = encoding.features * torch.rand(30, 1)
    encoding = encode(pooled, torch.rand(30, CHANNELS, 9, 3) * torch.rand(30, 1, 1, 1))
    query, gallery = encoding[:5], encoding[5:]
    model = Model(PairClassifier(CHANNELS, 16))
    whole = attention_distmat(model, query, gallery, unit=unit)
    features = [
        nn.functional.normalize(e.features) if unit else e.features for e in (query, gallery)
    ]
    distmat = torch.cdist(*features)
    for topk in (1, 7, 25, 99):
        some = attention_distmat(model, query, gallery, unit=unit, shortlist=topk)
        near = torch.zeros_like(some, dtype=torch.bool)
        near.scatter_(1, distmat.topk(min(topk, 25), largest=False).indices, True)
        torch.testing.assert_close(some[near], whole[near], rtol=0, atol=1e-5)
        assert (some[~near] == some.new_tensor(2**0.5 if unit else 9**0.5)).all()
        assert (whole <= (2**0.5 if unit else 9**0.5)).all()
        if unit:
            found = rank_gallery(model, query, gallery, topk=topk, exact=False)
            assert torch.equal(found.indices.sort(1).values, near.nonzero()[:, 1].view(5, -1))
            fused = (distmat + 0.1 * whole).gather(1, found.indices)
            torch.testing.assert_close(found.distances, fused, rtol=0, atol=1e-5)
            assert (found.distances.diff(dim=1) >= 0).all() and found.scored == near.sum()


@pytest.mark.parametrize("with_faiss", [False, True])
@pytest.mark.parametrize("number", [1, 6, 99])
def test_the_nearest_by_features_among_those_allowed(number, with_faiss, monkeypatch):
    if with_faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setitem(sys.modules, "faiss", None)
    qf, gf = torch.randn(5, 8) * torch.rand(5, 1), torch.randn(30, 8) * torch.rand(30, 1)
    cosines = nn.functional.cosine_similarity(qf[:, None], gf[None], dim=2)
    allowed = torch.rand(5, 30) < 0.4
    allowed[2], allowed[3] = False, True
    for mask in (None, allowed, allowed.numpy()):
        found = feature_candidates(qf, gf, number, allowed=mask)
        assert found.shape == (5, min(number, 30))
        for row in range(5):
            rows = torch.arange(30) if mask is None else allowed[row].nonzero()[:, 0]
            expected = rows[cosines[row, rows].argsort(descending=True)][:number]
            assert found[row, : len(expected)].tolist() == expected.tolist()
            assert (found[row, len(expected) :] == -1).all()
    assert feature_candidates(qf, gf[:0], 3).tolist() == [[-1]] * 5
    assert feature_candidates(qf[:0], gf, 3).shape == (0, 3)


def test_features_and_masks_that_cannot_be_are_refused(unchecked):
    features = torch.rand(4, 8)
    with pytest.raises(ValueError, match="of one size, got 8 and 7"):
        feature_candidates(features, features[:, :7], 2)
    with pytest.raises(ValueError, match="number must be at least 1"):
        feature_candidates(features, features, 0)
    with pytest.raises(ValueError, match="gf must not be NaN"):
        feature_candidates(features, features * torch.nan, 2)
    with pytest.raises(ValueError, match=r"of shape \(4, 4\), got torch.bool of \(4,\)"):
        feature_candidates(features, features, 2, allowed=torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"allowed must be of bool .* got torch.float32"):
        feature_candidates(features, features, 2, allowed=torch.ones(4, 4))
