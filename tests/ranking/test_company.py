"""The index in company: other writers, readers, killed ones, and manifests that nobody wrote."""

import copy
import hashlib
import json
import os
import random
import stat

import pytest
import torch
from indexes import MODEL, Images, assert_tidy, files, head_sha256, snapshot
from safetensors.torch import load_file, save_file
from starting import start
from torch import nn
from torch.utils.data import DataLoader

from casn_plugin import CASN, Encoding, GalleryIndex
from casn_plugin.ranking.company import aside, locked


def encoding(n, seed=0) -> Encoding:
    """Returns images as the model's, which those that it encodes can follow."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.rand(n, 6, 6, 3, generator=generator)
    return Encoding(torch.rand(n, 6, generator=generator), basis=basis)


def three_shards(folder) -> GalleryIndex:
    """Three shards, one image removed."""
    index = GalleryIndex.create(folder, MODEL)
    for shard in range(3):
        index.add(encoding(4, shard), names=[f"{shard}{row}" for row in "abcd"])
    index.remove([1])
    return index


@pytest.fixture
def index(tmp_path) -> GalleryIndex:
    return three_shards(tmp_path / "index")


def test_adding_takes_in_what_another_has_changed(index):
    second, reader = GalleryIndex(index.folder), GalleryIndex(index.folder)
    before = reader.names, reader[:].maps.clone()
    index.add(encoding(2, 7), names=["x", "y"])
    index.remove([0, 1, 2, 3])
    second.add(encoding(1, 8), names=["z"])
    index.extend(MODEL, DataLoader(Images(2), 1))
    names = [*before[0][4:], "x", "y", "z", "img0.jpg", "img1.jpg"]
    assert index.names == GalleryIndex(index.folder).names == names
    assert (reader.names, reader[:].maps.tolist()) == (before[0], before[1].tolist())
    assert_tidy(index)


def test_removing_is_refused_after_a_change_of_another(index):
    second = GalleryIndex(index.folder)
    index.remove([0])
    before = snapshot(index.folder)
    with pytest.raises(ValueError, match="has been changed by another process: open it anew"):
        second.remove([1])
    assert snapshot(index.folder) == before and len(second) == 11


@pytest.mark.parametrize("how", ["another model", "8 bits", "features alone"])
def test_an_index_made_anew_is_not_added_to(index, how):
    (index.folder / "index.json").unlink()
    torch.manual_seed(5)
    other = copy.deepcopy(MODEL)
    if how == "another model":
        nn.init.normal_(other.pair_classifier[0].weight)
    dtype = torch.int8 if how == "8 bits" else None
    GalleryIndex.create(index.folder, other, dtype=dtype, maps=how != "features alone")
    for change in (
        lambda: index.add(encoding(1)),
        lambda: index.extend(MODEL, DataLoader(Images(2, fail_at=0), 1)),  # before any work
    ):
        with pytest.raises(ValueError, match="open it anew"):
            change()


def test_images_without_names_are_renumbered(index, monkeypatch):
    """Another process adds while this one encodes: no number is given twice."""
    second, genuine = GalleryIndex(index.folder), CASN.encode

    def encode(self, imgs):
        monkeypatch.setattr(CASN, "encode", genuine)
        second.add(encoding(2, 9))  # not kept waiting
        return genuine(self, imgs)

    monkeypatch.setattr(CASN, "encode", encode)
    data = Images(3, labels=False)
    index.extend(MODEL, DataLoader(data, 1), shard_size=2)
    assert index.names[11:] == ["12", "13", "14", "15", "16"]
    torch.testing.assert_close(index[13:].maps, MODEL.encode(data.imgs).maps)
    assert_tidy(GalleryIndex(index.folder))


def test_who_waits_too_long_is_told(index):
    waiting = GalleryIndex(index.folder, timeout=0.1)
    before = snapshot(index.folder)
    with locked(index.folder, 1.0):
        assert GalleryIndex(index.folder).names == index.names  # readers need no lock
        for change in (
            lambda: waiting.add(encoding(1)),
            lambda: waiting.extend(MODEL, DataLoader(Images(2), 1)),
            lambda: waiting.remove([0]),
        ):
            with pytest.raises(TimeoutError, match=f"another process .*{index.folder}.* 0.1 s"):
                change()
    assert snapshot(index.folder) == before
    with pytest.raises(ValueError, match="timeout must be >= 0"):
        GalleryIndex(index.folder, timeout=-1.0)


def test_what_lives_is_not_tidied(index):
    with locked(index.folder, 1.0):
        place = aside(index.folder)
        path = place.__enter__()
    (path / "shard").write_bytes(b"being written")
    index.remove([0])
    assert (path / "shard").read_bytes() == b"being written"
    place.__exit__(None, None, None)
    assert_tidy(index)


def test_two_writers_lose_nothing(tmp_path):
    """20 runs of each: add three, extend by three, remove one; a reader looks on."""
    torch.manual_seed(0)
    model = CASN(
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=8)), hidden_dim=8, input_size=(48, 24),
        forward=lambda net, imgs: (None, net(imgs).mean((2, 3))),
    )  # fmt: skip
    GalleryIndex.create(tmp_path, model)
    writers = [start("write_together", tmp_path, rank) for rank in range(2)]
    opened = 0
    while any(writer.poll() is None for writer in writers):
        reader = GalleryIndex(tmp_path)
        if len(reader):
            assert len(reader[:]) == len(reader)
        opened += 1
    for writer in writers:
        output, errors = writer.communicate(timeout=60)
        assert (writer.returncode, output) == (0, "done\n"), errors
    index = GalleryIndex(tmp_path)
    assert len(index) == len(set(index.names)) == 2 * 20 * (2 + 3) and opened
    expected = {f"{rank}-{run}-{row}" for rank in (0, 1) for run in range(20) for row in (0, 1)}
    assert expected <= set(index.names)
    for row, name in enumerate(index.names):
        if "-" in name:
            rank, run, _ = map(int, name.split("-"))
            assert (index.camids[row], index.pids[row]) == (rank, run)
    assert_tidy(index)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        index = three_shards(tmp_path / "index")
        index.extend(MODEL, DataLoader(Images(2), 1))
    finally:
        os.umask(before)
    for name in files(index.folder):
        assert stat.S_IMODE((index.folder / name).stat().st_mode) == 0o666 & ~umask, name


def test_names_that_are_taken(index, unchecked):
    before = snapshot(index.folder)
    images = encoding(3, 5)
    with pytest.raises(ValueError, match="'0c' is there already"):
        index.add(images, names=["new", "0c", "0d"])
    with pytest.raises(ValueError, match="'new' is there already"):
        index.add(images, names=["new", "other", "new"])
    with pytest.raises(ValueError, match="duplicates must be .refuse. or .skip., got .ignore."):
        index.add(images, names=["a", "b", "c"], duplicates="ignore")
    assert snapshot(index.folder) == before
    index.add(images, names=["new", "0c", "new"], pids=[1, 2, 3], duplicates="skip")
    assert index.names[11:] == ["new"] and index.pids[11:].tolist() == [1]
    assert torch.equal(index[11:].maps, images.maps[:1])
    index.add(images, names=["new", "0c", "0d"], duplicates="skip")
    assert len(index) == 12
    assert_tidy(index)
    index.add(images[:1], names=[str(len(index) + 6)])
    with pytest.raises(ValueError, match="numbered, but one is named '18' already: give names"):
        index.add(images, duplicates="skip")


def test_extending_twice(index, monkeypatch):
    loader = DataLoader(Images(5), 2)
    index.extend(MODEL, loader)
    before = snapshot(index.folder)
    calls, genuine = [], CASN.encode
    monkeypatch.setattr(CASN, "encode", lambda *given: calls.append(1) or genuine(*given))
    with pytest.raises(ValueError, match=r"'img0.jpg' is there already"):
        index.extend(MODEL, loader)
    index.extend(MODEL, loader, duplicates="skip")
    assert snapshot(index.folder) == before and not calls  # nothing is encoded for nothing
    index.extend(MODEL, DataLoader(Images(7), 3), duplicates="skip")
    assert index.names[-2:] == ["img5.jpg", "img6.jpg"] and index.pids[-2:].tolist() == [2, 3]
    torch.testing.assert_close(index[-2:].maps, MODEL.encode(Images(7).imgs[5:]).maps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", ["features", "maps"])
def test_what_is_not_finite_is_refused(index, what, value):
    before = snapshot(index.folder)
    images = encoding(2)
    getattr(images, what).view(-1)[3] = value
    with pytest.raises(ValueError, match=f"{what} must be finite, but 1 of .* are not"):
        index.add(images)
    assert snapshot(index.folder) == before


def forge(folder, content):
    """Writes a manifest with a checksum that fits."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    (folder / "index.json").write_text(json.dumps({**content, "checksum": checksum}))


@pytest.mark.parametrize("name", [
    "../{}", "a/../../{}", "./{}", "{}/", "/etc/passwd", "..", "", "\\..\\{}", "{}\n", "{}\0",
    "../index/{}", "index.json", "notes.safetensors", "C:{}", "~/{}",
])  # fmt: skip
def test_no_path_leads_out_of_the_folder(index, name):
    content = json.loads((index.folder / "index.json").read_text())
    file = content["shards"][0]["file"]
    (index.folder.parent / file).write_bytes((index.folder / file).read_bytes())
    content["shards"][0]["file"] = name.format(file)
    forge(index.folder, content)
    with pytest.raises(ValueError, match=r"index\.json is damaged: file is"):
        GalleryIndex(index.folder)


def test_links_are_not_followed(index):
    """An index is read from its folder alone, whatever the checksums say."""
    for name in ("index.json", next(index.folder.glob("*.safetensors")).name):
        other = index.folder.parent / name
        (index.folder / name).rename(other)
        (index.folder / name).symlink_to(other)
        for verify in (True, False):
            with pytest.raises(ValueError, match=f"{name} is a link: expected the file itself"):
                GalleryIndex(index.folder, verify=verify)
        other.replace(index.folder / name)
    assert len(GalleryIndex(index.folder)) == 11


def test_no_row_counts_twice(index):
    """But an image that was removed may be added again, which gives the same file."""
    content = json.loads((index.folder / "index.json").read_text())
    first, *others = content["shards"]
    for removed in ([], [0], [1], [0, 2, 3]):
        again = {**first, "removed": removed}
        forge(index.folder, {**content, "added": 99, "shards": [first, *others, again]})
        if removed == [0, 2, 3]:
            assert GalleryIndex(index.folder).names[-1] == "0b"
            continue
        with pytest.raises(ValueError, match=r"index\.json is damaged: removed is .* rows that"):
            GalleryIndex(index.folder)
    thrice = [first, *others, {**first, "removed": [0, 2, 3]}, {**first, "removed": [1]}]
    forge(index.folder, {**content, "added": 99, "shards": thrice})
    with pytest.raises(ValueError, match=r"index\.json is damaged: removed is .* rows that"):
        GalleryIndex(index.folder)
    forge(index.folder, {**content, "added": 99, "shards": thrice[:-1]})
    index = GalleryIndex(index.folder)
    images = encoding(4)
    index.remove([0, 1])
    index.add(images, names=[f"0{row}" for row in "abcd"], duplicates="skip")
    index.remove([0])
    index.add(images, names=[f"0{row}" for row in "abcd"], duplicates="skip")
    assert sorted(GalleryIndex(index.folder).names) == sorted(index.names)
    assert len(set(index.names)) == len(index.names) == 12


WRONG = [
    None, True, False, -1, 0, 1, 3, 10**9, 10**30, 1.0, 0.5, float("nan"), float("inf"), "", "x",
    "../x", "float32", "int64", "float99", "a" * 64, [], [0], [0, 0], [1.5], [-1], [10**30],
    ["a"], [None], {}, {"a": 1}, [[]], [{}], ["float32", -6], ["float32", 6, 3, 6], "é\ud800",
]  # fmt: skip


def places(value, path=()):
    """Yields the path of every value within another."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items if isinstance(value, (dict, list)) else ():
        yield from places(each, (*path, key)) if isinstance(each, (dict, list)) else [(*path, key)]


def test_manifests_that_nobody_wrote(index, tmp_path):
    """Each value in turn by each wrong one, and left out; then two at a time by chance."""
    genuine = json.loads((index.folder / "index.json").read_text())
    maps = {f"{i}{row}": encoding(4, i).maps[j] for i in range(3) for j, row in enumerate("abcd")}
    every = [path for path in places(genuine) if path]
    chance = random.Random(0)
    cases = [[(path, wrong)] for path in every for wrong in ("left out", *WRONG)]
    cases = chance.sample(cases, 500)
    cases += [[(chance.choice(every), chance.choice(WRONG)) for _ in range(2)] for _ in range(200)]
    refused = 0
    for case in cases:
        content = copy.deepcopy(genuine)
        for path, wrong in case:
            owner = content
            try:
                for key in path[:-1]:
                    owner = owner[key]
                if wrong == "left out":
                    del owner[path[-1]]
                else:
                    owner[path[-1]] = wrong
            except (KeyError, IndexError, TypeError):
                continue
        forge(index.folder, content)
        try:
            opened = GalleryIndex(index.folder)
        except ValueError as error:
            refused += 1
            assert str(index.folder) in str(error), case
            continue
        for name, each in zip(opened.names, opened[:].maps, strict=True):
            assert torch.equal(each, maps[name]), case
    assert refused > 0.9 * len(cases)


def test_shards_that_nobody_wrote(index):
    """Their heads' checksums fit, so that only what is in them can tell."""
    genuine = json.loads((index.folder / "index.json").read_text())
    path = index.folder / genuine["shards"][1]["file"]
    good, whole = load_file(path), path.read_bytes()
    names = [
        torch.frombuffer(bytearray(each, "utf-8"), dtype=torch.uint8)
        for each in (" ", "{}", "3", "null", '"abcd"', "[1,2,3,4]", '["a"]', "[" * 99999)
    ]
    wrong = [{"names": each} for each in names]
    for name, tensor in good.items():
        wrong += [{name: other} for other in (
            tensor[:3].clone(), tensor[0].clone(), tensor[None], tensor.half(), tensor.double(),
            tensor.int(), tensor.bool(), torch.tensor(1.0), torch.empty(0), torch.empty(4, 0),
        )]  # fmt: skip
    wrong += [{"pids": torch.full((4,), -2)}]

    def refit(changed):
        save_file({**good, **changed}, path)
        content = copy.deepcopy(genuine)
        content["shards"][1]["sha256"] = head_sha256(path)
        forge(index.folder, content)

    for changed in wrong:
        refit(changed)
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            GalleryIndex(index.folder)
    for part in ("features", "maps"):  # values that are not those of the checksums
        refit({part: good[part] + 1})
        opened = GalleryIndex(index.folder)
        with pytest.raises(ValueError, match=f"{path.name} is damaged: the {part} of the image"):
            opened[:]
    refit({})
    assert GalleryIndex(index.folder)[3:7].maps.tolist() == encoding(4, 1).maps.tolist()
    assert path.read_bytes() == whole
    chance = random.Random(1)
    for _ in range(300):  # anything at all
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for verify in (True, False):
            try:
                GalleryIndex(index.folder, verify=verify)[:]
            except ValueError as error:
                assert path.name in str(error)
            else:
                assert not verify or path.read_bytes() == whole
