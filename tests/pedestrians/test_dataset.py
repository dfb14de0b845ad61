"""The set on disk: its lists, its files, its folder, and what happens when it is damaged."""

import json
import os
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from casn_plugin.pedestrians import (
    PedestrianSet,
    dataset,
    load_pedestrians,
    mask_path,
    render_pedestrian,
)
from casn_plugin.pedestrians.looks import look_of, twin_of
from casn_plugin.pedestrians.street import scene
from casn_plugin.pedestrians.surfaces import noise_tiles

TINY: dict[str, Any] = {
    "num_train_pids": 3,
    "num_test_pids": 2,
    "num_cameras": 3,
    "images_per_camera": 2,
    "height": 64,
    "width": 32,
    "progress": False,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(root: Path) -> PedestrianSet:
    return load_pedestrians(root, **TINY)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """Replaces the renderer by a blank picture and returns the list of what it was asked for."""
    asked = []

    def blank(pid: int, camid: int, index: int, **size: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append((pid, camid, index))
        shape = size["height"], size["width"]
        return np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.uint8)

    monkeypatch.setattr(dataset, "render_pedestrian", blank)
    yield asked


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read(path: str) -> np.ndarray:
    image = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image


def only_set(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


def test_same_arguments_give_the_same_bytes(
    tiny: PedestrianSet, root: Path, tmp_path: Path
) -> None:
    for cached in (scene, look_of, noise_tiles):
        cached.cache_clear()
    load_pedestrians(tmp_path, **TINY)
    assert contents(only_set(tmp_path)) == contents(only_set(root))


def test_an_image_does_not_depend_on_the_size_of_the_set(
    tiny: PedestrianSet, root: Path, tmp_path: Path
) -> None:
    smaller = TINY | {"num_train_pids": 1, "num_test_pids": 2, "num_cameras": 2}
    load_pedestrians(tmp_path, **smaller)
    large, small = contents(only_set(root)), contents(only_set(tmp_path))
    shared = [name for name in small if name != "manifest.json"]
    assert len(shared) == 2 * 3 * 2 * 2
    assert all(small[name] == large[name] for name in shared)


def test_the_rendered_picture_is_what_lies_on_disk(tiny: PedestrianSet) -> None:
    path, pid, camid = tiny.train[-1]
    image, mask = render_pedestrian(pid + 1, camid, 1, height=64, width=32)
    saved = read(path)[..., ::-1]
    assert np.abs(saved.astype(int) - image).mean() < 8
    assert np.array_equal(read(mask_path(path)), mask)


def test_lists_follow_the_re_id_conventions(tiny: PedestrianSet) -> None:
    assert [len(part) for part in tiny] == [3 * 3 * 2, 2 * 3, 2 * 3]
    assert sorted({pid for _, pid, _ in tiny.train}) == [0, 1, 2]
    assert {camid for _, _, camid in tiny.train} == {0, 1, 2}
    paths = [path for part in tiny for path, _, _ in part]
    assert len(set(paths)) == len(paths)
    for path, pid, camid in tiny.train:
        assert Path(path).name.startswith(f"{pid + 1:04d}_c{camid + 1}s1_")
    for path, pid, camid in tiny.query + tiny.gallery:
        assert Path(path).name.startswith(f"{pid:04d}_c{camid + 1}s1_")


def test_train_and_test_identities_are_disjoint(tiny: PedestrianSet) -> None:
    def named(part: list[tuple[str, int, int]]) -> set[str]:
        return {Path(path).name[:4] for path, _, _ in part}

    assert named(tiny.query) == named(tiny.gallery) == {"5001", "5002"}
    assert not named(tiny.train) & named(tiny.query)


def test_every_query_has_a_match_in_another_camera(tiny: PedestrianSet) -> None:
    for _, pid, camid in tiny.query:
        assert any(p == pid and c != camid for _, p, c in tiny.gallery)


def test_every_image_has_a_mask_of_its_size(tiny: PedestrianSet) -> None:
    shares = []
    for path, _, _ in (*tiny.train, *tiny.query, *tiny.gallery):
        image = read(path)
        mask = read(mask_path(path))
        assert image.shape == (64, 32, 3)
        assert mask.shape == (64, 32) and mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 255}
        shares.append(float(np.mean(mask > 0)))
    assert 0.12 < np.mean(shares) < 0.45
    assert min(shares) > 0.02


def test_a_look_alike_never_crosses_from_train_to_test() -> None:
    assert twin_of(dataset.FIRST_TEST_PID) is None


def test_the_second_call_renders_nothing(tmp_path: Path, quick: list[Any]) -> None:
    first = load_pedestrians(tmp_path, **TINY)
    assert len(quick) == 5 * 3 * 2
    assert load_pedestrians(tmp_path, **TINY) == first
    assert len(quick) == 5 * 3 * 2


def test_sets_of_other_parameters_get_their_own_folder(tmp_path: Path, quick: list[Any]) -> None:
    load_pedestrians(tmp_path, **TINY)
    for change in ({"seed": 3}, {"num_cameras": 2}, {"images_per_camera": 3}, {"height": 96}):
        load_pedestrians(tmp_path, **(TINY | change))
    assert len(list(tmp_path.iterdir())) == 5
    name = "pedestrians-v1-s0-3+2ids-3cams-2imgs-64x32"
    assert (tmp_path / name / "manifest.json").is_file()


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, quick: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("CASN_PLUGIN_CACHE", raising=False)
    seen = [load_pedestrians(**TINY)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    seen.append(load_pedestrians(**TINY))
    monkeypatch.setenv("CASN_PLUGIN_CACHE", str(tmp_path / "own"))
    seen.append(load_pedestrians(**TINY))
    parents = [Path(each.train[0][0]).parents[2] for each in seen]
    homes = "home/.cache/casn-plugin", "xdg/casn-plugin", "own"
    assert parents == [tmp_path / each for each in homes]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, error: type[BaseException]
) -> None:
    whole = load_pedestrians(tmp_path / "whole", **TINY)
    calls = []

    def fails(*arguments: int, **size: int) -> Any:
        calls.append(arguments)
        if len(calls) == 7:
            raise error("power cut")
        return render_pedestrian(*arguments, **size)

    monkeypatch.setattr(dataset, "render_pedestrian", fails)
    with pytest.raises(error, match="power cut"):
        load_pedestrians(tmp_path / "cut", **TINY)
    assert "6 of 30 pictures are kept" in capsys.readouterr().out
    resumed = load_pedestrians(tmp_path / "cut", **TINY)
    assert len(calls) == 30 + 1 and len(set(calls)) == 30
    assert [each.name for each in (tmp_path / "cut").iterdir()] == [
        each.name for each in (tmp_path / "whole").iterdir()
    ]
    for ours, theirs in zip(chain(*resumed), chain(*whole), strict=True):
        assert Path(ours[0]).read_bytes() == Path(theirs[0]).read_bytes()
        assert Path(mask_path(ours[0])).read_bytes() == Path(mask_path(theirs[0])).read_bytes()


def test_a_picture_that_was_cut_is_rendered_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while a picture is written: what is there under its name is whole."""
    replaced = []

    def killed(self: Path, target: Path) -> None:
        replaced.append(target)
        if len(replaced) == 10:  # the fifth picture, after its mask
            self.write_bytes(self.read_bytes()[:50])
            raise KeyboardInterrupt
        os.replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        load_pedestrians(tmp_path, **TINY)
    monkeypatch.undo()
    found = load_pedestrians(tmp_path, **TINY)
    assert all(read(path).shape == (64, 32, 3) for path, _, _ in chain(*found))
    assert not list(tmp_path.rglob("*.tmp"))


def test_of_two_runs_at_once_one_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find no folder; the second waits, and takes the first one's set."""
    barrier = threading.Barrier(2, timeout=20)
    calls = []

    def counted(*arguments: int, **size: int) -> Any:
        calls.append(arguments)
        return render_pedestrian(*arguments, **size)

    def load() -> None:
        barrier.wait()
        found.append(load_pedestrians(tmp_path, **small))

    monkeypatch.setattr(dataset, "render_pedestrian", counted)
    small = TINY | {"num_train_pids": 1, "num_test_pids": 1, "num_cameras": 2}
    found: list[PedestrianSet] = []
    threads = [threading.Thread(target=load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert len(calls) == len(set(calls)) == 8
    assert len(list(tmp_path.iterdir())) == 1


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def broken_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def foreign_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parameters"]["seed"] = 99
    (folder / "manifest.json").write_text(json.dumps(manifest))


def older_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))


def no_image(folder: Path) -> None:
    next((folder / "query").iterdir()).unlink()


def no_mask(folder: Path) -> None:
    next((folder / "masks").iterdir()).unlink()


def no_gallery(folder: Path) -> None:
    (folder / "bounding_box_test").rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (no_manifest, "no readable manifest"),
        (broken_manifest, "no readable manifest"),
        (foreign_manifest, "another set"),
        (older_manifest, "another set"),
        (no_image, "1 files missing"),
        (no_mask, "1 files missing"),
        (no_gallery, "6 files missing"),
    ],
)
def test_a_damaged_folder_is_refused(
    damage: Any, complaint: str, tmp_path: Path, quick: list[Any]
) -> None:
    load_pedestrians(tmp_path, **TINY)
    folder = only_set(tmp_path)
    damage(folder)
    with pytest.raises(RuntimeError, match=complaint) as caught:
        load_pedestrians(tmp_path, **TINY)
    assert str(folder) in str(caught.value) and "delete the folder" in str(caught.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_train_pids", 0, ValueError),
        ("num_train_pids", 5001, ValueError),
        ("num_test_pids", 5000, ValueError),
        ("num_cameras", 1, ValueError),
        ("num_cameras", 7, ValueError),
        ("images_per_camera", 1, ValueError),
        ("height", 31, ValueError),
        ("width", 15, ValueError),
        ("seed", -1, ValueError),
        ("seed", 0.5, TypeError),
        ("height", "128", TypeError),
        ("num_cameras", True, TypeError),
    ],
)
def test_bad_arguments_of_a_set(
    name: str, value: Any, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error, match=f"{name} must be an integer .*got {value!r}"):
        load_pedestrians(tmp_path, **(TINY | {name: value}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["set/query/a.png", "set/masks/a.jpg", "a.jpg"])
def test_mask_path_refuses_what_is_no_image_of_the_set(path: str) -> None:
    with pytest.raises(ValueError, match=r"img_path must be a .jpg in .*got"):
        mask_path(path)


def test_the_wing_needs_no_deep_learning() -> None:
    for path in Path(dataset.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert "torch" not in source and "matplotlib" not in source, path.name
