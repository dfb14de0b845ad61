"""Exactness of the ranking for every kind of head, fusion, and bounded tiles."""

import numpy as np
import pytest
import reference
import torch
from torch import nn

from casn_plugin import Encoding, PairClassifier, attention_distmat, fuse_distmats
from casn_plugin.encoding import encode_head
from casn_plugin.ranking import pair_attention, same_identity_distmat

CHANNELS, PARTS = 8, 3


class Model(nn.Module):
    """All that ranking looks at."""

    def __init__(self, pair_classifier: nn.Module) -> None:
        super().__init__()
        self.pair_classifier = pair_classifier


def pooled(activations):
    return activations.mean((2, 3))


def parts(activations):
    return reference.pcb_embedding(activations, PARTS)


def make_embedding():
    torch.manual_seed(5)
    layers = nn.Sequential(nn.Linear(CHANNELS, 7), nn.BatchNorm1d(7), nn.ReLU()).double().eval()
    return lambda activations: layers(activations.relu().mean((2, 3)))


def normalized(activations):
    return nn.functional.normalize(activations.flatten(1), dim=1)


HEADS = {
    "pooled": (pooled, "basis"),
    "parts": (parts, "activations"),
    "embedding": (make_embedding(), "basis"),
    "normalized": (normalized, "basis"),
}
CLASSIFIERS = {
    "two layers": lambda dim: PairClassifier(dim, 16),
    "affine": lambda dim: nn.Linear(dim, 2),
    "affine, two layers": lambda dim: nn.Sequential(nn.Linear(dim, 9), nn.Linear(9, 2)),
    "smooth": lambda dim: nn.Sequential(nn.Linear(dim, 9), nn.Tanh(), nn.Linear(9, 2)),
}


def encode(head, activations):
    activations = activations.detach().requires_grad_()
    return encode_head(head(activations), activations)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("unit", [False, True])
def test_attention_distmat_agrees_with_autograd(name, classifier, unit):
    head, kind = HEADS[name]
    maps = torch.randn(8, CHANNELS, 7, 3, dtype=torch.float64).relu()
    encoding = encode(head, maps)
    assert getattr(encoding, kind) is not None
    model = Model(CLASSIFIERS[classifier](encoding.features.shape[1]).double())
    distmat = attention_distmat(model, encoding[:3], encoding[3:], threshold=0.3, unit=unit)
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


@pytest.mark.parametrize("name", ["pooled", "parts"])
@pytest.mark.parametrize("max_memory", [1, 20_000, 10**9])
def test_tiles_of_any_size_give_the_same(name, max_memory):
    head, _ = HEADS[name]
    encoding = encode(head, torch.rand(11, CHANNELS, 7, 3, dtype=torch.float64))
    model = Model(PairClassifier(encoding.features.shape[1], 16).double())
    whole = attention_distmat(model, encoding[:4], encoding[4:])
    tiled = attention_distmat(model, encoding[:4], encoding[4:], max_memory=max_memory)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)
    whole = same_identity_distmat(model, encoding[:4], encoding[4:])
    tiled = same_identity_distmat(model, encoding[:4], encoding[4:], max_memory=max_memory)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_same_identity_distmat_is_the_pair_classifier_of_every_pair(classifier):
    encoding = encode(pooled, torch.rand(6, CHANNELS, 5, 3, dtype=torch.float64))
    model = Model(CLASSIFIERS[classifier](CHANNELS).double())
    distmat = same_identity_distmat(model, encoding[:2], encoding[2:])
    for i in range(2):
        for j in range(4):
            with torch.no_grad():
                z = model.pair_classifier((encoding.features[i] - encoding.features[2 + j])[None])
            assert distmat[i, j].item() == pytest.approx((z[0, 1] - z[0, 0]).item(), abs=1e-12)


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
    before = same_identity_distmat(plain, encoding, encoding)
    handle = plain.pair_classifier.register_forward_hook(lambda *args: args[2] * 2)
    doubled = same_identity_distmat(plain, encoding, encoding)
    handle.remove()
    torch.testing.assert_close(doubled, 2 * before, rtol=0, atol=1e-12)


def test_the_pair_classifier_ranks_in_eval_mode_and_is_left_as_found():
    layers = nn.Linear(CHANNELS, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 2)
    model = Model(nn.Sequential(*layers).double().train())
    encoding = encode(pooled, torch.rand(6, CHANNELS, 7, 3, dtype=torch.float64))
    whole = attention_distmat(model, encoding[:2], encoding)
    tiled = attention_distmat(model, encoding[:2], encoding, max_memory=1)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)
    pair_attention(model, encoding, encoding)
    same_identity_distmat(model, encoding, encoding)
    assert model.pair_classifier.training and layers[1].running_mean.abs().max() == 0


def test_the_jacobian_stops_at_the_pooled_vector(monkeypatch):
    """Where the head takes the mean of the map, no product goes back to the map itself."""
    activations = torch.rand(3, CHANNELS, 7, 3, dtype=torch.float64, requires_grad=True)
    pooled_map = activations.mean((2, 3), keepdim=True)
    seen, grad = [], torch.autograd.grad

    def recorded(outputs, inputs, *args, **kwargs):
        seen.append(inputs)
        return grad(outputs, inputs, *args, **kwargs)

    for dim in (5, 20):  # fewer and more features than channels
        torch.manual_seed(dim)
        layers = nn.Sequential(nn.Linear(CHANNELS, dim), nn.Tanh()).double()
        features = layers(pooled_map.flatten(1))
        slow = encode_head(features, activations)
        seen.clear()
        monkeypatch.setattr(torch.autograd, "grad", recorded)
        fast = encode_head(features, activations, pooled_map)
        monkeypatch.undo()
        assert sum(source is activations for source in seen) == 1  # the probe
        assert sum(source is pooled_map for source in seen) >= 2
        torch.testing.assert_close(fast.basis, slow.basis, rtol=0, atol=1e-14)


def test_float32_is_close_to_float64():
    activations = torch.rand(10, CHANNELS, 7, 3, dtype=torch.float64)
    model = Model(PairClassifier(CHANNELS, 16).double())
    encoding = encode(pooled, activations)
    exact = attention_distmat(model, encoding, encoding)
    encoding = encoding.to(torch.float32)
    rounded = attention_distmat(model.float(), encoding, encoding)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=1e-5)


def test_encodings_select_join_and_check_themselves():
    encoding = encode(parts, torch.rand(5, CHANNELS, 7, 3))
    assert len(encoding) == 5 and len(encoding[torch.tensor([4, 1])]) == 2
    joined = Encoding.cat([encoding[:2], encoding[2:]])
    torch.testing.assert_close(joined.maps, encoding.maps, rtol=0, atol=0)
    other = encode(pooled, torch.rand(2, CHANNELS, 7, 3))
    with pytest.raises(ValueError, match="all with a basis or all with activations"):
        Encoding.cat([encoding, other])
    with pytest.raises(ValueError, match="at least one"):
        Encoding.cat([])


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
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\), got 1"):
        attention_distmat(model, encoding, encoding, threshold=1.0)
    with pytest.raises(ValueError, match="no pair_classifier"):
        attention_distmat(nn.Linear(2, 2), encoding, encoding)
    with pytest.raises(ValueError, match="either a basis or activations"):
        Encoding(torch.rand(2, 3))
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        Encoding(torch.rand(2, 3), basis=torch.rand(3, 3, 2, 2))
    with pytest.raises(ValueError, match="do not depend on the activations"):
        encode_head(torch.rand(2, CHANNELS), torch.rand(2, CHANNELS, 5, 3))
    with pytest.raises(ValueError, match="got 2, 4"):
        pair_attention(model, encoding[:2], encoding)
    with pytest.raises(ValueError, match="one shape"):
        fuse_distmats(torch.rand(2, 3), torch.rand(3, 2))
    with pytest.raises(ValueError, match="'unit', 'query' or 'global', got 'none'"):
        fuse_distmats(torch.rand(2, 3), torch.rand(2, 3), normalization="none")


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
