"""Pairs in pieces of bounded size: equal for any size, any gallery and any number of processes."""

import itertools
from functools import partial

import pytest
import torch
from small_heads import CHANNELS, HEADS, PARTS, Blocks, Model, encode, parts, pooled
from starting import finish_two, start
from torch import nn

from casn_plugin import Compute, Encoding, PairClassifier, attention_distmat, rank_gallery
from casn_plugin.ranking import indicator_flips, pair_attention, same_identity_logits


@pytest.mark.parametrize("name", ["pooled", "parts"])
@pytest.mark.parametrize("max_memory", [1, 20_000, 10**9])
def test_tiles_of_any_size_give_the_same(name, max_memory):
    head, _ = HEADS[name]
    encoding = encode(head, torch.rand(11, CHANNELS, 7, 3, dtype=torch.float64))
    model = Model(PairClassifier(encoding.features.shape[1], 16).double())
    whole = attention_distmat(model, encoding[:4], encoding[4:])
    tiled = attention_distmat(
        model, encoding[:4], encoding[4:], compute=Compute(max_memory=max_memory)
    )
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)
    whole = same_identity_logits(model, encoding[:4], encoding[4:])
    tiled = same_identity_logits(
        model, encoding[:4], encoding[4:], compute=Compute(max_memory=max_memory)
    )
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["pooled", "parts"])
@pytest.mark.parametrize("max_memory", [1, 30_000, 10**9])
def test_a_gallery_read_in_blocks_gives_the_same(name, max_memory):
    encoding = encode(HEADS[name][0], torch.rand(15, CHANNELS, 7, 3, dtype=torch.float64))
    model = Model(PairClassifier(encoding.features.shape[1], 16).double())
    query, gallery = encoding[:4], Blocks(encoding[4:])
    for function in (attention_distmat, same_identity_logits):
        whole = function(model, query, encoding[4:])
        read = function(model, query, gallery, compute=Compute(max_memory=max_memory))
        torch.testing.assert_close(read, whole, rtol=0, atol=1e-12)
    whole = rank_gallery(model, query, encoding[4:], topk=5)
    read = rank_gallery(model, query, gallery, topk=5, compute=Compute(max_memory=max_memory))
    assert torch.equal(read.indices, whole.indices)
    torch.testing.assert_close(read.distances, whole.distances, rtol=0, atol=1e-12)


def test_a_gallery_is_read_once_where_the_queries_fit():
    encoding = encode(pooled, torch.rand(40, CHANNELS, 7, 3))
    model, gallery = Model(PairClassifier(CHANNELS, 16)), Blocks(encoding)
    attention_distmat(model, encoding[:4], gallery, compute=Compute(max_memory=100_000))
    assert gallery.read <= len(encoding) + 2  # twice one image, to see its size
    gallery.read = 0
    attention_distmat(model, encoding, gallery, compute=Compute(max_memory=20_000))
    assert gallery.read > 2 * len(encoding)
    gallery.read = 0  # a search reads no maps of blocks where the bound leaves nothing
    far = encoding.features.norm(dim=1).argsort()
    ordered = Encoding(encoding.features[far] ** 8, basis=encoding.maps[far])
    gallery = Blocks(ordered)
    rank_gallery(
        model,
        ordered[:1],
        gallery,
        topk=1,
        attention_weight=1e-6,
        compute=Compute(max_memory=100_000),
    )
    assert gallery.read < len(encoding) / 2


def test_the_pair_classifier_ranks_in_eval_mode_and_is_left_as_found():
    layers = nn.Linear(CHANNELS, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 2)
    model = Model(nn.Sequential(*layers).double().train())
    encoding = encode(pooled, torch.rand(6, CHANNELS, 7, 3, dtype=torch.float64))
    whole = attention_distmat(model, encoding[:2], encoding)
    tiled = attention_distmat(model, encoding[:2], encoding, compute=Compute(max_memory=1))
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-12)
    pair_attention(model, encoding, encoding)
    same_identity_logits(model, encoding, encoding)
    assert model.pair_classifier.training and layers[1].running_mean.abs().max() == 0


def test_tiles_keep_to_their_memory():
    from torch.profiler import ProfilerActivity, profile

    number = 80
    encoding = encode(parts, torch.rand(number, 32, 12, 4))
    halves = Encoding(encoding.features, activations=encoding.maps.half())  # to be converted
    model = Model(PairClassifier(32 * PARTS, 64))
    max_memory = 2**20
    compute, rounding = Compute(max_memory), Compute(max_memory, torch.float16)
    functions = (
        partial(indicator_flips, compute=compute),
        partial(attention_distmat, compute=compute),
        partial(attention_distmat, shortlist=40, compute=compute),
        partial(attention_distmat, compute=rounding),
        partial(rank_gallery, compute=compute),
    )
    galleries = (halves, Blocks(halves)), (encoding, encoding)
    for function, images in itertools.product(functions, galleries):
        held, total = [], 0
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function(model, *images)
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                held.append(total)
        assert max_memory / 20 < max(held) - 4 * number**2 < 1.2 * max_memory


def test_two_processes_rank_as_one_does_bit_for_bit(tmp_path):
    alone = start("rank_together", tmp_path)
    _, errors = alone.communicate(timeout=120)
    assert alone.returncode == 0, errors
    finish_two("rank_together", tmp_path)
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt") for name in ("alone", "process0", "process1")
    )
    assert len(one) == len(first) == len(second) == 14
    for expected, *both in zip(one, first, second, strict=True):
        for each in both:
            assert each == expected if isinstance(each, int) else torch.equal(each, expected)


def test_memory_without_end():
    encoding = encode(pooled, torch.rand(4, CHANNELS, 7, 3))
    model = Model(PairClassifier(CHANNELS, 16))
    compute = Compute(max_memory=2**60)
    assert attention_distmat(model, encoding, encoding, compute=compute).shape == (4, 4)
    near = attention_distmat(model, encoding, encoding, shortlist=2, compute=compute)
    assert near.shape == (4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["pooled", "parts"])
def test_cuda_ranks_as_the_cpu_does(name, precision):
    encoding = encode(HEADS[name][0], torch.rand(20, CHANNELS, 7, 3))
    model = Model(PairClassifier(encoding.features.shape[1], 64))
    options = {"compute": Compute(precision=precision), "unit": True}
    here = attention_distmat(model, encoding[:6], encoding, **options)
    found = rank_gallery(model, encoding[:6], encoding, topk=4)
    model.cuda()
    for gallery in (encoding, encoding.to("cuda"), Blocks(encoding)):
        there = attention_distmat(model, encoding[:6], gallery, **options)
        assert there.device.type == "cpu"
        assert (there - here).abs().median() < (1e-5 if precision is None else 1e-2)
        near = attention_distmat(model, encoding[:6], gallery, shortlist=5, **options)
        assert near.device.type == "cpu" and (near < 2**0.5).sum() <= 30
        again = rank_gallery(model, encoding[:6], gallery, topk=4)
        torch.testing.assert_close(again.distances, found.distances, rtol=0, atol=1e-3)
