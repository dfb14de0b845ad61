"""Listed pairs: the nearest by features, and their distances."""

import sys

import pytest
import torch
from small_heads import CHANNELS, Model, encode, parts, pooled
from torch import nn

from casn_plugin import PairClassifier, attention_distmat, rank_gallery


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
