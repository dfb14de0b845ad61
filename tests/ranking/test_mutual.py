"""Re-ranking of encodings: what is near among queries and gallery, without all pairs."""

import numpy as np
import pytest
import reference
import torch
import torchreid
from small_heads import CHANNELS, Blocks, Model, encode, pooled
from torch import nn

import casn_plugin.ranking.mutual
from casn_plugin import Compute, PairClassifier, RankingOptions, Reciprocity
from casn_plugin.ranking import (
    feature_neighbourhood,
    fused_distmats,
    fused_neighbourhood,
    rerank_neighbourhood,
)
from casn_plugin.ranking.mutual import Together

QUERIES = 12


@pytest.fixture
def images():
    torch.manual_seed(0)
    centres = torch.rand(9, CHANNELS, 7, 3, dtype=torch.float64)
    return encode(pooled, centres[torch.randint(9, (50,))] + torch.rand(50, CHANNELS, 7, 3) ** 2)


@pytest.fixture
def model():
    return Model(PairClassifier(CHANNELS, 16).double())


def whole(model, images, weight):
    options = RankingOptions(attention_weight=weight)
    return fused_distmats(model, images, images, options=options).fused


def reranked(model, query, gallery, reciprocity, **options):
    ranking = RankingOptions(**options)
    distmat = fused_distmats(model, query, gallery, options=ranking).fused
    found = fused_neighbourhood(
        model, query, gallery, distmat, number=reciprocity.needed, options=ranking
    )
    return rerank_neighbourhood(found, reciprocity)


@pytest.mark.parametrize("k1", [5, 20])
def test_few_images_are_reranked_as_by_all_pairs(model, images, k1):
    weight, reciprocity = 0.5, Reciprocity(k1, 4)
    every = whole(model, images, weight)
    mean = ((every + every.T) / 2).fill_diagonal_(0)
    across = every[:QUERIES, QUERIES:]
    greatest = torch.maximum(mean.amax(1), torch.cat([across.amax(1), across.amax(0)]))
    jaccard = reference.reranked(mean.numpy(), QUERIES, k1, 4, 0.0, greatest.tolist())
    expected = 0.7 * jaccard + 0.3 * (across / greatest[:QUERIES, None]).square().numpy()
    found = reranked(
        model, images[:QUERIES], images[QUERIES:], reciprocity, attention_weight=weight
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_without_attention_it_is_torchreids_however_few_are_listed(model, images):
    every = whole(model, images, 0.0)
    every = (every + every.T) / 2
    q_g, q_q, g_g = every[:QUERIES, QUERIES:], every[:QUERIES, :QUERIES], every[QUERIES:, QUERIES:]
    expected = torchreid.utils.re_ranking(*(part.numpy() for part in (q_g, q_q, g_g)), k1=6, k2=3)
    query, gallery = images[:QUERIES], images[QUERIES:]
    options = {"attention_weight": 0.0, "shortlist": 7}
    found = fused_neighbourhood(
        model, query, gallery, q_g, number=7, options=RankingOptions(**options)
    )
    by_both = rerank_neighbourhood(found, Reciprocity(6, 3))
    np.testing.assert_allclose(by_both, expected, rtol=0, atol=1e-5)

    def distances(qf, gf):
        return torch.cdist(*(nn.functional.normalize(each) for each in (qf, gf)))

    found = feature_neighbourhood(query, gallery, q_g, distances, 7)
    alone = rerank_neighbourhood(found, Reciprocity(6, 3))
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)


def test_a_gallery_on_disk_and_little_memory_change_nothing(model, images, monkeypatch):
    query, gallery = images[:QUERIES], images[QUERIES:]
    expected = reranked(model, query, gallery, Reciprocity(6, 3), shortlist=10)
    monkeypatch.setattr(casn_plugin.ranking.mutual, "QUERIES", 9)
    blocks, compute = Blocks(gallery), Compute(max_memory=1)
    found = reranked(model, query, blocks, Reciprocity(6, 3), shortlist=10, compute=compute)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_queries_and_gallery_are_one_gallery(images):
    together = Together(images[:QUERIES], Blocks(images[QUERIES:]))
    assert len(together) == 50
    for rows in (slice(0, 5), slice(10, 14), slice(12, 20), slice(0, 12), slice(45, 50)):
        assert torch.equal(together[rows].maps, images[rows].maps)
        assert torch.equal(together.features_of(rows), images[rows].features)


def test_only_what_is_near_has_its_attention_compared(model, monkeypatch):
    torch.manual_seed(1)
    images = encode(pooled, torch.rand(200, CHANNELS, 7, 3, dtype=torch.float64))
    compared, compare = [], casn_plugin.ranking.mutual.compare

    def counting(pairs, rows, *args, **kwargs):
        compared.append(len(rows))
        return compare(pairs, rows, *args, **kwargs)

    monkeypatch.setattr(casn_plugin.ranking.mutual, "compare", counting)
    reciprocity = Reciprocity(4, 2)
    close = reranked(model, images[:40], images[40:], reciprocity, shortlist=12)
    # the nearest and the furthest in both orders, and the neighbours' neighbours
    assert sum(compared) <= 200 * 2 * (13 + 5 * 4) < 200**2 / 2
    exact = reranked(model, images[:40], images[40:], reciprocity, shortlist=200)
    assert not torch.equal(close, exact)
    agree = close.argmin(1) == exact.argmin(1)
    assert agree.double().mean() > 0.85
