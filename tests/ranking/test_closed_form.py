"""The closed form of the pair classifier, and when there is none."""

import numpy as np
import pytest
import reference
import torch
from small_heads import CHANNELS, CLASSIFIERS, Model, encode, pooled
from torch import nn

from casn_plugin import PairClassifier, attention_distmat
from casn_plugin.attention import indicator
from casn_plugin.ranking import same_identity_logits
from casn_plugin.ranking.closed_form import PairForm, pair_form
from casn_plugin.ranking.compute import Arithmetic


class Symmetric(PairClassifier):
    """Its own forward: the closed form of its layers would be wrong."""

    def forward(self, differences):
        return super().forward(differences.abs())


def test_a_pair_classifier_with_its_own_forward_is_followed():
    maps = torch.randn(6, CHANNELS, 7, 3, dtype=torch.float64).relu()
    encoding = encode(pooled, maps)
    model = Model(Symmetric(CHANNELS, 16).double())
    expected = reference.attention_distmat(
        pooled, model.pair_classifier, maps[:2], maps[2:], 0.2, False
    )
    distmat = attention_distmat(model, encoding[:2], encoding[2:])
    np.testing.assert_allclose(distmat, expected, rtol=0, atol=1e-10)
    plain = Model(PairClassifier(CHANNELS, 16).double())
    before = same_identity_logits(plain, encoding, encoding)
    handle = plain.pair_classifier.register_forward_hook(lambda *args: args[2] * 2)
    doubled = same_identity_logits(plain, encoding, encoding)
    handle.remove()
    torch.testing.assert_close(doubled, 2 * before, rtol=0, atol=1e-12)


def test_a_patched_forward_and_backward_hooks_are_followed():
    encoding = encode(pooled, torch.rand(6, CHANNELS, 7, 3, dtype=torch.float64))
    model = Model(PairClassifier(CHANNELS, 16).double())
    before = attention_distmat(model, encoding, encoding)
    forward = model.pair_classifier.forward
    model.pair_classifier.forward = lambda differences: forward(-differences)
    after = attention_distmat(model, encoding, encoding)
    expected = reference.attention_distmat(
        pooled, model.pair_classifier, encoding.maps * 21, encoding.maps * 21, 0.2, False
    )
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-10)
    assert not torch.equal(before, after)


def test_hidden_units_that_never_change_are_left_out(monkeypatch):
    """They go into a constant, and the result stays what it was."""
    encoding = encode(pooled, torch.rand(9, CHANNELS, 7, 3, dtype=torch.float64))
    model = Model(PairClassifier(CHANNELS, 16).double())
    model.pair_classifier[0].bias.data[:6] = torch.tensor([9.0, -9, 9, -9, 9, -9])
    maps, shapes, mm = encoding.basis * 21, [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kw: shapes.append(a.shape[1]) or mm(a, b, **kw))
    distmat = attention_distmat(model, encoding[:4], encoding[4:])
    monkeypatch.undo()
    assert 1 < max(shapes) <= 11  # ten units that change at most, and the constant
    expected = reference.attention_distmat(
        pooled, model.pair_classifier, maps[:4], maps[4:], 0.2, False
    )
    np.testing.assert_allclose(distmat, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_is_what_a_backward_pass_gives(bias, parts):
    torch.manual_seed(7)
    layers = nn.Linear(12, 20, bias=bias), nn.ReLU(), nn.Linear(20, 2, bias=bias)
    classifier = nn.Sequential(*layers).double()
    first, second = torch.randn(4, 12).double(), torch.randn(5, 12).double()
    arithmetic = Arithmetic(torch.device("cpu"), torch.float64)
    closed, other = (
        form(classifier, arithmetic, dim=12, parts=parts) for form in (pair_form, PairForm)
    )
    assert type(closed) is not type(other) and type(other) is PairForm
    found, logits = [], []
    for form in (closed, other):
        keys = form.keys(first, is_query=True), form.keys(second, is_query=False)
        alpha = form.indicators(*keys)
        found.append(alpha(keys[0][:, None], keys[1][None]).clone())
        some = alpha(keys[0][:2], keys[1][3:])  # of listed pairs
        assert torch.equal(some, found[-1][[0, 1], [3, 4]])
        with torch.no_grad():
            logits.append(form.logits(*keys))
    assert torch.equal(*found) and found[0].shape == (4, 5, 12)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)
    expected = indicator(classifier, (first[:, None] - second).flatten(0, 1)).view(4, 5, 12)
    if parts:  # the channels of a part come together
        expected = expected.unflatten(2, (4, 3)).transpose(2, 3).flatten(2)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_only_an_affine_classifier_has_one_indicator(name):
    classifier = CLASSIFIERS[name](CHANNELS).double()
    form = pair_form(classifier, Arithmetic(torch.device("cpu"), torch.float64), dim=CHANNELS)
    alpha = form.one_indicator()
    assert (alpha is not None) == name.startswith("affine")
    if alpha is not None:
        several = indicator(classifier, torch.randn(6, CHANNELS).double())
        assert torch.equal(several, alpha.expand(6, -1))
