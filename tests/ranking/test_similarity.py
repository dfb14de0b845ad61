"""The similarity of both features in closed form: all pairs, against autograd pair by pair."""

import numpy as np
import pytest
import reference
import torch
from conftest import TinyBackbone, tiny_forward
from small_heads import CHANNELS, HEADS, Blocks, Model, encode, parts, pooled

from casn_plugin import (
    CASN,
    Compute,
    Evidence,
    GalleryIndex,
    Similarity,
    attention_distmat,
    rank_gallery,
)
from casn_plugin.attention import similarity_attention
from casn_plugin.encoding import Encoding
from casn_plugin.ranking import (
    RankingOptions,
    fused_distmats,
    indicator_flips,
    pair_attention,
    pair_scores,
    same_identity_logits,
)
from casn_plugin.ranking.pairs import device_of

MODEL = Model(Similarity())
SIZE = (64, 32)


def random_maps(number):
    return torch.randn(number, CHANNELS, 7, 3, dtype=torch.float64).relu()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("memory", [None, 4000])
def test_all_pairs_agree_with_autograd(name, unit, memory):
    head, kind = HEADS[name]
    maps = random_maps(9)
    encoding = encode(head, maps)
    assert getattr(encoding, kind) is not None
    compute = Compute(max_memory=memory)  # in one tile, and in many
    query, gallery = encoding[:4], encoding[4:]
    distmat = attention_distmat(
        MODEL, query, gallery, row_threshold=0.3, unit=unit, compute=compute
    )
    expected = reference.similarity_distmat(head, maps[:4], maps[4:], 0.3, unit)
    assert distmat.std() > 0.01
    np.testing.assert_allclose(distmat, expected, rtol=1e-9, atol=1e-12)
    whole = attention_distmat(  # of listed pairs
        MODEL, query, gallery, row_threshold=0.3, unit=unit, shortlist=5, compute=compute
    )
    np.testing.assert_allclose(whole, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_maps_of_pairs_agree_with_autograd(name):
    head, _ = HEADS[name]
    maps = random_maps(6)
    encoding = encode(head, maps)
    found = pair_attention(MODEL, encoding[:3], encoding[3:])
    rows = maps.unflatten(0, (2, 3)).transpose(0, 1).flatten(0, 1).requires_grad_()
    by_autograd = similarity_attention(head(rows), rows)
    for i in range(3):
        expected = reference.similarity_maps(head, maps[i], maps[i + 3])
        assert expected[0].max() > 0
        for side in (0, 1):
            largest = expected[side].max().item()
            for got in (found[side][i], by_autograd[2 * i + side]):
                torch.testing.assert_close(got, expected[side], rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize("name", HEADS)
def test_float32_is_within_1e_5_of_autograd_in_float64(name):
    head, _ = HEADS[name]
    maps = random_maps(8)
    encoding = encode(head, maps).to(torch.float32)
    found = pair_attention(MODEL, encoding[:4], encoding[4:])
    for i in range(4):
        expected = reference.similarity_maps(head, maps[i], maps[i + 4])
        for side in (0, 1):
            error = (found[side][i] - expected[side]).abs().max() / expected[side].max()
            assert error < 1e-5


def test_features_of_any_length_and_in_any_memory_give_one_map():
    """Maps are of f, not of f at unit length; and where they lie changes nothing."""
    maps = random_maps(6)
    double = encode(lambda a: 2 * pooled(a), maps)
    single = encode(pooled, maps)
    for mine, other in zip(
        pair_attention(MODEL, double[:3], double[3:]),
        pair_attention(MODEL, single[:3], single[3:]),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    expected = attention_distmat(MODEL, single, single)
    plain = Encoding(single.features, basis=single.basis.contiguous())
    for gallery in (plain, Blocks(plain)):
        torch.testing.assert_close(
            attention_distmat(MODEL, plain, gallery), expected, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", [pooled, parts])
def test_a_picture_and_itself_have_no_attention_instead_of_noise(dtype, head):
    """The cosine is at its greatest: its gradient is zero, whatever rounding leaves of it."""
    encoding = encode(head, random_maps(5)).to(dtype)
    for maps in pair_attention(MODEL, encoding, encoding):
        assert not maps.any()
    distmat = attention_distmat(MODEL, encoding, encoding)
    assert not distmat.diagonal().any() and (distmat > 0).sum() >= 18
    for shortlist in (1, 5):
        listed = attention_distmat(MODEL, encoding, encoding, shortlist=shortlist)
        assert not listed.diagonal().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shortlist", [None, 5])
def test_equal_features_of_unlike_pictures_are_no_noise_either(dtype, shortlist):
    maps = random_maps(5)
    encoding, upside_down = (encode(pooled, each).to(dtype) for each in (maps, maps.flip(2)))
    distmat = attention_distmat(MODEL, encoding, upside_down, shortlist=shortlist)
    assert not distmat.diagonal().any() and (distmat > 0).sum() >= 18


def test_pairs_are_worked_on_where_the_network_is():
    """A Similarity has no weights that would say where."""
    model, features = Model(Similarity()), torch.rand(2, 4)
    assert device_of(model, features).type == "cpu"
    model.backbone = torch.nn.Linear(2, 2, device="meta")
    assert device_of(model, features).type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_cuda_finds_what_the_cpu_finds(name, precision):
    encoding = encode(HEADS[name][0], random_maps(20)).to(torch.float32)
    compute = Compute(precision=precision)
    here = attention_distmat(MODEL, encoding[:6], encoding, compute=compute)
    model = Model(Similarity())
    model.backbone = torch.nn.Linear(2, 2, device="cuda")
    for shortlist in (None, 20):
        there = attention_distmat(
            model, encoding[:6], encoding, compute=compute, shortlist=shortlist
        )
        assert (there - here).abs().median() < (1e-5 if precision is None else 1e-2)


def test_features_of_zero_are_no_error():
    encoding = Encoding(torch.zeros(2, 4), basis=torch.rand(2, 4, 6, 2))
    assert attention_distmat(MODEL, encoding, encoding).isfinite().all()
    assert pair_attention(MODEL, encoding, encoding)[0].isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_half_precision_is_close(name):
    head, _ = HEADS[name]
    encoding = encode(head, random_maps(9))
    exact = attention_distmat(MODEL, encoding[:4], encoding[4:])
    compute = Compute(precision=torch.float16)
    rounded = attention_distmat(MODEL, encoding[:4], encoding[4:], compute=compute)
    assert (rounded - exact).abs().max() > 1e-7 and (rounded - exact).abs().mean() < 0.05


def test_scores_are_cosines_and_are_taken_for_nothing_else():
    encoding = encode(pooled, random_maps(6))
    scores = pair_scores(MODEL, encoding[:2], encoding[2:])
    for i in range(2):
        for j in range(4):
            cosine = reference.cosine(encoding.features[i], encoding.features[2 + j])
            assert scores[i, j].item() == pytest.approx(cosine.item(), abs=1e-12)
    with pytest.raises(TypeError, match="a Similarity gives no logits: pair_scores"):
        same_identity_logits(MODEL, encoding, encoding)
    with pytest.raises(ValueError, match="a Similarity has no indicator"):
        indicator_flips(MODEL, encoding, encoding)


def test_fused_distances_and_the_search_are_by_similarity():
    maps = random_maps(12)
    encoding = encode(pooled, maps)
    query, gallery = encoding[:3], encoding[3:]
    fused = fused_distmats(MODEL, query, gallery, options=RankingOptions(attention_weight=0.7))
    unit = torch.nn.functional.normalize(encoding.features)
    attention = reference.similarity_distmat(pooled, maps[:3], maps[3:], 0.2, True)
    expected = torch.cdist(unit[:3], unit[3:]) + 0.7 * torch.from_numpy(attention)
    torch.testing.assert_close(fused.fused, expected, rtol=0, atol=1e-9)
    for memory in (None, 3000):
        compute = Compute(max_memory=memory)
        found = rank_gallery(MODEL, query, gallery, topk=4, attention_weight=0.7, compute=compute)
        assert found.evidence is Evidence.SIMILARITY
        nearest = expected.sort(1)
        torch.testing.assert_close(found.distances, nearest.values[:, :4], rtol=0, atol=1e-9)
        assert torch.equal(found.indices, nearest.indices[:, :4])


@pytest.mark.parametrize("evidence", [None, Similarity()])
def test_an_index_is_for_one_evidence(tmp_path, evidence):
    net = TinyBackbone().eval()
    both = [
        CASN(net, forward=tiny_forward, input_size=SIZE, pair_classifier=each)
        for each in (evidence, Similarity() if evidence is None else None)
    ]
    imgs = torch.rand(5, 3, 64, 32)
    index = GalleryIndex.create(tmp_path, both[0])
    index.add(both[0].encode(imgs))
    found = index.search(both[0], imgs[:2] + 0.1, topk=3)
    name = "UNTRAINED" if evidence is None else "SIMILARITY"
    assert found.ranking.evidence is Evidence[name]
    maps = pair_attention(
        both[0], both[0].encode(imgs[:1] + 0.1), both[0].encode(imgs)[found.ranking.indices[0, :1]]
    )
    torch.testing.assert_close(found.query_attention[0, 0], maps[0][0])
    bare = torch.nn.AdaptiveAvgPool1d(2)
    both.append(CASN(net, forward=tiny_forward, input_size=SIZE, pair_classifier=bare))
    for other in both[1:]:  # the last one has no weights, as a Similarity has none
        with pytest.raises(ValueError, match="other weights, other evidence"):
            index.search(other, imgs)
