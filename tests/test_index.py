"""The gallery on disk: equal to lists in memory, whole after any interruption, frank on damage."""

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyBackbone, tiny_forward
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from casn_plugin import CASN, Encoding, rank_gallery
from casn_plugin import index as module
from casn_plugin.encoding import part_embedding
from casn_plugin.index import GalleryIndex
from casn_plugin.ranking import attention_distmat, pair_attention

DIM, SIZE = 4, (3, 2)
KINDS = {"basis": (DIM, DIM), "activations": (2 * DIM, DIM)}


def tiny(seed=0) -> CASN:
    torch.manual_seed(seed)
    return CASN(TinyBackbone(), forward=tiny_forward, input_size=(48, 24), hidden_dim=16).eval()


def parts_forward(backbone, imgs):
    features = part_embedding(backbone(imgs), 3)
    return features, features


def pcb() -> CASN:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3, stride=8), nn.ReLU()))
    return CASN(backbone, forward=parts_forward, input_size=(48, 24), hidden_dim=16).eval()


MODELS = {"basis": tiny, "activations": pcb}
MODEL = tiny()


def encoding(kind, n, seed=0, size=SIZE, dtype=torch.float32) -> Encoding:
    generator = torch.Generator().manual_seed(seed)
    dim, channels = KINDS[kind]
    features = torch.rand(n, dim, generator=generator, dtype=dtype)
    return Encoding(
        features, **{kind: torch.rand(n, channels, *size, generator=generator, dtype=dtype)}
    )


def assert_same(first: Encoding, second: Encoding):
    assert (first.basis is None) == (second.basis is None)
    for one, two in ((first.features, second.features), (first.maps, second.maps)):
        assert one.shape == two.shape and one.dtype == two.dtype
        assert torch.equal(one, two)


def files(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def assert_tidy(index):
    """Nothing lies in the folder but the manifest and the shards that it names."""
    assert files(index.folder) == {"index.json", *(entry["file"] for entry in index._entries)}


class Images(Dataset):
    """Images, in torchreid's dictionaries where they have labels."""

    def __init__(self, n, labels=True, size=(48, 24), fail_at=None):
        generator = torch.Generator().manual_seed(3)
        self.imgs = torch.rand(n, 3, *size, generator=generator)
        self.labels, self.fail_at = labels, fail_at

    def __len__(self):
        return len(self.imgs)

    def __getitem__(self, i):
        if i == self.fail_at:
            raise OSError("a broken image")
        if not self.labels:
            return self.imgs[i]
        return {"img": self.imgs[i], "pid": i // 2, "camid": i % 2, "impath": f"img{i}.jpg"}


@pytest.fixture
def index(tmp_path) -> GalleryIndex:
    """Three shards, one image removed."""
    index = GalleryIndex.create(tmp_path / "index", MODEL)
    for shard in range(3):
        index.add(encoding("basis", 4, shard), names=[f"{shard}{row}" for row in "abcd"])
    index.remove([1])
    return index


# --- equal to lists in memory ---------------------------------------------------------------------

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 4), st.booleans()),
        st.tuples(st.just("remove"), st.lists(st.integers(-30, 29), max_size=6)),
        st.tuples(st.just("mask"), st.integers(0, 3)),
        st.tuples(st.just("clear")),
        st.tuples(st.just("reopen"), st.booleans()),
    ),
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(["basis", "activations"]),
    st.sampled_from([None, torch.float16]),
    OPERATIONS,
    st.data(),
)
def test_agrees_with_lists_in_memory(kind, dtype, operations, data):
    pool = encoding(kind, 40)
    stored = Encoding(pool.features, **{kind: pool.maps.to(dtype or torch.float32)})
    rows, added, used = [], 0, 0  # rows: of the pool, name, pid, camid
    with tempfile.TemporaryDirectory() as folder:
        index = GalleryIndex.create(folder, MODEL, dtype=dtype)
        for what, *arguments in operations:
            if what == "add":
                n, labelled = arguments
                some = pool[used : used + n]
                if labelled:
                    names = [f"n{used + i}" for i in range(n)]
                    pids, camids = [(used + i) % 4 for i in range(n)], list(range(n))
                    index.add(some, names=names, pids=pids, camids=camids)
                else:
                    names, pids, camids = [str(added + i) for i in range(n)], [-1] * n, [-1] * n
                    index.add(some)
                rows += list(zip(range(used, used + n), names, pids, camids, strict=True))
                used, added = used + n, added + n
            elif what == "remove":
                numbers = [i for i in arguments[0] if -len(rows) <= i < len(rows)]
                index.remove(numbers)
                gone = {i % len(rows) for i in numbers}
                rows = [row for i, row in enumerate(rows) if i not in gone]
            elif what == "mask":
                index.remove(index.pids == arguments[0])
                rows = [row for row in rows if row[2] != arguments[0]]
            elif what == "clear":
                index.remove(range(len(index)))
                rows = []
            else:
                index = GalleryIndex(folder, verify=arguments[0])
            assert len(index) == len(rows)
            assert index.names == [row[1] for row in rows]
            assert index.pids.tolist() == [row[2] for row in rows]
            assert index.camids.tolist() == [row[3] for row in rows]
            assert index.pids.dtype == index.camids.dtype == np.int64
            assert_tidy(index)
            if not added:
                with pytest.raises(ValueError, match="is empty"):
                    index[:]
                continue
            numbers = torch.tensor([row[0] for row in rows], dtype=torch.long)
            start, stop = data.draw(st.tuples(*[st.integers(-12, 12) | st.none()] * 2))
            some = slice(start, stop, data.draw(st.sampled_from([None, 1, 2, -1])))
            assert_same(index[:], stored[numbers])
            assert_same(index[some], stored[torch.from_numpy(numbers.numpy()[some].copy())])
            assert_same(index[[]], stored[:0])
            assert_same(index[len(rows) :], stored[:0])
            if rows:
                picked = data.draw(st.lists(st.integers(-len(rows), len(rows) - 1), max_size=9))
                assert_same(index[picked], stored[numbers[picked]])
                assert_same(index[np.array(picked, np.int32)], stored[numbers[picked]])
                assert_same(index[torch.tensor(picked).long()], stored[numbers[picked]])
                mask = index.pids >= 1
                assert_same(index[mask], stored[numbers[torch.from_numpy(mask)]])


def test_numbers_given_as_names_are_never_used_twice(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL)
    index.add(encoding("basis", 3))
    index.add(encoding("basis", 3))
    index.remove([0, 1, 2])
    index.add(encoding("basis", 2))
    assert index.names == ["3", "4", "5", "6", "7"]


def test_the_same_images_can_be_added_twice(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL)
    same = encoding("basis", 2)
    index.add(same, names=["a", "b"])
    index.add(same, names=["a", "b"])
    assert len(files(tmp_path)) == 2  # one file serves both
    index.remove([0, 1])
    assert_same(GalleryIndex(tmp_path)[:], same)


def test_an_index_takes_what_another_gives(index, tmp_path):
    other = GalleryIndex.create(tmp_path / "other", MODEL)
    other.add(index[2:9], names=index.names[2:9], pids=index.pids[2:9], camids=index.camids[2:9])
    assert_same(other[:], index[2:9])
    assert other.names == index.names[2:9]


@pytest.mark.parametrize("rows", [[11], [-12], [0.5], ["a"], [True, False]])
def test_rows_that_are_none(index, rows, unchecked):
    for function in (index.remove, index.__getitem__):
        with pytest.raises(IndexError):
            function(rows)
    assert len(index) == 11


@pytest.mark.parametrize("rows", [3, [[1]], None, {1}])
def test_rows_that_are_no_list(index, rows, unchecked):
    for function in (index.remove, index.__getitem__):
        with pytest.raises(TypeError, match="must be a slice, a list of numbers or a mask"):
            function(rows)
    assert len(index) == 11


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
        assert [entry["rows"] for entry in index._entries] == sizes
        assert index.names == [f"img{i}.jpg" for i in range(11)]
        assert index.pids.tolist() == [i // 2 for i in range(11)]
        assert index.camids.tolist() == [i % 2 for i in range(11)]
        torch.testing.assert_close(index[:].maps, expected.maps)
        assert_tidy(index)
    index.extend(MODEL, DataLoader(Images(2, labels=False), 1))
    index.extend(MODEL, DataLoader(Images(2, labels=False), 1), progress=True)
    assert index.names[11:] == ["11", "12", "13", "14"] and index.pids[11:].tolist() == [-1] * 4


def test_maps_are_channels_last_and_as_they_were(index):
    assert index[0:1].maps.is_contiguous(memory_format=torch.channels_last)
    with_graph = encoding("basis", 2)
    with_graph.features.requires_grad_()
    index.add(with_graph)
    assert torch.equal(index[-2:].features, with_graph.features)


# --- search ---------------------------------------------------------------------------------------


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


# --- memory ---------------------------------------------------------------------------------------


def anonymous_kib():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]), int(text.split("RssFile:")[1].split()[0])


def test_what_is_not_looked_at_is_not_read(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL)
    large = Encoding(torch.rand(64, 64), basis=torch.rand(64, 64, 64, 32))  # 32 MiB
    index.add(large)
    index.add(Encoding(large.features, basis=large.maps), names=list(map(str, range(64))))
    del index
    gc.collect()
    before = anonymous_kib()
    index = GalleryIndex(tmp_path, verify=False)
    some, same = index[10:20], index[15:30]
    assert some.maps.untyped_storage().data_ptr() == same.maps.untyped_storage().data_ptr()
    mapped = Path("/proc/self/maps").read_text()
    assert all(entry["file"] in mapped for entry in index._entries)
    assert torch.equal(some.maps[0], large.maps[10])
    GalleryIndex(tmp_path, verify=True)
    after = anonymous_kib()
    assert after[0] - before[0] < 8 * 1024 and after[1] - before[1] < 16 * 1024
    del index, same
    gc.collect()
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(some.maps, large.maps[10:20])  # the mapping outlives index and file


# --- atomic ---------------------------------------------------------------------------------------


def snapshot(folder):
    """Returns all that is in an index, and in its folder."""
    index = GalleryIndex(folder)
    assert_tidy(index)
    return index.names, index.pids.tolist(), index[:].maps.tolist(), files(folder)


CHANGES = {
    "add": lambda index: index.add(index[:2]),
    "extend": lambda index: index.extend(MODEL, DataLoader(Images(6), 1), shard_size=2),
    "remove": lambda index: index.remove([0, 1, 2]),
}
STEPS = {
    "save_file": (module, "save_file"),
    "os.replace": (os, "replace"),
    "os.fsync": (os, "fsync"),
    "encode": (CASN, "encode"),
    "_write_manifest": (module, "_write_manifest"),
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
    shards = {"add": 1, "extend": 3, "remove": 0}[change]
    return {
        "save_file": shards,
        "os.replace": shards + 1,
        "os.fsync": 2 * shards + 1,  # the one after the manifest has been moved is too late
        "encode": 6 if change == "extend" else 0,
        "_write_manifest": 1,
    }[step]


KILLED = """
import os, signal, sys, torch
from torch import nn
from torch.utils.data import DataLoader
from casn_plugin import CASN, index

torch.manual_seed(0)
model = CASN(nn.Sequential(nn.Conv2d(3, 4, 3, stride=8)), hidden_dim=8, input_size=(48, 24),
             forward=lambda net, imgs: (None, net(imgs).mean((2, 3))))
imgs = torch.rand(9, 3, 48, 24)
gallery = index.GalleryIndex.create(sys.argv[1], model)
gallery.extend(model, DataLoader(imgs[:3], 1))
genuine, calls = index._move, []

def move(source, target):
    calls.append(source)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    genuine(source, target)

index._move = move
gallery.extend(model, DataLoader(imgs, 1), shard_size=3)
"""


def run(script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root,
    )  # fmt: skip


def test_a_killed_process_leaves_the_old_index(tmp_path):
    killed = run(KILLED, tmp_path)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, errors
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    (tmp_path / "notes.tmp").write_bytes(b"mine")
    index = GalleryIndex(tmp_path)
    assert index.names == ["0", "1", "2"]
    left = files(tmp_path) - {"index.json", index._entries[0]["file"]}
    assert len(left) == 4  # a whole shard, half a shard, and what is not the index's own
    index.remove([1])
    assert files(tmp_path) == {
        "index.json", index._entries[0]["file"], "model.safetensors", "notes.tmp"
    }  # fmt: skip


def test_the_second_writer_is_told(index):
    second = GalleryIndex(index.folder)
    index.remove([0])
    before = snapshot(index.folder)
    message = "has been changed by another process: open it anew"
    for change in (
        lambda: second.add(second[:3]),
        lambda: second.remove([1]),
        lambda: second.extend(MODEL, DataLoader(Images(2, fail_at=0), 1)),  # before any work
    ):
        with pytest.raises(ValueError, match=message):
            change()
        assert snapshot(index.folder) == before
    assert len(second) == 11 and second[:].maps.shape[0] == 11
    index.add(index[:1])
    assert len(GalleryIndex(index.folder)) == 11


def test_a_second_writer_of_the_same_images_deletes_none_of_the_first(index):
    second = GalleryIndex(index.folder)
    for each in (index, second):
        try:
            each.add(encoding("basis", 2, 7), names=["x", "y"])
        except ValueError:
            assert each is second
    assert GalleryIndex(index.folder).names[-2:] == ["x", "y"]


# --- damage ---------------------------------------------------------------------------------------


def test_every_flipped_byte_of_a_shard_is_found(index):
    path = index.folder / index._entries[1]["file"]
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            GalleryIndex(index.folder)
        try:  # without its checksum: an error of ours, or nothing
            GalleryIndex(index.folder, verify=False)
        except ValueError as error:
            assert path.name in str(error)
    path.write_bytes(content)
    GalleryIndex(index.folder)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_cut_short_missing_or_foreign(index, verify):
    path = index.folder / index._entries[1]["file"]
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            GalleryIndex(index.folder, verify=verify)
    save_file({"weight": torch.rand(3)}, path)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        GalleryIndex(index.folder, verify=verify)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        GalleryIndex(index.folder, verify=verify)


@pytest.mark.parametrize("tensors", [
    {"weight": torch.rand(3)},
    {"features": torch.rand(4, DIM), "maps": torch.rand(4, 3)},
    {"features": torch.rand(4, DIM), "maps": torch.rand(4, *SIZE, DIM + 1)},
    {"features": torch.rand(3, DIM), "maps": torch.rand(4, *SIZE, DIM)},
    {"features": torch.rand(4, DIM).double(), "maps": torch.rand(4, *SIZE, DIM)},
])  # fmt: skip
@pytest.mark.parametrize("names", [None, "nonsense", '["a"]', '["a", "b", "c", "d"]', "3"])
def test_a_foreign_file_of_the_same_size(index, tensors, names):
    """Only the content can tell: the manifest is made to fit."""
    path = index.folder / index._entries[1]["file"]
    labels = {"pids": torch.zeros(4).long(), "camids": torch.zeros(4).long()}
    save_file({**tensors, **labels}, path, None if names is None else {"names": names})
    content = json.loads((index.folder / "index.json").read_text())
    content["shards"][1]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    module._write_manifest(index.folder, content)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        GalleryIndex(index.folder)


def test_every_flipped_byte_of_the_manifest_is_found(index):
    path = index.folder / "index.json"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if content[place : place + 1].isspace():
            continue
        with pytest.raises(ValueError, match=r"index\.json is"):
            GalleryIndex(index.folder)
    for wrong in (b"", b"\xff\x00", b"[]", b"3", b'{"version": 1}', content[:-20]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"index\.json is (damaged|no manifest)"):
            GalleryIndex(index.folder)
    newer = {**json.loads(content), "version": 2}
    path.write_text(json.dumps({**newer, "checksum": module._checksum(newer)}))
    with pytest.raises(ValueError, match=r"index\.json is of version 2, but .* reads 1"):
        GalleryIndex(index.folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no gallery index in .*index"):
        GalleryIndex(index.folder)


# --- bad input ------------------------------------------------------------------------------------


def test_create(index, tmp_path):
    with pytest.raises(FileExistsError, match="open it with GalleryIndex"):
        GalleryIndex.create(index.folder, MODEL)
    with pytest.raises(TypeError, match="must be a float dtype, got torch.int8"):
        GalleryIndex.create(tmp_path / "new", MODEL, dtype=torch.int8)
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
    assert_tidy(index)


@pytest.mark.parametrize("emptied", [False, True])
def test_other_images_are_refused(index, emptied):
    if emptied:
        index.remove(range(11))
        index = GalleryIndex(index.folder)
        assert len(index) == 0 and files(index.folder) == {"index.json"}
    wider = Encoding(torch.rand(1, DIM), basis=torch.rand(1, DIM, 3, 3))
    for other in (
        encoding("basis", 2, size=(6, 2)),
        encoding("activations", 2),
        Encoding(torch.rand(2, DIM), activations=torch.rand(2, DIM, *SIZE)),
        encoding("basis", 2, dtype=torch.float64),
        wider,
    ):
        with pytest.raises(ValueError, match="the index holds kind basis.*expected images of one"):
            index.add(other)
    with pytest.raises(ValueError, match="expected images of one model and one size"):
        loader = DataLoader(Images(2, fail_at=1), 1)  # refused before the second image is read
        index.extend(MODEL, loader, shard_size=1)
    assert_tidy(index)
    assert len(GalleryIndex(index.folder)) == len(index) == (0 if emptied else 11)


def test_images_of_two_sizes_in_one_loader(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL)
    mixed = DataLoader([torch.rand(3, 48, 24), torch.rand(3, 48, 48)], 1)
    with pytest.raises(ValueError, match="expected images of one model and one size"):
        index.extend(MODEL, mixed, shard_size=1)
    assert files(tmp_path) == {"index.json"}


@pytest.mark.parametrize("name", ["names", "pids", "camids"])
def test_lists_of_another_length(index, name, unchecked):
    before = snapshot(index.folder)
    for n, length in ((2, 3), (2, 0), (0, 1)):
        values = [str(i) for i in range(length)] if name == "names" else list(range(length))
        with pytest.raises(ValueError, match=f"expected {n} {name}, one an image, got {length}"):
            index.add(encoding("basis", n), **{name: values})
    assert snapshot(index.folder) == before


@pytest.mark.parametrize("values", [[1.0, 2.0], ["a", "b"], [True, False], [[1], [2]], [2**70, 1]])
def test_labels_that_are_no_integers(index, values, unchecked):
    with pytest.raises(TypeError, match="pids must be integers"):
        index.add(encoding("basis", 2), pids=values)
    assert_tidy(index)


def test_labels_of_any_integer_type(index):
    for values in (np.array([5, 6], np.int32), torch.tensor([5, 6]), (5, 6)):
        index.add(encoding("basis", 2), pids=values, camids=values)
        assert index.pids[-2:].tolist() == index.camids[-2:].tolist() == [5, 6]


def test_maps_that_the_dtype_cannot_hold(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL, dtype=torch.float16)
    large = Encoding(torch.rand(1, DIM), basis=torch.full((1, DIM, *SIZE), 1e5))
    with pytest.raises(ValueError, match=r"maps that torch.float16 can hold, got .* 1e\+05"):
        index.add(large)


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.rand(3, 48, 24)


def test_loaders_that_will_not_do(tmp_path, unchecked):
    index = GalleryIndex.create(tmp_path, MODEL)
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        index.extend(MODEL, DataLoader(Images(2)), shard_size=0)
    with pytest.raises(ValueError, match="needs torch.distributed.init_process_group"):
        index.extend(MODEL, DataLoader(Images(2)), distributed=True)
    for data in ([{"image": 1}], ["abc"], [torch.rand(4)], [torch.rand(3, 48, 24)]):
        loader = DataLoader(data, batch_size=None)
        with pytest.raises(TypeError, match="must give batches of images"):
            index.extend(MODEL, loader)
    for loader in (DataLoader(Endless(), 1), DataLoader(Images(3), batch_sampler=[[0]])):
        with pytest.raises(ValueError, match="needs a loader with a batch_size"):
            module._share(loader, 1, 0, 2)
    index.extend(MODEL, DataLoader([(torch.rand(3, 48, 24), 4)]))
    index.extend(MODEL, DataLoader(Endless(), 1))
    assert index.names == ["0", "1"]


# --- distributed ----------------------------------------------------------------------------------

WORKER = """
import sys, torch
import torch.distributed as dist
from datetime import timedelta
from torch import nn
from torch.utils.data import DataLoader
from casn_plugin import CASN
from casn_plugin.index import GalleryIndex

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                        timeout=timedelta(seconds=30))

def make(seed):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    return CASN(backbone, hidden_dim=8, input_size=(48, 24),
                forward=lambda net, imgs: (None, net(imgs).mean((2, 3))))

class Images(torch.utils.data.Dataset):
    def __init__(self, n, labels):
        self.imgs = torch.rand(n, 3, 48, 24, generator=torch.Generator().manual_seed(n))
        self.labels = labels
    def __len__(self):
        return len(self.imgs)
    def __getitem__(self, i):
        if self.labels == "broken" and i == 5:
            raise OSError("a broken image")
        if not self.labels:
            return self.imgs[i]
        return {"img": self.imgs[i], "pid": i // 2, "camid": i % 2, "impath": f"img{i}.jpg"}

def everywhere(name):
    if rank == 0:
        GalleryIndex.create(f"{folder}/{name}", model)
    dist.barrier()
    return GalleryIndex(f"{folder}/{name}")

def fails(kind, message, function):
    try:
        function()
    except kind as error:
        assert message in str(error), error
    else:
        raise SystemExit(f"no error: {message}")

model = make(0)
settings = [(11, 2, 4, True, False), (11, 3, 4, False, False), (1, 4, 4, True, False),
            (7, 2, 1, True, True), (12, 2, 4, False, False)]
joint = everywhere("joint")
single = GalleryIndex.create(f"{folder}/single{rank}", model)
for n, batch, shard, labels, drop_last in settings:
    loader = DataLoader(Images(n, labels), batch, drop_last=drop_last)
    single.extend(model, loader, shard_size=shard)
    dist.barrier()
    joint.extend(model, loader, shard_size=shard, distributed=True)
    assert joint._entries == single._entries and len(joint) == len(single)
    assert joint.names == single.names and joint._manifest == single._manifest
    assert torch.equal(joint[:].maps, single[:].maps)

loader = DataLoader(Images(8, "broken"), 1)  # image 5 is in the share of process 1
kind, message = (OSError, "a broken image") if rank else (RuntimeError, "process 1 failed: OSError")
fails(kind, message, lambda: joint.extend(model, loader, shard_size=1, distributed=True))
good = DataLoader(Images(4, True), 1)
kind, message = (ValueError, "other weights") if rank else (RuntimeError, "process 1 failed")
fails(kind, message,
      lambda: joint.extend(make(rank), good, shard_size=1, distributed=True))
genuine = GalleryIndex._commit
def no_commit(*_):
    raise OSError("no space left")
GalleryIndex._commit = no_commit
kind, message = (RuntimeError, "process 0 failed") if rank else (OSError, "no space left")
fails(kind, message, lambda: joint.extend(model, good, shard_size=1, distributed=True))
GalleryIndex._commit = genuine
# process 1 works in a folder of its own, as on a machine without a shared disk
before = single._manifest
own = single if rank else joint
kind, message = (FileNotFoundError, "lacks its shard")
if rank:
    kind, message = RuntimeError, "process 0 failed"
fails(kind, message, lambda: own.extend(model, good, shard_size=1, distributed=True))
if rank:
    single.add(single[:1])
fails(ValueError, "not all processes have opened the same",
      lambda: own.extend(model, good, shard_size=1, distributed=True))
assert GalleryIndex(joint.folder)._manifest == before
print("done", len(joint))
"""


def test_two_processes_make_the_index_of_one(tmp_path):
    workers = [run(WORKER, tmp_path, rank) for rank in range(2)]
    try:
        for worker in workers:
            output, errors = worker.communicate(timeout=60)
            assert worker.returncode == 0, errors
            assert output == "done 41\n"
    finally:
        for worker in workers:
            worker.kill()
    for name in ("joint", "single0"):
        assert_tidy(GalleryIndex(tmp_path / name))
    assert_same(GalleryIndex(tmp_path / "joint")[:], GalleryIndex(tmp_path / "single0")[:])
