"""Exactness of the ranking for every kind of head, search, fusion, bounded tiles, processes."""

import itertools
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import casn_plugin
from casn_plugin import Encoding, PairClassifier, attention_distmat, fuse_distmats, rank_gallery
from casn_plugin.encoding import encode_head
from casn_plugin.ranking import indicator_flips, pair_attention, same_identity_distmat

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


class Blocks:
    """A gallery that is no Encoding: it counts what is read of it."""

    def __init__(self, encoding):
        self.encoding, self.read = encoding, 0

    def __len__(self):
        return len(self.encoding)

    def __getitem__(self, rows):
        some = self.encoding[rows]
        self.read += len(some)
        return some

    def features_of(self, rows):
        return self.encoding.features[rows]


@pytest.mark.parametrize("name", ["pooled", "parts"])
@pytest.mark.parametrize("max_memory", [1, 30_000, 10**9])
def test_a_gallery_read_in_blocks_gives_the_same(name, max_memory):
    encoding = encode(HEADS[name][0], torch.rand(15, CHANNELS, 7, 3, dtype=torch.float64))
    model = Model(PairClassifier(encoding.features.shape[1], 16).double())
    query, gallery = encoding[:4], Blocks(encoding[4:])
    for function in (attention_distmat, same_identity_distmat):
        whole = function(model, query, encoding[4:])
        read = function(model, query, gallery, max_memory=max_memory)
        torch.testing.assert_close(read, whole, rtol=0, atol=1e-12)
    whole = rank_gallery(model, query, encoding[4:], topk=5)
    read = rank_gallery(model, query, gallery, topk=5, max_memory=max_memory)
    assert torch.equal(read.indices, whole.indices)
    torch.testing.assert_close(read.distances, whole.distances, rtol=0, atol=1e-12)


def test_a_gallery_is_read_once_where_the_queries_fit():
    encoding = encode(pooled, torch.rand(40, CHANNELS, 7, 3))
    model, gallery = Model(PairClassifier(CHANNELS, 16)), Blocks(encoding)
    attention_distmat(model, encoding[:4], gallery, max_memory=100_000)
    assert gallery.read <= len(encoding) + 2  # twice one image, to see its size
    gallery.read = 0
    attention_distmat(model, encoding, gallery, max_memory=20_000)
    assert gallery.read > 2 * len(encoding)
    gallery.read = 0  # a search reads no maps of blocks where the bound leaves nothing
    far = encoding.features.norm(dim=1).argsort()
    ordered = Encoding(encoding.features[far] ** 8, basis=encoding.maps[far])
    gallery = Blocks(ordered)
    rank_gallery(model, ordered[:1], gallery, topk=1, attention_weight=1e-6, max_memory=100_000)
    assert gallery.read < len(encoding) / 2


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


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_float32_model_ranks_float64_encodings(classifier):
    encoding = encode(pooled, torch.rand(6, CHANNELS, 7, 3, dtype=torch.float64))
    model = Model(CLASSIFIERS[classifier](CHANNELS))
    for function in (attention_distmat, same_identity_distmat):
        found = function(model, encoding, encoding)
        expected = function(model, *[encoding.to(torch.float32)] * 2)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1e-4)


def brute_force(model, query, gallery, topk, weight, threshold=0.2):
    """Returns indices and distances by the whole matrices."""
    qf, gf = (nn.functional.normalize(each.features) for each in (query, gallery))
    distmat = (qf[:, None] - gf[None]).norm(dim=2)
    attention = attention_distmat(model, query, gallery, unit=True, threshold=threshold)
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
        model, query, gallery, topk=topk, attention_weight=weight, max_memory=max_memory
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
        some = attention_distmat(model, query, gallery, unit=unit, topk=topk)
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
        reduced = attention_distmat(model, encoding[:4], encoding, precision=precision)
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
    found, number = indicator_flips(model, encoding, encoding, precision=torch.bfloat16)
    assert found == expected > 0 and number == 81 * CHANNELS * PARTS


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


def test_tiles_keep_to_their_memory():
    from torch.profiler import ProfilerActivity, profile

    encoding = encode(parts, torch.rand(150, 32, 12, 4))
    halves = Encoding(encoding.features, activations=encoding.maps.half())  # to be converted
    model = Model(PairClassifier(32 * PARTS, 64))
    functions = (
        attention_distmat,
        partial(attention_distmat, topk=40),
        partial(attention_distmat, precision=torch.float16),
        rank_gallery,
    )
    galleries = (halves, Blocks(halves)), (encoding, encoding)
    max_memory = 2**20
    for function, images in itertools.product(functions, galleries):
        held, total = [], 0
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function(model, *images, max_memory=max_memory)
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                held.append(total)
        assert max_memory / 20 < max(held) - 4 * 150 * 150 < 1.2 * max_memory


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch import nn
from casn_plugin import Encoding, PairClassifier, attention_distmat, rank_gallery
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Module()
model.pair_classifier = PairClassifier(24, 16)
affine = nn.Module()
affine.pair_classifier = nn.Linear(24, 2)
features = torch.rand(30, 24).repeat_interleave(2, 0)  # two at each distance
images = Encoding(features, basis=torch.rand(60, 24, 8, 3))
query, gallery, distributed = images[:7], images[7:], len(sys.argv) > 2
if distributed:
    dist.init_process_group("gloo")
options = dict(max_memory=200_000, distributed=distributed)
found = [
    attention_distmat(model, query, gallery, **options),
    attention_distmat(affine, query, gallery, **options),
    attention_distmat(model, query, gallery, topk=9, **options),
    *vars(rank_gallery(model, query, gallery, topk=5, **options)).values(),
    *vars(rank_gallery(model, query, gallery, topk=5, exact=False, **options)).values(),
]
rank = dist.get_rank() if distributed else 0
if distributed:
    class Broken:
        def __len__(self):
            return len(gallery)
        def __getitem__(self, rows):
            if rank and rows.stop > 1:
                raise OSError("no such disk")
            return gallery[rows]
        def features_of(self, rows):
            return gallery.features[rows]
    for function in attention_distmat, rank_gallery:
        try:
            function(model, query, Broken(), **options)
        except (OSError, RuntimeError) as error:
            message = str(error)
        assert message == ("no such disk" if rank else "process 1 failed: OSError('no such disk')")
torch.save(found, f"{sys.argv[1]}/{distributed}{rank}.pt")
if distributed:
    dist.destroy_process_group()
"""


def test_two_processes_rank_as_one_does_bit_for_bit(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    alone = [sys.executable, str(script), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(casn_plugin.__file__).parents[1])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in (alone, [*launch, *alone[1:], "distributed"]):
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt") for name in ("False0", "True0", "True1")
    )
    assert len(one) == len(first) == len(second) == 13
    for expected, *both in zip(one, first, second, strict=True):
        for each in both:
            assert each == expected if isinstance(each, int) else torch.equal(each, expected)


def test_bad_options_of_a_ranking_say_what_was_expected(unchecked):
    encoding = encode(pooled, torch.rand(4, CHANNELS, 7, 3))
    model = Model(PairClassifier(CHANNELS, 16))
    for function in (attention_distmat, rank_gallery):
        with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
            function(model, encoding, encoding, topk=0)
        with pytest.raises(ValueError, match="max_memory must be at least 1, got 0"):
            function(model, encoding, encoding, max_memory=0)
        with pytest.raises(TypeError, match=r"float16 or torch.bfloat16, got torch.float64"):
            function(model, encoding, encoding, precision=torch.float64)
        with pytest.raises(ValueError, match="init_process_group"):
            function(model, encoding, encoding, distributed=True)
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
    for sizes in ((4, 5), (5, 4)):
        with pytest.raises(ValueError, match=f"got {sizes[0]} features and {sizes[1]} channels"):
            Encoding(torch.rand(2, sizes[0]), basis=torch.rand(2, sizes[1], 6, 3))
    with pytest.raises(ValueError, match="got 8 features and 3 channels"):
        Encoding(torch.rand(2, 8), activations=torch.rand(2, 3, 6, 3))
    assert attention_distmat(model, encoding, encoding, max_memory=10**30).shape == (4, 4)
    with pytest.raises(ValueError, match="gallery is empty"):
        rank_gallery(model, encoding, encoding[:0])
    with pytest.raises(ValueError, match="attention_weight must be >= 0 and finite, got -1"):
        rank_gallery(model, encoding, encoding, attention_weight=-1)
    assert attention_distmat(model, encoding, encoding[:0]).shape == (4, 0)
    assert attention_distmat(model, encoding[:0], encoding).shape == (0, 4)
    affine = Model(nn.Linear(CHANNELS, 2))
    assert attention_distmat(affine, encoding[:0], encoding).shape == (0, 4)
    with pytest.raises(ValueError, match="finite, got inf"):
        rank_gallery(model, encoding, encoding, attention_weight=float("inf"))
    assert rank_gallery(model, encoding[:0], encoding, topk=2).indices.shape == (0, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["pooled", "parts"])
def test_cuda_ranks_as_the_cpu_does(name, precision):
    encoding = encode(HEADS[name][0], torch.rand(20, CHANNELS, 7, 3))
    model = Model(PairClassifier(encoding.features.shape[1], 64))
    options = {"precision": precision, "unit": True}
    here = attention_distmat(model, encoding[:6], encoding, **options)
    found = rank_gallery(model, encoding[:6], encoding, topk=4)
    model.cuda()
    for gallery in (encoding, encoding.to("cuda"), Blocks(encoding)):
        there = attention_distmat(model, encoding[:6], gallery, **options)
        assert there.device.type == "cpu"
        assert (there - here).abs().median() < (1e-5 if precision is None else 1e-2)
        near = attention_distmat(model, encoding[:6], gallery, topk=5, **options)
        assert near.device.type == "cpu" and (near < 2**0.5).sum() <= 30
        again = rank_gallery(model, encoding[:6], gallery, topk=4)
        torch.testing.assert_close(again.distances, found.distances, rtol=0, atol=1e-3)
