"""The closed form of the pair classifier, and when there is none."""

import copy

import numpy as np
import pytest
import reference
import torch
from small_heads import CHANNELS, CLASSIFIERS, Model, encode, pooled
from torch import nn

from casn_plugin import PairClassifier, Similarity, attention_distmat
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


@pytest.mark.parametrize("scratch", [2**23, 8 * 5 * 20 * 2, 8 * 5 * 7])
@pytest.mark.parametrize("parts", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_is_what_a_backward_pass_gives(bias, parts, scratch):
    """At once, with memory for the gates of two queries, or for a few channels at a time."""
    torch.manual_seed(7)
    layers = nn.Linear(12, 20, bias=bias), nn.ReLU(), nn.Linear(20, 2, bias=bias)
    if bias:
        layers[0].bias.data[:3] = torch.tensor([90.0, 90.0, -90.0])  # open, or shut, for all pairs
    classifier = nn.Sequential(*layers).double()
    first, second = torch.randn(4, 12).double(), torch.randn(5, 12).double()
    arithmetic = Arithmetic(torch.device("cpu"), torch.float64, scratch=scratch)
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
    assert torch.equal(found[0], expected.bool())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_only_an_affine_classifier_has_one_indicator(name):
    classifier = CLASSIFIERS[name](CHANNELS).double()
    form = pair_form(classifier, Arithmetic(torch.device("cpu"), torch.float64), dim=CHANNELS)
    alpha = form.one_indicator()
    assert (alpha is not None) == name.startswith("affine")
    if alpha is not None:
        several = indicator(classifier, torch.randn(6, CHANNELS).double())
        assert torch.equal(several.bool(), alpha.expand(6, -1))


CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_weights_keep_their_signs_however_small_they_are(dtype):
    """They are rounded as parts of the largest: half precision would make zeros of them."""
    classifier = nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 2))
    classifier[0].weight.data = torch.tensor([[1.0, -1.0, 0.5, -0.5, 2.0, -2.0]]) * 1e-6
    classifier[0].bias.data.fill_(1.0)
    classifier[2].weight.data = torch.tensor([[0.0], [1e-3]])
    form = pair_form(classifier, Arithmetic(CPU, torch.float32, dtype), dim=6)
    keys = form.keys(torch.rand(2, 6), is_query=True), form.keys(torch.rand(3, 6), is_query=False)
    alpha = form.indicators(*keys)(keys[0][:, None], keys[1][None])
    assert alpha.tolist() == [[[1, 0, 1, 0, 1, 0]] * 3] * 2
    classifier[2].weight.data.zero_()  # nothing says "same": no α, and no NaN
    form = pair_form(classifier, Arithmetic(CPU, torch.float32, dtype), dim=6)
    assert not form.indicators(*keys)(keys[0][:, None], keys[1][None]).any()


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("classifier_in", [torch.float32, torch.bfloat16])
def test_a_classifier_of_other_numbers_than_those_of_ranking(name, classifier_in):
    """Features in float64, as ranking may be asked for, and a network in fewer bits."""
    torch.manual_seed(3)
    classifier = CLASSIFIERS[name](CHANNELS).to(classifier_in)
    exact = copy.deepcopy(classifier).double()
    first, second = torch.randn(3, CHANNELS).double(), torch.randn(4, CHANNELS).double()
    found = []
    for each in (classifier, exact):
        form = pair_form(each, Arithmetic(CPU, torch.float64), dim=CHANNELS)
        keys = form.keys(first, is_query=True), form.keys(second, is_query=False)
        alpha = form.indicators(*keys)(keys[0][:, None], keys[1][None]).clone()
        with torch.no_grad():
            found.append((form.logits(*keys), alpha))
        one = form.one_indicator()
        assert found[-1][0].dtype == torch.float64 and alpha.dtype == torch.bool
        assert one is None or one.dtype == torch.bool
    single = pair_form(exact, Arithmetic(CPU, torch.float32), dim=CHANNELS)
    assert single.keys(first.float(), is_query=True).dtype == torch.float32
    (logits, alpha), (expected, _) = found
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05)
    assert (alpha == found[1][1]).double().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_few_bits_are_multiplied_in_those_of_ranking(dtype):
    torch.manual_seed(0)
    classifier = PairClassifier(200, 32).to(dtype)
    first, second = torch.randn(20, 200).double(), torch.randn(20, 200).double()
    form = pair_form(classifier, Arithmetic(CPU, torch.float64), dim=200)
    keys = form.keys(first, is_query=True), form.keys(second, is_query=False)
    alpha = form.indicators(*keys)(keys[0][:, None], keys[1][None])
    exact = indicator(classifier.double(), (first[:, None] - second).flatten(0, 1))
    assert torch.equal(alpha, exact.view(20, 20, 200).bool())


@pytest.mark.parametrize("varying", [1, 3, 40])
def test_few_hidden_units_that_vary_make_no_narrow_products(varying, monkeypatch):
    """Memory for gates alone would be for all pairs at once: sums of a few channels at a time."""
    torch.manual_seed(1)
    classifier = PairClassifier(300, 40)
    classifier[0].bias.data[varying:] = 1e3
    form = pair_form(classifier, Arithmetic(CPU, torch.float32, scratch=4 * 30 * 512), dim=300)
    first, second = torch.rand(30, 300), torch.rand(30, 300)
    keys = form.keys(first, is_query=True), form.keys(second, is_query=False)
    widths, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kw: widths.append(b.shape[1]) or mm(a, b, **kw))
    alpha = form.indicators(*keys)(keys[0][:, None], keys[1][None])
    monkeypatch.undo()
    assert min(widths) >= 44 and max(widths) >= 256  # 300 channels in two, at most
    expected = indicator(classifier, (first[:, None] - second).flatten(0, 1)).view(30, 30, 300)
    assert (alpha != expected.bool()).sum() < 5  # sums within rounding of zero


def test_a_classifier_without_weights_is_run_in_the_numbers_of_ranking():
    class Weightless(nn.Module):
        def forward(self, differences):
            return torch.stack([differences[:, 0], differences.pow(2).sum(1)], dim=1)

    form = pair_form(Weightless(), Arithmetic(CPU, torch.float64), dim=2)
    features = torch.tensor([[1 + 1e-9, 0.0], [0.0, 0.0]], dtype=torch.float64)
    logits = form.logits(form.keys(features, is_query=True), form.keys(features, is_query=False))
    expected = torch.tensor([[0.0, 1e-9], [2 + 3e-9, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-15)
    assert form.one_indicator() is None


@pytest.mark.filterwarnings("error")  # as of memory that is of another shape
def test_gates_of_equal_keys_are_shut():
    """ReLU has no gradient at 0: neither where all keys are equal, nor where only some are."""
    classifier = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    classifier[0].weight.data = torch.tensor([[1.0], [-1.0]])
    classifier[2].weight.data = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    form = pair_form(classifier, Arithmetic(CPU, torch.float32), dim=1)
    for query, gallery in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0], [0.0, 1.0])):
        first, second = torch.tensor(query)[:, None], torch.tensor(gallery)[:, None]
        keys = form.keys(first, is_query=True), form.keys(second, is_query=False)
        alpha = form.indicators(*keys)(keys[0][:, None], keys[1][None])
        differences = (first[:, None] - second).flatten(0, 1)
        assert torch.equal(alpha.flatten(0, 1), indicator(classifier, differences).bool())


def test_a_similarity_has_no_indicator():
    form = pair_form(Similarity(), Arithmetic(CPU, torch.float32), dim=2)
    with pytest.raises(ValueError, match="^a Similarity has no indicator α: expected a pair class"):
        form.indicators(torch.rand(1, 2), torch.rand(1, 2))
    assert form.one_indicator() is None


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_of_any_kind_is_followed_and_a_removed_one_is_not(kind):
    classifier, arithmetic = PairClassifier(4, 8), Arithmetic(CPU, torch.float32)
    for module in (classifier, classifier[1]):
        handle = getattr(module, f"register_{kind}_hook")(lambda *args: None)
        assert type(pair_form(classifier, arithmetic, dim=4)) is PairForm
        handle.remove()
        assert type(pair_form(classifier, arithmetic, dim=4)) is not PairForm
