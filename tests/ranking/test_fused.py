"""Distances of features and of attention, fused."""

import numpy as np
import pytest
import reference
import torch
from small_heads import CHANNELS, Blocks, Model, encode, pooled
from torch import nn

from casn_plugin import Encoding, PairClassifier, RankingOptions, attention_distmat, fuse_distmats
from casn_plugin.ranking import fused_distmats


@pytest.mark.parametrize(
    ("normalization", "name"), [("unit", "none"), ("query", "query"), ("global", "global")]
)
def test_fusion_agrees_with_the_reference(normalization, name):
    features, attention = torch.rand(4, 6).double(), torch.rand(4, 6).double()
    features[1] = 3.0  # a query at one distance to all
    fused = fuse_distmats(features, attention, normalization=normalization, attention_weight=0.3)
    expected = reference.fuse(features.numpy(), attention.numpy(), name, 0.3)
    np.testing.assert_allclose(fused, expected, rtol=0, atol=1e-12)
    nothing = fuse_distmats(torch.rand(0, 6), torch.rand(0, 6), normalization=normalization)
    assert nothing.shape == (0, 6)


def test_fusion_by_query_depends_on_no_other_query():
    features, attention = torch.rand(4, 6), torch.rand(4, 6)
    whole = fuse_distmats(features, attention, normalization="query")
    alone = fuse_distmats(features[2:3], attention[2:3], normalization="query")
    torch.testing.assert_close(whole[2:3], alone, rtol=0, atol=0)


def test_infinite_distances_make_no_nan():
    features, attention = torch.rand(2, 3), torch.rand(2, 3)
    attention[0, 1] = torch.inf
    assert fuse_distmats(features, attention)[0, 1] == torch.inf
    assert torch.equal(fuse_distmats(features, attention, attention_weight=0.0), features)
    for normalization in ("query", "global"):
        for both in ((features, attention), (attention, features)):
            with pytest.raises(ValueError, match="finite ones, got infinity"):
                fuse_distmats(*both, normalization=normalization)


def test_fused_distmats_are_those_of_features_and_attention_fused():
    encoding = encode(pooled, torch.rand(9, CHANNELS, 7, 3, dtype=torch.float64))
    model = Model(PairClassifier(CHANNELS, 16).double())
    query, gallery = encoding[:3], Blocks(encoding[3:])
    for normalization in ("unit", "query", "global"):
        unit = normalization == "unit"
        options = RankingOptions(normalization, attention_weight=0.3)
        found = fused_distmats(model, query, gallery, options=options, row_threshold=0.4)
        attention = attention_distmat(model, query, gallery, row_threshold=0.4, unit=unit)
        qf, gf = query.features, encoding.features[3:]
        if unit:
            qf, gf = (nn.functional.normalize(each) for each in (qf, gf))
        assert torch.equal(found.attention, attention)
        torch.testing.assert_close(found.features, torch.cdist(qf, gf), rtol=0, atol=1e-12)
        fused = fuse_distmats(*found[:2], normalization=normalization, attention_weight=0.3)
        assert torch.equal(found.fused, fused)
    squares = fused_distmats(
        model, query, gallery, feature_distances=lambda one, two: torch.cdist(one, two) ** 2
    )
    by_default = fused_distmats(model, query, gallery)
    torch.testing.assert_close(squares.features, by_default.features**2, rtol=0, atol=1e-12)
    features = torch.rand(40, 2048)
    twice = Encoding(torch.cat([features, features + 1e-5]), basis=torch.rand(80, 2048, 2, 1))
    distances = fused_distmats(Model(PairClassifier(2048, 4)), twice, twice).features
    assert distances.diagonal().max() < 1e-7  # products in float32 would give 1e-3
    exact = torch.cdist(*[nn.functional.normalize(twice.features.double())] * 2)
    torch.testing.assert_close(distances.double(), exact, rtol=0, atol=2e-7)
    short = fused_distmats(model, query, gallery, options=RankingOptions(shortlist=2))
    assert ((short.attention < 2**0.5).sum(1) == 2).all()


def test_bad_input_says_what_was_expected(unchecked):
    with pytest.raises(ValueError, match="one shape"):
        fuse_distmats(torch.rand(2, 3), torch.rand(3, 2))
    with pytest.raises(ValueError, match="'unit', 'query' or 'global', got 'none'"):
        fuse_distmats(torch.rand(2, 3), torch.rand(2, 3), normalization="none")


def test_options_that_do_not_go_together(unchecked):
    with pytest.raises(ValueError, match="'unit', 'query' or 'global', got 'none'"):
        RankingOptions(normalization="none")
    with pytest.raises(ValueError, match="attention_weight must be >= 0 and finite, got nan"):
        RankingOptions(attention_weight=float("nan"))
    with pytest.raises(ValueError, match="shortlist must be at least 1, got 0"):
        RankingOptions(shortlist=0)
    with pytest.raises(ValueError, match="shortlist needs normalization='unit', got 'query'"):
        RankingOptions("query", shortlist=5)
