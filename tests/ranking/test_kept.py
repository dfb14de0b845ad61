"""How an index keeps images: exact, rounded, in 8 bits, or features alone."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import KINDS, MODEL, MODELS, SIZE, Images, encoding, entries, parts_of
from torch.utils.data import DataLoader

from casn_plugin import Encoding, GalleryIndex, attention_distmat, rank_gallery
from casn_plugin.ranking.kept import Kept
from casn_plugin.ranking.manifest import Manifest

EIGHT_BITS = Manifest(model="0" * 64, dtype="int8")


def rounded(maps: torch.Tensor) -> np.ndarray:
    """Returns maps in 8 bits with a scale a channel, by hand, in float64."""
    found = np.zeros(tuple(maps.shape))
    for image, its in enumerate(maps.double().numpy()):
        for channel, values in enumerate(its):
            greatest = np.abs(values).max()
            if greatest:
                scale = np.float64(np.float32(greatest / 127))
                found[image, channel] = np.clip(np.rint(values / scale), -127, 127) * scale
    return found


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([*KINDS]),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    power=st.integers(-30, 30),
    signed=st.booleans(),
)
def test_maps_in_8_bits_are_those_of_a_plain_loop(kind, seed, dtype, power, signed):
    images = encoding(kind, 3, seed, dtype=torch.float64)
    maps = (images.maps - (0.5 if signed else 0)) * 2.0**power
    maps[0, 1] = 0
    maps = maps.to(dtype)
    if not maps.isfinite().all():
        return
    features = images.features.to(torch.promote_types(dtype, torch.float32))
    kept = Kept.of(Encoding(features, **{kind: maps}), EIGHT_BITS)
    assert kept.maps.dtype == torch.int8 and kept.scales.dtype == torch.float32
    assert kept.maps.nbytes == maps.numel()
    found = kept.encoding(slice(None))
    assert found.features.dtype == found.maps.dtype == features.dtype  # read back as features are
    assert found.maps.is_contiguous()
    greatest = maps.double().abs().amax((2, 3), keepdim=True)
    # a value half-way between two steps may be rounded to either
    assert (found.maps.double() - torch.from_numpy(rounded(maps))).abs().le(greatest / 126).all()
    assert (found.maps.double() - maps.double()).abs().le(greatest / 253 + 1e-44).all()
    assert torch.equal(found.maps[0, 1], torch.zeros(SIZE, dtype=features.dtype))


def test_what_8_bits_keep_exactly():
    maps = torch.tensor([[[[0.0, -0.0], [127.0, -127.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    found = Kept.of(Encoding(torch.rand(1, 2), basis=maps), EIGHT_BITS).encoding(slice(None))
    assert torch.equal(found.maps, maps)  # zero is zero, also of a map of nothing else


@pytest.mark.parametrize(
    ("name", "dtype", "whole", "lost"),
    [
        ("float16", torch.float32, 1e-4, 1e-6), ("float16", torch.float32, 1e-4, 1e-9),
        ("bfloat16", torch.float32, 1e-37, 1e-44), ("float32", torch.float64, 1e-37, 1e-42),
        ("int8", torch.float32, 1e-35, 1e-45), ("int8", torch.float64, 1e-35, 1e-60),
    ],
)  # fmt: skip
def test_maps_that_would_lose_their_digits_are_refused(name, dtype, whole, lost):
    """Of one image, too: the maps of others say nothing of it. What is exact is kept."""
    manifest, images = Manifest(model="0" * 64, dtype=name), encoding("basis", 3, dtype=dtype)
    images.maps.div_(images.maps.amax((1, 2, 3), keepdim=True))
    images.maps[0], images.maps[1] = images.maps[0] * whole, 0.0
    read = Kept.of(images, manifest).encoding(slice(None)).maps
    assert (read[0] - images.maps[0]).abs().max() < whole / 100 and not read[1].any()
    images.maps[1] = images.maps[2] * -lost
    message = f"maps that torch.{name} can hold to its digits, got values up to .* in 1 of 3"
    with pytest.raises(ValueError, match=f"{message}.*: an index of dtype=None keeps maps as"):
        Kept.of(images, manifest)
    assert torch.equal(Kept.of(images, Manifest(model="0" * 64, dtype=None)).maps, images.maps)


def test_small_maps_that_are_exact_are_kept():
    maps = torch.tensor([2.0**-24, 2.0**-23]).half().view(1, 1, 2, 1)
    for dtype in ("float16", "float32", "int8"):
        kept = Kept.of(Encoding(torch.rand(1, 1), basis=maps), Manifest("0" * 64, dtype))
        torch.testing.assert_close(kept.encoding(slice(None)).maps.half(), maps, atol=0, rtol=0)


def test_maps_in_8_bits_are_read_in_the_dtype_of_features():
    for scale in (1e-6, 1e6):
        images = Encoding(torch.rand(1, 2).half(), basis=torch.rand(1, 2, 2, 2) * scale)
        with pytest.raises(ValueError, match=r"torch.int8 can hold to its digits, got .*e.0\d in"):
            Kept.of(images, EIGHT_BITS)


def test_what_8_bits_can_not_hold():
    huge = Encoding(torch.rand(1, 2).double(), basis=torch.rand(1, 2, 2, 2).double() * 1e300)
    with pytest.raises(
        ValueError, match=r"maps that torch.int8 can hold, got values up to .*e\+\d"
    ):
        Kept.of(huge, EIGHT_BITS)
    for value in (torch.nan, torch.inf):
        for what in ("features", "maps"):
            images = encoding("basis", 2)
            getattr(images, what).view(-1)[3] = value
            for manifest in (EIGHT_BITS, Manifest(model="0" * 64, dtype=None)):
                with pytest.raises(ValueError, match=f"{what} must be finite, but 1 of "):
                    Kept.of(images, manifest)


@pytest.mark.parametrize("kind", MODELS)
def test_an_index_in_8_bits_ranks_nearly_as_its_maps_do(tmp_path, kind):
    model, data = MODELS[kind](), Images(12)
    index = GalleryIndex.create(tmp_path, model, dtype=torch.int8)
    index.extend(model, DataLoader(data, 5), shard_size=4)
    whole = model.encode(data.imgs)
    assert torch.equal(index.features_of(slice(None)), whole.features)
    assert 0 < (index[:].maps - whole.maps).abs().max() <= whole.maps.abs().max() / 250
    query = model.encode(torch.rand(4, 3, 48, 24))
    exact = attention_distmat(model, query, whole)
    off = (attention_distmat(model, query, index) - exact).abs()
    assert off.max() > 0 and off.median() < 0.01 * exact.max()  # more where a span moves by a row
    found = index.search(model, query, topk=3, attention_weight=1.0)
    kept = index[:]
    expected = rank_gallery(model, query, kept, topk=3, attention_weight=1.0)
    assert torch.equal(found.ranking.indices, expected.indices)


def test_reading_what_was_read_from_8_bits_changes_nothing(tmp_path):
    index = GalleryIndex.create(tmp_path / "one", MODEL, dtype=torch.int8)
    index.add(encoding("basis", 5))
    other = GalleryIndex.create(tmp_path / "two", MODEL, dtype=torch.int8)
    other.add(index[:])
    torch.testing.assert_close(other[:].maps, index[:].maps, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("keeping", "share"),
    [({}, 1), ({"dtype": torch.float16}, 1 / 2), ({"dtype": torch.int8}, 1 / 4)],
)
def test_sizes_on_disk(tmp_path, keeping, share):
    images = Encoding(torch.rand(2, 256), basis=torch.randn(2, 256, 16, 8))
    index = GalleryIndex.create(tmp_path, MODEL, **keeping)
    index.add(images)
    size = (tmp_path / entries(index)[0].file).stat().st_size
    scales = images.features.nbytes if share == 1 / 4 else 0
    assert abs(size - images.features.nbytes - images.maps.nbytes * share - scales) < 1200


def test_an_index_of_features_alone(tmp_path):
    data = Images(9)
    index = GalleryIndex.create(tmp_path / "index", MODEL, maps=False)
    with pytest.raises(ValueError, match="is empty"):
        index.features_of(slice(None))
    index.extend(MODEL, DataLoader(data, 2), shard_size=4)
    index.add(MODEL.encode(torch.rand(2, 3, 48, 24)), names=["a", "b"], pids=[5, 6])
    index.remove([1])
    index = GalleryIndex(index.folder)
    expected = MODEL.encode(data.imgs).features
    kept = [0, *range(2, 9)]
    torch.testing.assert_close(index.features_of(range(8)), expected[kept])
    torch.testing.assert_close(index.features_of([3, 0]), expected[[4, 0]])
    assert index.features_of([]).shape == (0, 6)
    assert index.names[-3:] == ["img8.jpg", "a", "b"] and index.pids[-2:].tolist() == [5, 6]
    sizes = sum(entry.rows for entry in entries(index)) * 6 * 4
    on_disk = sum((index.folder / entry.file).stat().st_size for entry in entries(index))
    assert sizes < on_disk < sizes + 4 * 1500
    remedy = "keeps no maps, its features alone .features_of.: EncodedAgain.model, index, pictures."
    imgs = torch.rand(1, 3, 48, 24)
    for function in (
        lambda: index[:],
        lambda: index[[]],
        lambda: index.search(MODEL, imgs),
        lambda: rank_gallery(MODEL, MODEL.encode(imgs), index),
        lambda: attention_distmat(MODEL, MODEL.encode(imgs), index),
    ):
        with pytest.raises(ValueError, match=remedy):
            function()
    index.verify()
    wider = Encoding(torch.rand(1, 8), basis=torch.rand(1, 8, 6, 3))
    other = Encoding(torch.rand(1, 6), activations=torch.rand(1, 3, 6, 3))
    for images in (wider, other):
        with pytest.raises(ValueError, match="expected images of one model and one size"):
            index.add(images)


@pytest.mark.parametrize("keeping", [{}, {"dtype": torch.int8}, {"maps": False}])
def test_checksums_are_sha256_of_an_images_own_bytes(tmp_path, keeping):
    index = GalleryIndex.create(tmp_path, MODEL, **keeping)
    index.add(encoding("basis", 3))
    (entry,) = entries(index)
    _, tensors = parts_of(tmp_path / entry.file)

    def own(name, row):
        data = tensors.get(name, b"")
        return data[row * len(data) // 3 : (row + 1) * len(data) // 3]

    for row in range(3):
        digest = hashlib.sha256(own("features", row)).digest()
        assert own("features_sha256", row) == digest
        if "maps" in tensors:
            digest = hashlib.sha256(own("maps", row) + own("scales", row)).digest()
            assert own("maps_sha256", row) == digest
    assert entry.file == f"{entry.sha256[:24]}.safetensors"
