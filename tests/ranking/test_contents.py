"""The rows of an index: equal to lists in memory, and read only where they are looked at."""

import gc
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from indexes import MODEL, assert_same, assert_tidy, encoding, entries, files, three_shards

from casn_plugin import Encoding, GalleryIndex


@pytest.fixture
def index(tmp_path) -> GalleryIndex:
    return three_shards(tmp_path / "index")


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


def test_the_same_images_can_be_added_again(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL)
    same = encoding("basis", 2)
    index.add(same, names=["a", "b"])
    index.remove([1])
    index.add(same, names=["a", "b"], duplicates="skip")
    assert index.names == ["a", "b"] and len(files(tmp_path)) == 2  # one file serves both
    assert_same(GalleryIndex(tmp_path)[:], same)
    index.remove([0, 1])
    index.add(same, names=["a", "b"])
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


def test_maps_are_contiguous_and_as_they_were(index):
    assert index[0:1].maps.is_contiguous()
    with_graph = encoding("basis", 2)
    with_graph.features.requires_grad_()
    index.add(with_graph)
    assert torch.equal(index[-2:].features, with_graph.features)


def anonymous_kib():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]), int(text.split("RssFile:")[1].split()[0])


def test_what_is_not_looked_at_is_not_read(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL)
    large = Encoding(torch.rand(64, 64), basis=torch.rand(64, 64, 64, 32))  # 32 MiB
    index.add(large)
    index.add(Encoding(large.features, basis=large.maps), names=[f"n{row}" for row in range(64)])
    del index
    gc.collect()
    before = anonymous_kib()
    index = GalleryIndex(tmp_path, verify=False)
    some, same = index[10:20], index[15:30]
    assert some.maps.untyped_storage().data_ptr() == same.maps.untyped_storage().data_ptr()
    mapped = Path("/proc/self/maps").read_text()
    assert all(entry.file in mapped for entry in entries(index))
    assert torch.equal(some.maps[0], large.maps[10])
    GalleryIndex(tmp_path, verify=True)
    after = anonymous_kib()
    assert after[0] - before[0] < 8 * 1024 and after[1] - before[1] < 16 * 1024
    del index, same
    gc.collect()
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(some.maps, large.maps[10:20])  # the mapping outlives index and file
