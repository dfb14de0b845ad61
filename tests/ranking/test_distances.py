"""All pairs: exactness for every kind of head and pair classifier."""

import numpy as np
import pytest
import reference
import torch
from small_heads import CHANNELS, CLASSIFIERS, HEADS, PARTS, Model, encode, parts, pooled
from torch import nn

from casn_plugin import Compute, Encoding, PairClassifier, attention_distmat, rank_gallery
from casn_plugin.ranking import indicator_flips, pair_attention, same_identity_logits


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("unit", [False, True])
def test_attention_distmat_agrees_with_autograd(name, classifier, unit):
    head, kind = HEADS[name]
    maps = torch.randn(8, CHANNELS, 7, 3, dtype=torch.float64).relu()
    encoding = encode(head, maps)
    assert getattr(encoding, kind) is not None
    model = Model(CLASSIFIERS[classifier](encoding.features.shape[1]).double())
    distmat = attention_distmat(model, encoding[:3], encoding[3:], row_threshold=0.3, unit=unit)
    expected = reference.attention_distmat(
        head, model.pair_classifier, maps[:3], maps[3:], 0.3, unit
    )
    assert distmat.shape == (3, 5) and distmat.max() > 0
    np.testing.assert_allclose(distmat, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_pair_attention_agrees_with_autograd(name):
    head, _ = HEADS[name]
    maps = torch.randn(6, CHANNELS, 7, 3, dtype=torch.float64).relu()
    encoding = encode(head, maps)
    model = Model(PairClassifier(encoding.features.shape[1], 16).double())
    first, second = pair_attention(model, encoding[:3], encoding[3:])
    for i in range(3):
        expected = reference.siamese_maps(head, model.pair_classifier, maps[i], maps[i + 3])
        torch.testing.assert_close(first[i], expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(second[i], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_same_identity_logits_is_the_pair_classifier_of_every_pair(classifier):
    encoding = encode(pooled, torch.rand(6, CHANNELS, 5, 3, dtype=torch.float64))
    model = Model(CLASSIFIERS[classifier](CHANNELS).double())
    distmat = same_identity_logits(model, encoding[:2], encoding[2:])
    for i in range(2):
        for j in range(4):
            with torch.no_grad():
                z = model.pair_classifier((encoding.features[i] - encoding.features[2 + j])[None])
            assert distmat[i, j].item() == pytest.approx((z[0, 1] - z[0, 0]).item(), abs=1e-12)


def test_float32_is_close_to_float64():
    activations = torch.rand(10, CHANNELS, 7, 3, dtype=torch.float64)
    model = Model(PairClassifier(CHANNELS, 16).double())
    encoding = encode(pooled, activations)
    exact = attention_distmat(model, encoding, encoding)
    encoding = encoding.to(torch.float32)
    rounded = attention_distmat(model.float(), encoding, encoding)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_float32_model_ranks_float64_encodings(classifier):
    encoding = encode(pooled, torch.rand(6, CHANNELS, 7, 3, dtype=torch.float64))
    model = Model(CLASSIFIERS[classifier](CHANNELS))
    for function in (attention_distmat, same_identity_logits):
        found = function(model, encoding, encoding)
        expected = function(model, *[encoding.to(torch.float32)] * 2)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["pooled", "parts", "negative"])
def test_reduced_precision_rounds_the_operands_and_nothing_else(name):
    if name == "negative":  # a basis may be
        encoding = encode(pooled, torch.rand(12, CHANNELS, 7, 3))
        basis = torch.rand(12, CHANNELS, 7, 3) - 0.4
        basis[0] = -basis[0].abs()  # a blank map
        encoding = Encoding(encoding.features, basis=basis)
    else:
        encoding = encode(HEADS[name][0], torch.rand(12, CHANNELS, 7, 3))
    model = Model(PairClassifier(encoding.features.shape[1], 16))
    exact = attention_distmat(model, encoding[:4], encoding)
    for precision, atol in ((torch.float16, 0.02), (torch.bfloat16, 0.2)):
        reduced = attention_distmat(
            model, encoding[:4], encoding, compute=Compute(precision=precision)
        )
        assert reduced.dtype == torch.float32
        assert 0 < (reduced - exact).abs().median() < atol
    same = encoding.to(torch.float64)
    model.double()
    assert indicator_flips(model, same, same) == (0, 144 * encoding.features.shape[1])


def test_flips_of_the_indicator_are_counted():
    encoding = encode(parts, torch.rand(9, CHANNELS, 7, 3))
    model = Model(PairClassifier(CHANNELS * PARTS, 64))
    layers = model.pair_classifier
    weights = (layers[2].weight[1, :, None] * layers[0].weight).detach()
    weights = (weights / weights.abs().max()).bfloat16().float()
    expected = 0
    with torch.no_grad():
        for first in encoding.features:
            for second in encoding.features:
                gate = (layers[0](first - second) > 0).float()
                alpha = gate @ weights > 0
                inputs = (first - second).double().requires_grad_()
                with torch.enable_grad():
                    z = nn.Sequential(*layers).double()(inputs)[1]
                    (gradient,) = torch.autograd.grad(z, inputs)
                nn.Sequential(*layers).float()
                expected += int((alpha != (gradient > 0)).sum())
    found, number = indicator_flips(
        model, encoding, encoding, compute=Compute(precision=torch.bfloat16)
    )
    assert found == expected > 0 and number == 81 * CHANNELS * PARTS


def test_bad_input_says_what_was_expected(unchecked):
    encoding = encode(pooled, torch.rand(4, CHANNELS, 7, 3))
    smaller = encode(pooled, torch.rand(4, CHANNELS, 5, 3))
    by_parts = encode(parts, torch.rand(4, CHANNELS, 7, 3))
    model = Model(PairClassifier(CHANNELS, 16))
    with pytest.raises(TypeError, match="what model.encode gives, got Tensor"):
        attention_distmat(model, torch.rand(4, 8), encoding)
    with pytest.raises(TypeError, match="unlike encodings"):
        attention_distmat(model, by_parts, encoding)
    with pytest.raises(ValueError, match=r"\(8, 7, 3\) and \(8, 5, 3\)"):
        attention_distmat(model, encoding, smaller)
    with pytest.raises(ValueError, match=r"row_threshold must lie in \[0, 1\), got 1"):
        attention_distmat(model, encoding, encoding, row_threshold=1.0)
    with pytest.raises(ValueError, match="no pair_classifier"):
        attention_distmat(nn.Linear(2, 2), encoding, encoding)
    with pytest.raises(ValueError, match="got 2, 4"):
        pair_attention(model, encoding[:2], encoding)
    with pytest.raises(ValueError, match="shortlist must be at least 1, got 0"):
        attention_distmat(model, encoding, encoding, shortlist=0)


@pytest.mark.parametrize("function", [attention_distmat, rank_gallery])
def test_encodings_that_cannot_be_ranked(function, unchecked):
    encoding = encode(pooled, torch.rand(4, CHANNELS, 7, 3))
    model = Model(PairClassifier(CHANNELS, 16))
    with pytest.raises(TypeError, match="float32 or wider, got torch.float32 and torch.float6"):
        function(model, encoding, encoding.to(torch.float64))
    half = encoding.to(torch.float16)
    with pytest.raises(TypeError, match="float32 or wider, got torch.float16"):
        function(model, half, half)
    for value in (torch.nan, torch.inf):
        broken = Encoding(encoding.features.clone(), basis=encoding.maps)
        broken.features[2, 1] = value
        with pytest.raises(ValueError, match="features must be finite"):
            function(model, encoding, broken)
        with pytest.raises(ValueError, match="features must be finite"):
            function(model, broken, encoding)


def test_no_queries_and_no_gallery():
    encoding = encode(pooled, torch.rand(4, CHANNELS, 7, 3))
    for classifier in (PairClassifier(CHANNELS, 16), nn.Linear(CHANNELS, 2)):
        model = Model(classifier)
        for function in (attention_distmat, same_identity_logits):
            assert function(model, encoding, encoding[:0]).shape == (4, 0)
            assert function(model, encoding[:0], encoding).shape == (0, 4)
        none = pair_attention(model, encoding[:0], encoding[:0])
        assert [each.shape for each in none] == [(0, 7, 3)] * 2
