"""A folder of pictures as a gallery: names, and an index that encodes only what is new."""

import builtins
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TinyBackbone, tiny_forward

import casn_plugin.folders as rooms
from casn_plugin import CASN, GalleryIndex, Preprocessing
from casn_plugin.folders import (
    find_pictures,
    index_folder,
    load_pictures,
    name_in,
)
from casn_plugin.loading import encode_images
from casn_plugin.ranking import EncodedAgain

SIZE = (48, 24)


def tiny(seed: int = 0) -> CASN:
    torch.manual_seed(seed)
    return CASN(TinyBackbone(), forward=tiny_forward, input_size=SIZE, hidden_dim=16).eval()


MODEL = tiny()


def paint(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path, format=None if path.suffix else "PNG")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Seven pictures at several depths, two of them damaged, and what is no picture."""
    place = tmp_path / "pictures"
    for seed, name in enumerate(
        ("0001_c1s1_000010_00.png", "0001_c2s1_000020_00.png", "deep/er/b.JPG", "deep/c.webp",
         "ü ö.png")
    ):  # fmt: skip
        paint(place / name, seed)
    (place / "cut.png").write_bytes((place / "ü ö.png").read_bytes()[:400])
    (place / "deep" / "text.jpg").write_text("no picture")
    (place / "notes.txt").write_text("nothing")
    paint(place / ".hidden" / "d.png", 9)
    paint(place / ".e.png", 9)
    return place


WHOLE = ["0001_c1s1_000010_00.png", "0001_c2s1_000020_00.png", "deep/c.webp", "deep/er/b.JPG",
         "ü ö.png"]  # fmt: skip


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images go through the model, batch by batch."""
    batches, encode = [], CASN.encode

    def counting(self, imgs):
        batches.append(len(imgs))
        return encode(self, imgs)

    monkeypatch.setattr(CASN, "encode", counting)
    return batches


def check(index: GalleryIndex, folder: Path, model: CASN = MODEL) -> None:
    """Every picture is encoded as it is, under its own name."""
    assert sorted(index.names) == sorted({*index.names})
    for row, name in enumerate(index.names):
        img = Preprocessing(SIZE).load(folder / name)[None]
        torch.testing.assert_close(index.features_of([row]), encode_images(model, img).features)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_is_encoded_once(folder, tmp_path, encoded, workers):
    done = index_folder(tmp_path / "index", MODEL, folder, batch_size=2, workers=workers)
    assert sorted(done.index.names) == WHOLE == done.encoded and sum(encoded) == 5
    assert done.kept == 0 and done.removed == []
    assert list(done.damaged) == ["cut.png", "deep/text.jpg"]
    assert all("can't be read as a picture" in why for why in done.damaged.values())
    assert str(folder) + " " not in "".join(done.damaged.values())
    labels = dict(zip(done.index.names, zip(done.index.pids, done.index.camids, strict=True),
                      strict=True))  # fmt: skip
    assert labels[WHOLE[0]] == (1, 1) and labels[WHOLE[1]] == (1, 2)
    assert all(labels[name] == (-1, -1) for name in WHOLE[2:])
    check(done.index, folder)

    encoded.clear()
    again = index_folder(tmp_path / "index", MODEL, folder, workers=workers)
    assert encoded == [] and again.encoded == [] and again.kept == 5
    assert again.damaged == done.damaged and again.index.names == done.index.names
    assert again.describe().startswith(
        "5 pictures: 0 encoded, 5 kept, 0 removed, 2 left out\n  cut"
    )


def test_only_what_is_new_or_has_changed_is_encoded(folder, tmp_path, encoded):
    place = tmp_path / "index"
    index_folder(place, MODEL, folder)
    paint(folder / "new.bmp", 20)
    paint(folder / WHOLE[0], 21)  # another picture of the same name
    os.utime(folder / WHOLE[0], ns=(1, 1))
    paint(folder / "cut.png", 22)  # no longer damaged
    (folder / WHOLE[3]).unlink()
    (folder / "ü ö.png").write_bytes(b"damaged since")
    encoded.clear()
    done = index_folder(place, MODEL, folder)
    assert sum(encoded) == 3 and done.encoded == [WHOLE[0], "cut.png", "new.bmp"]
    assert done.kept == 2 and done.removed == [WHOLE[3]]
    assert list(done.damaged) == ["deep/text.jpg", "ü ö.png"]
    assert sorted(done.index.names) == sorted([*WHOLE[:3], "cut.png", "new.bmp"])
    check(done.index, folder)
    check(GalleryIndex(place), folder)
    encoded.clear()
    assert index_folder(place, MODEL, folder).encoded == [] and encoded == []


def test_pictures_that_are_prepared_otherwise_are_encoded_again(folder, tmp_path, encoded):
    model, place = tiny(), tmp_path / "index"
    index_folder(place, model, folder)
    model.preprocessing = Preprocessing(SIZE, mean=(0.5, 0.5, 0.5))
    encoded.clear()
    done = index_folder(place, model, folder)
    assert sum(encoded) == 5 and done.kept == 0 and len(done.index) == 5
    img = model.preprocessing.load(folder / done.index.names[2])[None]
    expected = encode_images(model, img).features
    torch.testing.assert_close(done.index.features_of([2]), expected)


def test_what_was_encoded_before_an_interruption_is_kept(folder, tmp_path, encoded, monkeypatch):
    monkeypatch.setattr(rooms, "_CHUNK", 3)
    extend, calls = GalleryIndex.extend, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return extend(self, *args, **kwargs)

    monkeypatch.setattr(GalleryIndex, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index_folder(tmp_path / "index", MODEL, folder)
    first = sum(encoded)
    assert first == 2 and GalleryIndex(tmp_path / "index").names == WHOLE[:2]
    done = index_folder(tmp_path / "index", MODEL, folder)
    assert sum(encoded) == 5 and done.kept == 2 and len(done.damaged) == 2
    check(done.index, folder)


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"format": "casn-plugin pictures"}', "[" * 9999]
)
def test_without_a_record_all_is_encoded_again(folder, tmp_path, encoded, content):
    place = tmp_path / "index"
    index_folder(place, MODEL, folder)
    (place / "pictures.json").unlink()
    if content is not None:
        (place / "pictures.json").write_text(content)
    encoded.clear()
    done = index_folder(place, MODEL, folder)
    assert sum(encoded) == 5 and done.kept == 0 and sorted(done.index.names) == WHOLE
    check(done.index, folder)
    assert json.loads((place / "pictures.json").read_text())["version"] == 1


def test_an_index_of_something_else_is_refused_and_left_as_it_is(folder, tmp_path, unchecked):
    place = tmp_path / "index"
    index_folder(place, MODEL, folder)
    before = GalleryIndex(place).names
    paint(tmp_path / "others" / "x.png", 30)
    with pytest.raises(
        ValueError, match=r"none of the 5 pictures in the index in .* is in .*others"
    ):
        index_folder(place, MODEL, tmp_path / "others")
    with pytest.raises(ValueError, match="has pid 1 and camid 1, but by the pattern -1 and -1"):
        index_folder(place, MODEL, folder, pattern="(?P<camid>0) none")
    paint(folder / "new.png", 31)
    os.utime(folder / WHOLE[0], ns=(1, 1))
    with pytest.raises(ValueError, match="created for a model with other weights"):
        index_folder(place, tiny(seed=1), folder)
    assert GalleryIndex(place).names == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no picture in"):
        index_folder(tmp_path / "none", MODEL, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        index_folder(tmp_path / "none", MODEL, tmp_path / "nowhere")
    with pytest.raises(TypeError, match="CASN"):
        index_folder(tmp_path / "none", torch.nn.Linear(2, 2), folder)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        index_folder(tmp_path / "none", MODEL, folder, batch_size=0)
    assert not (tmp_path / "none").exists()


def test_a_folder_of_damaged_pictures_alone_is_an_empty_index(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    done = index_folder(tmp_path / "index", MODEL, tmp_path / "pictures")
    assert len(done.index) == 0 and list(done.damaged) == ["a.png"] and done.encoded == []


def refusing(monkeypatch, number: int, name: str = "") -> list[str]:
    """Opening of pictures fails by an error of the system; the names of all that were opened."""
    opened, real = [], builtins.open

    def failing(path, *args, **kwargs):
        if str(path).endswith(name or WHOLE[0]):
            opened.append(str(path))
            if number:
                raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", failing)
    return opened


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_what_the_system_did_not_let_be_read_is_tried_again(folder, tmp_path, monkeypatch, number):
    refusing(monkeypatch, number)
    done = index_folder(tmp_path / "index", MODEL, folder)
    assert done.damaged[WHOLE[0]] == os.strerror(number) and WHOLE[0] not in done.index.names
    monkeypatch.undo()
    opened = refusing(monkeypatch, 0, "cut.png")
    again = index_folder(tmp_path / "index", MODEL, folder)
    assert again.encoded == [WHOLE[0]] and list(again.damaged) == ["cut.png", "deep/text.jpg"]
    assert opened == []  # damaged as it was, and not read again
    check(again.index, folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_regular_file_is_left_out(tmp_path, workers):
    paint(tmp_path / "pictures" / "a.png", 0)
    os.mkfifo(tmp_path / "pictures" / "b.png")
    (tmp_path / "pictures" / "c.png").symlink_to("/dev/zero")
    (tmp_path / "pictures" / "d.png").symlink_to("nowhere")
    for _ in range(2):
        done = index_folder(tmp_path / "index", MODEL, tmp_path / "pictures", workers=workers)
        assert done.index.names == ["a.png"]
        assert done.damaged == {"b.png": "expected a regular file",
                                "c.png": "expected a regular file",
                                "d.png": "No such file or directory"}  # fmt: skip


def test_where_nothing_has_changed_nothing_is_written(folder, tmp_path, monkeypatch):
    place = tmp_path / "index"
    refusing(monkeypatch, errno.EACCES)
    first = index_folder(place, MODEL, folder)

    def contents():
        every = {each: each.stat() for each in (place, *place.iterdir())}
        return {each: (its.st_ino, its.st_mtime_ns) for each, its in every.items()}

    before = contents()
    again = index_folder(place, MODEL, folder)
    assert contents() == before and again.damaged == first.damaged and len(first.damaged) == 3
    (folder / WHOLE[1]).unlink()
    assert index_folder(place, MODEL, folder).removed == [WHOLE[1]] and contents() != before


def test_a_name_that_is_no_text_is_a_name_all_the_same(folder, tmp_path):
    odd = os.fsdecode(b"\xff.png")
    try:
        shutil.copy(folder / WHOLE[0], folder / odd)
    except OSError:
        pytest.skip("this file system has no such names")
    done = index_folder(tmp_path / "index", MODEL, folder)
    assert odd in done.index.names
    assert index_folder(tmp_path / "index", MODEL, folder).encoded == []


def test_pictures_are_found_and_named_as_they_are_sought(folder, tmp_path, monkeypatch):
    assert find_pictures(folder) == sorted([*WHOLE, "cut.png", "deep/text.jpg"])
    monkeypatch.chdir(folder)
    assert name_in(folder, "deep/er/b.JPG") == name_in(".", folder / "deep/er/b.JPG") == WHOLE[3]
    (tmp_path / "link").symlink_to(folder)
    assert name_in(tmp_path / "link", folder / WHOLE[0]) == WHOLE[0]
    assert name_in(folder, tmp_path / "else.png") == "../else.png"
    found = load_pictures([WHOLE[0], "cut.png", WHOLE[4], WHOLE[0]], Preprocessing(SIZE))
    assert found.paths == [WHOLE[0], WHOLE[4]] and list(found.damaged) == ["cut.png"]
    assert torch.equal(found.imgs[1], Preprocessing(SIZE).load(WHOLE[4]))


def test_an_index_of_features_alone_is_searched_by_its_pictures(folder, tmp_path):
    whole = index_folder(tmp_path / "whole", MODEL, folder).index
    GalleryIndex.create(tmp_path / "features", MODEL, maps=False)
    index = index_folder(tmp_path / "features", MODEL, folder).index
    again = EncodedAgain(MODEL, index, [folder / name for name in index.names])
    query, rows = whole[:2], np.array([[4, 2, 0], [1, -1, -1]])
    found = index.search(MODEL, query, maps=again, candidates=rows)
    expected = whole.search(MODEL, query, candidates=rows)
    assert found.names == expected.names
    torch.testing.assert_close(found.scores, expected.scores, equal_nan=True)
    torch.testing.assert_close(found.gallery_attention, expected.gallery_attention)
