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
    assert_tidy,
    encoding,
    entries,
    files,
    snapshot,
    three_shards,
)
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from casn_plugin import Encoding, GalleryIndex
from casn_plugin.ranking.shards import Manifest


@pytest.fixture
def index(tmp_path) -> GalleryIndex:
    return three_shards(tmp_path / "index")


def test_every_flipped_byte_of_a_shard_is_found(index):
    path = index.folder / entries(index)[1].file
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
    path = index.folder / entries(index)[1].file
    labels = {"pids": torch.zeros(4).long(), "camids": torch.zeros(4).long()}
    save_file({**tensors, **labels}, path, None if names is None else {"names": names})
    manifest = Manifest.read(index.folder)
    first, second, third = manifest.shards
    second = replace(second, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    replace(manifest, shards=(first, second, third)).write(index.folder)
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
    for change, message in (
        ({"version": 2}, r"index\.json is of version 2, but .* reads 1"),
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
