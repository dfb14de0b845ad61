"""The gallery on disk: searched as lists in memory are, whole after any interruption."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from indexes import (
    MODEL,
    MODELS,
    Images,
    assert_same,
    assert_tidy,
    entries,
    files,
    snapshot,
    three_shards,
    tiny,
)
from starting import finish_two, start
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from casn_plugin import CASN, Encoding, GalleryIndex, attention_distmat, rank_gallery
from casn_plugin.loading import encode_images
from casn_plugin.ranking import pair_attention, pair_scores, shards
from casn_plugin.ranking.manifest import Manifest


@pytest.fixture
def index(tmp_path) -> GalleryIndex:
    return three_shards(tmp_path / "index")


def test_extend_takes_any_loader_and_fills_shards(tmp_path):
    data = Images(11)
    expected = MODEL.encode(data.imgs)
    for name, loader, shard_size, sizes in (
        ("even", DataLoader(data, 2), 4, [4, 4, 3]),
        ("odd", DataLoader(data, 3), 4, [6, 5]),
        ("large", DataLoader(data, 8), 4, [8, 3]),
        ("sampler", DataLoader(data, batch_sampler=[[0, 1, 2], range(3, 11)]), 3, [3, 8]),
    ):
        index = GalleryIndex.create(tmp_path / name, MODEL)
        index.extend(MODEL, loader, shard_size=shard_size)
        assert [entry.rows for entry in entries(index)] == sizes
        assert index.names == [f"img{i}.jpg" for i in range(11)]
        assert index.pids.tolist() == [i // 2 for i in range(11)]
        assert index.camids.tolist() == [i % 2 for i in range(11)]
        torch.testing.assert_close(index[:].maps, expected.maps)
        assert_tidy(index)
    index.extend(MODEL, DataLoader(Images(2, labels=False), 1))
    index.extend(MODEL, DataLoader(Images(2, labels=False), 1), progress=True)
    assert index.names[11:] == ["11", "12", "13", "14"] and index.pids[11:].tolist() == [-1] * 4


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("kind", MODELS)
def test_search_equals_ranking_in_memory(tmp_path, kind, dtype):
    model = MODELS[kind]()
    data = Images(9)
    index = GalleryIndex.create(tmp_path, model, dtype=dtype)
    index.extend(model, DataLoader(data, 2), shard_size=4)
    index.remove([0, 5])
    kept = [1, 2, 3, 4, 6, 7, 8]
    gallery = model.encode(data.imgs)[torch.tensor(kept)]
    if dtype is not None:
        gallery = Encoding(gallery.features, **{kind: gallery.maps.to(dtype)})
    assert getattr(index[:], kind) is not None
    imgs = torch.rand(2, 3, 48, 24)
    for topk in (3, 100):
        query = model.encode(imgs)
        expected = rank_gallery(model, query, gallery, topk=topk, attention_weight=1.0)
        columns = min(topk, len(kept))
        for each in (imgs, query):
            found = index.search(model, each, topk=topk, attention_weight=1.0)
            rows = found.ranking.indices
            assert rows.shape == (2, columns) and torch.equal(rows, expected.indices)
            torch.testing.assert_close(found.ranking.distances, expected.distances)
            for i in range(2):
                first, second = pair_attention(
                    model, query[torch.tensor([i] * columns)], gallery[rows[i]]
                )
                assert first.max() > 0 and second.max() > 0
                torch.testing.assert_close(found.query_attention[i], first)
                torch.testing.assert_close(found.gallery_attention[i], second)
                numbers = [kept[row] for row in rows[i]]
                assert found.names[i] == [f"img{number}.jpg" for number in numbers]
                assert found.pids[i].tolist() == [number // 2 for number in numbers]
                assert found.camids[i].tolist() == [number % 2 for number in numbers]
    torch.testing.assert_close(
        attention_distmat(model, query, index), attention_distmat(model, query, gallery)
    )


def test_search_says_who_passes_or_nobody(tmp_path):
    index = GalleryIndex.create(tmp_path / "index", MODEL)
    index.add(MODEL.encode(torch.rand(6, 3, 48, 24)), names=list("abcdef"))
    found = index.search(MODEL, torch.rand(2, 3, 48, 24), topk=4)
    nearest = float(found.ranking.distances[:, 0].min())
    assert found.matches(nearest / 2) == [[], []]
    first = int(found.ranking.distances[:, 0].argmin())
    some = found.matches(float(found.ranking.distances[first, 1]))
    assert some[first] == found.names[first][:2] and len(some[1 - first]) <= 4


def test_search_of_nothing(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL)
    imgs = torch.rand(1, 3, 48, 24)
    with pytest.raises(ValueError, match="gallery is empty"):
        index.search(MODEL, imgs)
    index.extend(MODEL, DataLoader(Images(3), 3))
    found = index.search(MODEL, MODEL.encode(imgs)[:0], topk=2)
    assert found.names == [] and found.gallery_attention.shape == (0, 2, 6, 3)
    index.remove(range(3))
    with pytest.raises(ValueError, match="gallery is empty"):
        index.search(MODEL, imgs)


CHANGES = {
    "add": lambda index: index.add(index[:2]),
    "extend": lambda index: index.extend(MODEL, DataLoader(Images(6, False), 1), shard_size=2),
    "remove": lambda index: index.remove([0, 1, 2]),
}
STEPS = {
    "save_file": (shards, "save_file"),
    "os.replace": (os, "replace"),
    "os.fsync": (os, "fsync"),
    "encode": (CASN, "encode"),
    "Manifest.write": (Manifest, "write"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_failure_changes_nothing(tmp_path, monkeypatch, change, step):
    """Fails at the first call of a function, at the second and so on, until there are no more."""
    index = GalleryIndex.create(tmp_path, MODEL)
    index.extend(MODEL, DataLoader(Images(4), 2), shard_size=2)
    owner, name = STEPS[step]
    genuine, before = getattr(owner, name), snapshot(tmp_path)
    number = expected_calls(change, step)
    for fatal in [*range(number), 99]:
        calls = []

        def fail(*arguments, fatal=fatal, calls=calls, **options):
            calls.append(name)
            if len(calls) <= fatal:
                return genuine(*arguments, **options)
            if step == "save_file":
                Path(arguments[1]).write_bytes(b"half")
            raise OSError("no space left")

        index = GalleryIndex(tmp_path)
        assert snapshot(tmp_path) == before
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            if fatal < number:
                with pytest.raises(OSError, match="no space left"):
                    CHANGES[change](index)
                assert (index.names, index.pids.tolist()) == before[:2] and len(index) == 4
            else:
                CHANGES[change](index)
    assert snapshot(tmp_path) != before
    assert len(calls) == number + (step == "os.fsync")


def expected_calls(change, step):
    number = {"add": 1, "extend": 3, "remove": 0}[change]
    return {
        "save_file": number,
        "os.replace": 2 * number + 1,  # aside, and from there to its place
        "os.fsync": 4 * number + 1,  # the one after the manifest has been moved is too late
        "encode": 6 if change == "extend" else 0,
        "Manifest.write": 1,
    }[step]


def test_a_killed_process_leaves_the_old_index(tmp_path):
    killed = start("extend_and_die", tmp_path)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, errors
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "notes.tmp").write_bytes(b"mine")
    index = GalleryIndex(tmp_path)
    assert index.names == ["0", "1", "2"]
    left = files(tmp_path) - {"index.json", entries(index)[0].file}
    assert len(left) == 3  # what was written aside, and what is not the index's own
    (aside,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert len(files(aside) - {"lock"}) == 2  # a whole shard, and one that was not moved
    (tmp_path / ".tmpXy12aB").write_bytes(b"half")  # as versions before 0.2 left
    index.remove([1])
    assert files(tmp_path) == {
        "index.json", entries(index)[0].file, "model.safetensors", "notes.tmp"
    }  # fmt: skip


def test_create(index, tmp_path):
    with pytest.raises(FileExistsError, match="open it with GalleryIndex"):
        GalleryIndex.create(index.folder, MODEL)
    for dtype in (torch.int16, torch.uint8, torch.float8_e5m2, torch.bool):
        with pytest.raises(TypeError, match=f"must be a float dtype or torch.int8, got {dtype}"):
            GalleryIndex.create(tmp_path / "new", MODEL, dtype=dtype)
    with pytest.raises(ValueError, match="maps=False keeps none, got torch.float16"):
        GalleryIndex.create(tmp_path / "new", MODEL, dtype=torch.float16, maps=False)
    assert not (tmp_path / "new").exists()
    deep = GalleryIndex.create(tmp_path / "a" / "b", MODEL)
    assert len(deep) == 0 and deep.names == [] and deep.pids.shape == deep.camids.shape == (0,)


def test_another_model_is_refused(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL)
    index.extend(nn.DataParallel(MODEL).module, DataLoader(Images(2), 2))
    other = tiny(1)
    same = tiny(0)
    same.pair_classifier[0].weight.data[0, 0] += 1e-6
    for model in (other, same):
        with pytest.raises(ValueError, match="created for a model with other weights"):
            index.search(model, torch.rand(1, 3, 48, 24))
        with pytest.raises(ValueError, match="created for a model with other weights"):
            index.extend(model, DataLoader(Images(2), 2))
    assert index.search(tiny(0), torch.rand(1, 3, 48, 24)).names
    flipping = tiny(0)
    flipping.flip = True
    with pytest.raises(ValueError, match="or another `flip`"):
        index.search(flipping, torch.rand(1, 3, 48, 24))
    assert_tidy(index)


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.rand(3, 48, 24)


def test_loaders_that_will_not_do(tmp_path, unchecked):
    index = GalleryIndex.create(tmp_path, MODEL)
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        index.extend(MODEL, DataLoader(Images(2)), shard_size=0)
    with pytest.raises(ValueError, match="needs torch.distributed.init_process_group"):
        index.extend(MODEL, DataLoader(Images(2)), distributed=True)
    for other in ("text", [torch.rand(4, 3, 48, 24)], None):
        with pytest.raises(TypeError, match="loader must be a DataLoader, got"):
            index.extend(MODEL, other)
    with pytest.raises(TypeError, match="model must be a Module, got str"):
        index.search("model", torch.rand(1, 3, 48, 24))
    with pytest.raises(TypeError, match="encoding must be a Encoding, got Tensor"):
        index.add(torch.rand(4, 6))
    for data in ([{"image": 1}], ["abc"], [torch.rand(4)], [torch.rand(3, 48, 24)]):
        loader = DataLoader(data, batch_size=None)
        with pytest.raises(TypeError, match="must give batches of images"):
            index.extend(MODEL, loader)
    index.extend(MODEL, DataLoader([(torch.rand(3, 48, 24), 4)]))
    index.extend(MODEL, DataLoader(Endless(), 1))
    assert index.names == ["0", "1"]


def test_two_processes_make_the_index_of_one(tmp_path):
    assert finish_two("extend_together", tmp_path) == ["done 41\n", "done 41\n"]
    for name in ("joint", "single0"):
        assert_tidy(GalleryIndex(tmp_path / name))
    assert_same(GalleryIndex(tmp_path / "joint")[:], GalleryIndex(tmp_path / "single0")[:])


@pytest.mark.parametrize("kind", MODELS)
def test_a_search_among_candidates_has_maps_and_scores_of_these_alone(kind, tmp_path):
    model = MODELS[kind]()
    index = GalleryIndex.create(tmp_path / "index", model)
    images = encode_images(model, torch.rand(9, 3, 48, 24))
    for part in (slice(0, 5), slice(5, 9)):
        index.add(images[part], names=[*"abcdefghi"][part], pids=[7] * len(images[part]))
    query = encode_images(model, torch.rand(2, 3, 48, 24))
    found = index.search(model, query, topk=3, candidates=np.array([[8, 1, 5, 0], [-1, 6, -1, -1]]))
    assert found.ranking.indices[1].tolist() == [6, -1, -1] and found.names[1] == ["g"]
    assert len(found.names[0]) == 3 and set(found.names[0]) < set("ibfa")
    assert found.pids.tolist() == [[7, 7, 7], [7, -1, -1]] and (found.camids == -1).all()
    assert found.matches(1e9) == found.names and found.matches(0.0) == [[], []]
    whole = index.search(model, query, topk=9)
    for i in range(2):
        for place, row in enumerate(found.ranking.indices[i].tolist()):
            if row < 0:
                assert found.scores[i, place].isnan() and not found.query_attention[i, place].any()
                continue
            other = whole.ranking.indices[i].tolist().index(row)
            for name in ("query_attention", "gallery_attention", "scores"):
                own, its = (getattr(each, name)[i] for each in (found, whole))
                torch.testing.assert_close(own[place], its[other])
            expected = pair_scores(model, query[i : i + 1], images[row : row + 1])[0, 0]
            torch.testing.assert_close(found.scores[i, place], expected)
    torch.testing.assert_close(found.probabilities, found.scores.sigmoid(), equal_nan=True)
    assert index.manifest == Manifest.read(index.folder)
