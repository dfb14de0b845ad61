"""The files of an index: frank on damage, particular about what goes in."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from indexes import (
    DIM,
    MODEL,
    SIZE,
    Images,
    assert_same,
    assert_tidy,
    encoding,
    entries,
    files,
    head_sha256,
    parts_of,
    snapshot,
    three_shards,
)
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from casn_plugin import Encoding, GalleryIndex
from casn_plugin.ranking.kept import Kept
from casn_plugin.ranking.manifest import Manifest


@pytest.fixture
def index(tmp_path) -> GalleryIndex:
    return three_shards(tmp_path / "index")


KEEPING = {
    "float32": {}, "int8": {"dtype": torch.int8}, "features alone": {"maps": False},
}  # fmt: skip


@pytest.mark.parametrize("keeping", KEEPING)
def test_every_flipped_byte_of_a_shard_is_found(tmp_path, keeping):
    """In the head by opening, in features and maps before they are looked at, and nowhere else."""
    index = GalleryIndex.create(tmp_path, MODEL, **KEEPING[keeping])
    for shard in range(2):
        index.add(encoding("basis", 4, shard), names=[f"{shard}{row}" for row in "abcd"])
    path = tmp_path / entries(index)[1].file
    maps = keeping != "features alone"
    read = index.__class__.__getitem__ if maps else index.__class__.features_of
    before = index[:4] if maps else None
    content = path.read_bytes()
    head = len(content) - sum(
        len(data) for name, data in parts_of(path)[1].items()
        if name in ("features", "maps", "scales")
    )  # fmt: skip
    opened = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        message = f"{path.name} is damaged"
        try:
            index = GalleryIndex(tmp_path)
        except ValueError as error:
            assert message in str(error)
        else:
            opened += 1
            if maps:
                assert_same(index[:4], before)
            for rows in (slice(None), [0, 4, 5, 6, 7]):
                with pytest.raises(ValueError, match=f"{message}: the .* image named '1[abcd]'"):
                    read(index, rows)
            with pytest.raises(ValueError, match=message):
                index.verify()
            kept = [row for row in range(4, 8) if not fails(read, index, [row])]
            assert len(kept) == 3  # of the four images one is damaged
            with pytest.raises(ValueError, match=message):
                index.verify()
        try:  # without checksums: an error of ours, or nothing
            GalleryIndex(tmp_path, verify=False)
        except ValueError as error:
            assert path.name in str(error)
    assert opened == len(content) - head
    path.write_bytes(content)
    read(GalleryIndex(tmp_path), slice(None))


def fails(function, *arguments) -> bool:
    try:
        function(*arguments)
    except ValueError:
        return True
    return False


def test_images_are_compared_once_each_and_no_others(index, monkeypatch):
    index = GalleryIndex(index.folder)
    seen, genuine = [], Kept.checksums
    monkeypatch.setattr(
        Kept, "checksums",
        lambda self, part, rows: seen.append((part, [*rows])) or genuine(self, part, rows),
    )  # fmt: skip

    def compared(*parts):
        found = [each for each in seen if each[1]]
        seen.clear()
        return found == [*parts]

    index.features_of([4, 4, 3])
    assert compared(("features", [0, 1]))
    index.features_of(slice(3, 7))
    assert compared(("features", [2, 3]))
    assert index[3:4].maps.shape and compared(("maps", [0]))
    index.features_of(slice(3, 7))
    index[[3]]
    assert compared()
    index.verify()
    assert compared(*(
        (part, rows) for rows in ([0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3])
        for part in ("features", "maps")
    ))  # fmt: skip
    index.add(encoding("basis", 1), names=["new"])
    compared()
    index[:]
    assert compared(("features", [0]), ("maps", [0]))  # what is open stays open
    trusted = GalleryIndex(index.folder, verify=False)
    trusted[:]
    assert compared()


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_cut_short_missing_or_foreign(index, verify):
    path = index.folder / entries(index)[1].file
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


def text(value) -> torch.Tensor:
    return torch.frombuffer(bytearray(value, "utf-8"), dtype=torch.uint8)


FOREIGN = {
    "features": [torch.rand(3, DIM), torch.rand(4, DIM).double(), torch.rand(4, DIM + 1), None],
    "maps": [
        torch.rand(4, 3), torch.rand(4, *SIZE, DIM + 1), torch.rand(4, *SIZE, DIM).half(), None,
    ],
    "scales": [torch.rand(4, DIM)],
    "names": [
        None, *map(text, ("nonsense", '["a"]', "3", '["a", "b", "c", 4]', " ", '["a", "b"')),
    ],
    "pids": [torch.zeros(4), torch.zeros(3).long(), torch.full((4,), -2), None],
    "features_sha256": [torch.zeros(4, 32), torch.zeros(4, 31, dtype=torch.uint8), None],
    "maps_sha256": [torch.zeros(4, 8).long(), torch.zeros(5, 32, dtype=torch.uint8), None],
    "more": [torch.zeros(4)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "other"), [(n, each) for n, some in FOREIGN.items() for each in some]
)
def test_a_foreign_file(index, name, other):
    """Only the content can tell: the manifest is made to fit."""
    path = index.folder / entries(index)[1].file
    tensors = {**load_file(path), name: other}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    manifest = Manifest.read(index.folder)
    first, second, third = manifest.shards
    second = replace(second, sha256=head_sha256(path))
    replace(manifest, shards=(first, second, third)).write(index.folder)
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        GalleryIndex(index.folder)


@pytest.mark.parametrize("scales", [None, torch.rand(4, DIM + 1), torch.rand(4, DIM).double()])
def test_maps_in_8_bits_without_their_scales(tmp_path, scales):
    index = GalleryIndex.create(tmp_path, MODEL, dtype=torch.int8)
    index.add(encoding("basis", 4))
    (entry,) = entries(index)
    tensors = {**load_file(tmp_path / entry.file), "scales": scales}
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / entry.file)
    entry = replace(entry, sha256=head_sha256(tmp_path / entry.file))
    replace(Manifest.read(tmp_path), shards=(entry,)).write(tmp_path)
    with pytest.raises(ValueError, match=f"{entry.file} is damaged: its scales are not those"):
        GalleryIndex(tmp_path)


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
    for change, message in (
        ({"version": 1}, r"index\.json is of version 1, but .* reads 3"),
        ({"more": 3}, r"index\.json is damaged: .*more"),
        ({"shards": [{"file": "a"}]}, r"index\.json is damaged: .*sha256"),
    ):
        new = {**json.loads(content), **change}
        del new["checksum"]  # of all that is left
        checksum = hashlib.sha256(json.dumps(new, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**new, "checksum": checksum}))
        with pytest.raises(ValueError, match=message):
            GalleryIndex(index.folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no gallery index in .*index"):
        GalleryIndex(index.folder)


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
        message = f"{name} must be of shape .{n},., one an image, got shape .{length},."
        if name == "names":
            message = f"expected {n} names, one an image, got {length}"
        with pytest.raises(ValueError, match=message):
            index.add(encoding("basis", n), **{name: values})
    assert snapshot(index.folder) == before


def test_names_that_are_no_list_of_text(index, unchecked):
    for names in ("ab", [1, 2], torch.arange(2)):
        with pytest.raises(TypeError, match="names must be .*text, one an image, got"):
            index.add(encoding("basis", 2), names=names)
    assert_tidy(index)


@pytest.mark.parametrize(
    "values", [[1.0, 2.0], ["a", "b"], [True, False], [[1.0], [2.0]], [2**70, 1]]
)
def test_labels_that_are_no_integers(index, values, unchecked):
    with pytest.raises(TypeError, match="pids must be integers"):
        index.add(encoding("basis", 2), pids=values)
    assert_tidy(index)


def test_labels_that_are_no_list_or_below_unknown(index, unchecked):
    for values in ([[1], [2]], [0, -2]):
        with pytest.raises(ValueError, match="pids must be"):
            index.add(encoding("basis", 2), pids=values)
    assert_tidy(index)


def test_unknown_labels_are_minus_one(index):
    index.add(encoding("basis", 3), pids=[7, None, -1], camids=[None, 2, None])
    assert index.pids[-3:].tolist() == [7, -1, -1] and index.camids[-3:].tolist() == [-1, 2, -1]


def test_labels_of_any_integer_type(index):
    for values in (np.array([5, 6], np.int32), torch.tensor([5, 6]), (5, 6)):
        index.add(encoding("basis", 2), pids=values, camids=values)
        assert index.pids[-2:].tolist() == index.camids[-2:].tolist() == [5, 6]


def test_maps_that_the_dtype_cannot_hold(tmp_path):
    index = GalleryIndex.create(tmp_path, MODEL, dtype=torch.float16)
    large = Encoding(torch.rand(1, DIM), basis=torch.full((1, DIM, *SIZE), 1e5))
    with pytest.raises(ValueError, match=r"maps that torch.float16 can hold, got .* 1e\+05"):
        index.add(large)
