"""Pictures encoded again where maps are needed: what an index with maps gives, or an error."""

import time
from concurrent.futures import ThreadPoolExecutor

import PIL.Image
import pytest
import torch
from indexes import MODEL, MODELS, assert_same, tiny
from torch.utils.data import DataLoader, Dataset

from casn_plugin import (
    CASN,
    Compute,
    EncodedAgain,
    Encoding,
    GalleryIndex,
    Preprocessing,
    attention_distmat,
    feature_table,
    rank_gallery,
)
from casn_plugin.encoding import Encodings
from casn_plugin.loading import encode_images
from casn_plugin.ranking import again as room
from casn_plugin.ranking import pair_attention
from casn_plugin.ranking.mutual import Together

SIZE = (48, 24)


class Pictures(Dataset):
    """Picture files, as torchreid's data sets give them."""

    def __init__(self, folder, n):
        self.paths = [str(folder / f"{number}.png") for number in range(n)]
        for number, path in enumerate(self.paths):
            pixels = torch.rand(60, 30, 3, generator=torch.Generator().manual_seed(number))
            PIL.Image.fromarray((pixels * 255).byte().numpy()).save(path)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        img = Preprocessing(SIZE).load(self.paths[row])
        return {"img": img, "impath": self.paths[row], "pid": row // 2, "camid": row % 2}


@pytest.fixture
def pictures(tmp_path) -> Pictures:
    return Pictures(tmp_path, 9)


@pytest.fixture
def index(tmp_path, pictures) -> GalleryIndex:
    """Features alone of seven of nine pictures."""
    index = GalleryIndex.create(tmp_path / "index", MODEL, maps=False)
    index.extend(MODEL, DataLoader(pictures, 4), shard_size=4)
    index.remove([0, 5])
    return index


@pytest.fixture
def calls(monkeypatch):
    """How many images were encoded each time."""
    sizes, genuine = [], CASN.encode
    monkeypatch.setattr(CASN, "encode", lambda s, imgs: sizes.append(len(imgs)) or genuine(s, imgs))
    return sizes


KEPT = [1, 2, 3, 4, 6, 7, 8]


@pytest.mark.parametrize("kind", MODELS)
def test_it_ranks_as_an_index_with_maps_does(tmp_path, pictures, kind):
    model = MODELS[kind]()
    every = {}
    for name, maps in (("maps", True), ("features", False)):
        every[name] = GalleryIndex.create(tmp_path / name, model, maps=maps)
        every[name].extend(model, DataLoader(pictures, 4), shard_size=4)
        every[name].remove([0, 5])
    whole, features = every["maps"], every["features"]
    query = model.encode(torch.rand(3, 3, *SIZE))
    small = Compute(max_memory=20_000)
    for again in (
        EncodedAgain(model, features),
        EncodedAgain(model, features, features.names, batch_size=2, max_memory=1),
        EncodedAgain(model, whole[:], [pictures[row]["img"] for row in KEPT]),
        EncodedAgain(model, whole[:].features, [PIL.Image.open(name) for name in whole.names]),
    ):
        assert isinstance(again, Encodings) and len(again) == 7
        for rows in (
            slice(None),
            slice(2, 6),
            [3, 3, 0],
            torch.tensor([6, 1]),
            [],
            slice(5, 1, -2),
        ):
            found, expected = (
                again[rows],
                whole[range(7)[rows] if isinstance(rows, slice) else rows],
            )
            assert torch.equal(found.features, expected.features)
            assert torch.equal(again.features_of(rows), expected.features)
            assert (found.basis is None) == (expected.basis is None)
            torch.testing.assert_close(found.maps, expected.maps)
            assert found.maps.is_contiguous()
        for options in ({}, {"exact": False}, {"compute": small}):
            found = rank_gallery(model, query, again, topk=3, attention_weight=1.0, **options)
            expected = rank_gallery(model, query, whole, topk=3, attention_weight=1.0, **options)
            assert torch.equal(found.indices, expected.indices)
            torch.testing.assert_close(found.distances, expected.distances)
        for shortlist in (None, 3):
            torch.testing.assert_close(
                attention_distmat(model, query, again, shortlist=shortlist, compute=small),
                attention_distmat(model, query, whole, shortlist=shortlist, compute=small),
            )
        maps = pair_attention(model, query[:2], again[[4, 2]])
        torch.testing.assert_close(maps, pair_attention(model, query[:2], whole[[4, 2]]))
        table = feature_table(again).rows()
        assert [row["features"] for row in table] == whole[:].features.tolist()
    found = features.search(model, query, topk=4, maps=EncodedAgain(model, features))
    expected = whole.search(model, query, topk=4)
    assert found.names == expected.names and found.pids.tolist() == expected.pids.tolist()
    torch.testing.assert_close(found.query_attention, expected.query_attention)
    torch.testing.assert_close(found.gallery_attention, expected.gallery_attention)
    assert found.gallery_attention.max() > 0


def test_few_pictures_are_encoded_and_in_batches(tmp_path, calls):
    pictures = Pictures(tmp_path, 40)
    index = GalleryIndex.create(tmp_path / "index", MODEL, maps=False)
    index.extend(MODEL, DataLoader(pictures, 40))
    query = MODEL.encode(torch.rand(1, 3, *SIZE))
    again = EncodedAgain(MODEL, index, batch_size=8)
    again[:0]  # the size of a map is that of any picture's
    calls.clear()
    small = Compute(max_memory=30_000)  # many blocks
    ranking = rank_gallery(MODEL, query, again, topk=20, exact=False, compute=small)
    assert sum(calls) in (19, 20) and len(calls) == 3 and max(calls) == 8
    assert again[ranking.indices[0]].maps.shape[0] == 20
    assert sum(calls) in (19, 20)  # held
    rank_gallery(MODEL, query, again, topk=30, exact=False, compute=small)
    assert sum(calls) in (29, 30) and len(calls) <= 5
    tight = EncodedAgain(MODEL, index, batch_size=8, max_memory=1)
    calls.clear()
    again = tight[range(20)]
    assert calls == [8, 8, 4] and len(again) == 20
    tight[[19]]
    assert calls == [8, 8, 4]
    tight[[0]]
    assert calls == [8, 8, 4, 1]
    exact = GalleryIndex.search(index, MODEL, query, topk=2, maps=tight)
    assert exact.names[0] == index.search(MODEL, query, topk=2, maps=tight).names[0]


def test_what_has_changed_is_an_error(tmp_path, pictures, index, monkeypatch):
    again = EncodedAgain(MODEL, index)
    assert len(again[[1]]) == 1
    other = PIL.Image.open(index.names[3]).rotate(180)
    other.save(index.names[2])  # row 2 of the index
    message = f"picture {index.names[2]} gives other features than those that are kept, off by 0"
    with pytest.raises(ValueError, match=message):
        again[[0, 2]]
    with pytest.raises(ValueError, match=message):
        index.search(MODEL, torch.rand(1, 3, *SIZE), topk=7, maps=again)
    assert len(again[[0, 3]]) == 2  # others are as they were
    ahead = EncodedAgain(MODEL, index, batch_size=2)
    ahead.expect(torch.tensor([2]))
    with pytest.raises(ValueError, match=message):
        ahead[[0]]
    assert len(ahead[[0]]) == 1  # what fails once is not tried ahead again
    assert len(EncodedAgain(MODEL, index, tolerance=10.0)[[0, 2]]) == 2
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="preprocessing has chan"):
        patch.setattr(MODEL, "preprocessing", Preprocessing(SIZE, mean=(0.5, 0.5, 0.5)))
        EncodedAgain(MODEL, index)[[0]]
    shifted = [*index.names[1:], index.names[0]]
    with pytest.raises(ValueError, match="gives other features"):
        EncodedAgain(MODEL, index, shifted)[[0]]
    for names, number in ((index.names[1:], 6), ([*index.names, "more"], 8)):
        with pytest.raises(ValueError, match=f"expected 7 pictures, one an image, got {number}"):
            EncodedAgain(MODEL, index, names)[[0]]
    with pytest.raises(ValueError, match="other weights"):
        EncodedAgain(tiny(1), index)
    with pytest.raises(ValueError, match="gives other features"):
        EncodedAgain(tiny(1), index.features_of(slice(None)), index.names)[[0]]
    nan = index.features_of(slice(None)).clone()
    nan[1, 2] = torch.nan
    with pytest.raises(ValueError, match="picture .* gives other features"):
        EncodedAgain(MODEL, nan, index.names)[[1]]
    narrow = EncodedAgain(MODEL, torch.rand(7, 5), index.names)
    with pytest.raises(ValueError, match="the gallery has 5 features, but the model gives 6"):
        narrow[[1]]
    with pytest.raises(ValueError, match="maps must be of the index's 7 images, got 6"):
        index.search(
            MODEL, torch.rand(1, 3, *SIZE), maps=EncodedAgain(MODEL, torch.rand(6, 6), ["a"] * 6)
        )


def test_pictures_that_can_not_be_read(index):
    again = EncodedAgain(MODEL, index)
    with open(index.names[4], "wb") as file:
        file.write(b"no picture")
    with pytest.raises(OSError, match=r"5\.png|6\.png"):
        again[[4]]
    missing = EncodedAgain(MODEL, index, ["nowhere.png"] * 7)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        missing[[0]]
    sizes = [torch.rand(3, *SIZE), torch.rand(3, 64, 32)] + [torch.rand(3, *SIZE)] * 5
    with pytest.raises(ValueError, match=r"must be of one size, got \[\(48, 24\), \(64, 32\)\]"):
        EncodedAgain(MODEL, index, sizes)[:]


@pytest.mark.parametrize("how", ["counted", "through data", "asked for directly"])
def test_held_maps_are_those_of_the_model_as_it_is(pictures, how):
    """Trained on in between: features that hardly differ would pass, maps of before would not."""
    model = tiny(3)
    imgs = torch.stack([pictures[row]["img"] for row in range(4)])
    again = EncodedAgain(model, model.encode(imgs).features, imgs)
    before = again[:].maps
    weight = next(model.parameters())
    with torch.no_grad():
        (weight.data if how == "through data" else weight).mul_(1.001)
    if how != "asked for directly":
        rank_gallery(model, model.encode(imgs[:1] + 0.1), again, topk=4)
    maps = model.encode(imgs).maps
    assert (maps - before).abs().max() > 1e-5 * maps.abs().max()
    torch.testing.assert_close(again[:].maps, maps, rtol=1e-5, atol=1e-8)


def test_held_maps_are_those_of_the_rows_as_they_are(index):
    again = EncodedAgain(MODEL, index)
    maps = again[:].maps.clone()
    index.remove([0, 2])
    torch.testing.assert_close(again[:].maps, maps[[1, 3, 4, 5, 6]])
    assert len(again) == 5


def test_threads_share_one(tmp_path, monkeypatch):
    pictures = Pictures(tmp_path, 20)
    imgs = torch.stack([pictures[row]["img"] for row in range(20)])
    whole = MODEL.encode(imgs)
    again = EncodedAgain(MODEL, whole.features, imgs, batch_size=3, max_memory=1)

    active = []

    def encode_slowly(*given):
        active.append(1)
        time.sleep(0.005)
        assert len(active) == 1
        active.pop()
        return encode_images(*given)

    monkeypatch.setattr(room, "encode_images", encode_slowly)

    def search(seed):
        rows = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:7]
        again.expect(rows)
        torch.testing.assert_close(again[rows].maps, whole.maps[rows])
        return len(again._held)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(search, range(40))) <= 3 + 7


def test_nothing_to_encode(tmp_path, index):
    empty = GalleryIndex.create(tmp_path / "empty", MODEL, maps=False)
    again = EncodedAgain(MODEL, empty)
    with pytest.raises(ValueError, match="gallery is empty"):
        rank_gallery(MODEL, MODEL.encode(torch.rand(1, 3, *SIZE)), again)
    with pytest.raises(ValueError, match="gallery is empty"):
        again[:]


def test_wrong_arguments(index, unchecked):
    features = index.features_of(slice(None))
    for kind, message, given in (
        (TypeError, "model must be a CASN", {"model": torch.nn.Linear(2, 2)}),
        (TypeError, "gallery must be a Encodings or Tensor, got str", {"gallery": "folder"}),
        (ValueError, r"gallery must be of shape \(images, dim\)", {"gallery": torch.rand(3)}),
        (TypeError, "pictures must be given for a gallery that is no", {"gallery": features}),
        (ValueError, "batch_size must be at least 1, got 0", {"batch_size": 0}),
        (ValueError, "tolerance must be >= 0 and finite", {"tolerance": float("nan")}),
        (ValueError, "max_memory must be at least 1", {"max_memory": 0}),
    ):
        with pytest.raises(kind, match=message):
            EncodedAgain(**{"model": MODEL, "gallery": index, **given})
    again = EncodedAgain(MODEL, index)
    for rows in (3, [[1]], None, {1}):
        with pytest.raises(TypeError, match="must be a slice, a list of numbers or a mask"):
            again[rows]
    for rows in ([7], [-8], [True]):
        with pytest.raises(IndexError):
            again[rows]
    with pytest.raises(TypeError, match="maps must be a Encodings, got list"):
        index.search(MODEL, torch.rand(1, 3, *SIZE), maps=[1])


def test_queries_and_gallery_together_take_listed_rows(index):
    images = MODEL.encode(torch.rand(5, 3, *SIZE))
    together = Together(images[:2], EncodedAgain(MODEL, index))
    both = Encoding.cat([images[:2], EncodedAgain(MODEL, index)[:]])
    for rows in ([], [0], [1, 2], [0, 1, 4, 8], [3, 5]):
        rows = torch.tensor(rows, dtype=torch.long)
        together.expect(rows)
        found, expected = together[rows], both[rows]
        torch.testing.assert_close(found.maps, expected.maps)
        assert torch.equal(together.features_of(rows), expected.features)
    rows = torch.tensor([1, 2, 4])
    assert_same(Together(images[:2], images[2:])[rows], images[rows])


def test_images_on_a_model_elsewhere(index):
    """A model in another dtype gives other features, within rounding or not at all."""
    imgs = torch.rand(2, 3, *SIZE)
    features = encode_images(MODEL, imgs).features
    double = tiny().double()
    found = EncodedAgain(double, features, imgs)[:]
    assert found.features.dtype == torch.float32 and torch.equal(found.features, features)
