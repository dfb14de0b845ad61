"""Tests of the embedded data set."""

import inspect
import json
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from casn_plugin import data
from casn_plugin.data import (
    PedestrianSet,
    contact_sheet,
    load_pedestrians,
    mask_path,
    render_pedestrian,
)

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

    monkeypatch.setattr(data, "render_pedestrian", blank)
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
    data._scene.cache_clear()
    data._look.cache_clear()
    data._tiles.cache_clear()
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


def test_another_seed_pid_camera_or_index_gives_another_picture() -> None:
    size = {"height": 64, "width": 32}
    first = render_pedestrian(1, 0, 0, **size)[0]
    others = [
        render_pedestrian(1, 0, 0, seed=1, **size),
        render_pedestrian(2, 0, 0, **size),
        render_pedestrian(1, 1, 0, **size),
        render_pedestrian(1, 0, 1, **size),
    ]
    for image, _ in others:
        assert np.abs(image.astype(int) - first).mean() > 5


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


def test_the_mask_is_where_the_person_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Painting the person white changes the picture inside the mask and not outside."""
    quiet = [replace(camera, occlusion=0.0, noise=0.0, blur=0.0) for camera in data._CAMERAS]
    monkeypatch.setattr(data, "_CAMERAS", tuple(quiet))
    monkeypatch.setattr(data, "_pass", lambda *_, **__: None)
    plain, mask = render_pedestrian(4, 0, 0)
    stand = data._stand

    def invisible(*arguments: Any) -> Any:
        layer = stand(*arguments)
        layer.colour[:] = 4.0
        return layer

    monkeypatch.setattr(data, "_stand", invisible)
    changed = np.abs(render_pedestrian(4, 0, 0)[0].astype(int) - plain).sum(axis=2) > 60
    assert changed[cv2.erode(mask, np.ones((3, 3))) > 0].mean() > 0.95
    assert changed[cv2.dilate(mask, np.ones((5, 5))) == 0].mean() < 0.01
    assert (mask > 0).mean() > 0.1


@pytest.mark.parametrize("kind", ["person", "pole", "bollard", "foliage", "car"])
def test_occluders_are_not_in_the_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def masks(chance: float) -> np.ndarray:
        cameras = [replace(camera, occlusion=chance) for camera in data._CAMERAS]
        monkeypatch.setattr(data, "_CAMERAS", tuple(cameras))
        pictures = [render_pedestrian(6, 1, index, height=64, width=32) for index in range(8)]
        return np.stack([mask for _, mask in pictures]) > 0

    assert set(data._OCCLUDERS) == {"person", "pole", "bollard", "foliage", "car"}
    monkeypatch.setattr(data, "_OCCLUDERS", {kind: 1.0})
    free, hidden = masks(0.0), masks(1.0)
    assert not (hidden & ~free).any()
    assert hidden.sum() < 0.97 * free.sum()


def test_some_pictures_are_occluded_and_most_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    covered = []

    def occlude(picture: np.ndarray, *_: Any) -> np.ndarray:
        covered.append(1)
        return np.zeros(picture.shape[:2], bool)

    monkeypatch.setattr(data, "_occlude", occlude)
    monkeypatch.setattr(data, "_OCCLUDERS", {"pole": 1.0})
    for index in range(40):
        render_pedestrian(1, index % 4, index, height=32, width=16)
    assert 2 <= len(covered) <= 20


def test_cameras_differ_in_colour() -> None:
    size = {"height": 64, "width": 32}
    means = np.array(
        [
            np.mean(
                [render_pedestrian(pid, c, 0, **size)[0] for pid in range(1, 7)], axis=(0, 1, 2)
            )
            for c in range(len(data._CAMERAS))
        ]
    )
    chroma = means / means.sum(axis=1, keepdims=True)
    for one in range(len(means)):
        for other in range(one):
            apart = np.abs(means[one] - means[other]).max()
            assert apart > 8 or np.abs(chroma[one] - chroma[other]).max() > 0.01


def test_every_camera_has_its_viewpoint() -> None:
    headings = np.array(
        [[data._heading(0, pid, camid) for pid in range(1, 60)] for camid in range(6)]
    )
    facing = np.cos(np.radians(headings)).mean(axis=1)
    assert facing[0] > 0.5 and facing[1] < -0.5
    assert abs(facing[2]) < 0.35 and abs(facing[5]) < 0.35


def test_a_backpack_shows_from_behind_and_the_face_from_the_front() -> None:
    skin, bag = (0.5, 0.0, 0.0), (0.0, 0.5, 0.0)
    look = replace(
        data._look(0, 1), skin=skin, bag="backpack", bag_colour=bag, hair="short", hat="none"
    )

    def seen(degrees: float) -> tuple[int, int]:
        view = data._View(np.radians(degrees), 0.1, 230.0, (64.0, 245.0))
        rng = np.random.default_rng(0)
        layer = data._stand(look, data._CAMERAS[0], view, (256, 128), rng, data._tiles(0))
        red, green, blue = np.moveaxis(layer.colour, 2, 0)
        head = layer.nearness[:60] > -1e5
        return int(((red > 5 * green)[:60] & head).sum()), int((green > 5 * red + 5 * blue).sum())

    (face, straps), (nape, sack) = seen(0), seen(180)
    assert face > 2 * nape
    assert sack > 4 * straps > 0


def test_one_identity_in_four_is_a_look_alike() -> None:
    def differing(pid: int, other: int) -> int:
        one, two = data._look(0, pid), data._look(0, other)
        return sum(getattr(one, f.name) != getattr(two, f.name) for f in fields(one))

    for pid in range(1, 101):
        if pid % 4 == 3:
            assert data._twin_of(pid) == pid - 1
            assert differing(pid, pid - 1) <= 4
        else:
            assert data._twin_of(pid) is None
            assert differing(pid, pid + 4) > 8
    assert np.mean([differing(pid, pid - 1) > 0 for pid in range(3, 103, 4)]) > 0.9


def test_a_look_alike_never_crosses_from_train_to_test() -> None:
    assert data._twin_of(data.FIRST_TEST_PID) is None


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
def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    calls = []
    real = data.render_pedestrian

    def fails(*arguments: int, **size: int) -> Any:
        calls.append(arguments)
        if len(calls) == 7:
            assert len(list(tmp_path.iterdir())) == 1
            raise error("power cut")
        return real(*arguments, **size)

    monkeypatch.setattr(data, "render_pedestrian", fails)
    with pytest.raises(error, match="power cut"):
        load_pedestrians(tmp_path, **TINY)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find no folder, both render, the one that comes second takes the other's set."""
    barrier = threading.Barrier(2, timeout=20)
    render_all = data._render_all

    def together(*arguments: Any) -> None:
        barrier.wait()
        render_all(*arguments)

    monkeypatch.setattr(data, "_render_all", together)
    small = TINY | {"num_train_pids": 1, "num_test_pids": 1, "num_cameras": 2}
    found: list[PedestrianSet] = []
    threads = [
        threading.Thread(target=lambda: found.append(load_pedestrians(tmp_path, **small)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
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


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ((0, 0, 0), ValueError, "pid must be an integer of at least 1, got 0"),
        ((1, 6, 0), ValueError, "camid must be an integer from 0 to 5, got 6"),
        ((1, -1, 0), ValueError, "camid"),
        ((1, 0, -1), ValueError, "index"),
        ((1.0, 0, 0), TypeError, "pid must be .* got 1.0 of type float"),
    ],
)
def test_bad_arguments_of_a_picture(arguments: Any, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        render_pedestrian(*arguments)


@pytest.mark.usefixtures("unchecked")
def test_numpy_integers_are_welcome() -> None:
    one = render_pedestrian(np.int64(1), np.int64(2), np.int64(0), height=np.int32(32), width=16)  # type: ignore[arg-type]
    two = render_pedestrian(1, 2, 0, height=32, width=16)
    assert np.array_equal(one[0], two[0])


@pytest.mark.parametrize(("height", "width"), [(32, 16), (33, 47), (256, 128)])
def test_sizes(height: int, width: int) -> None:
    image, mask = render_pedestrian(2, 1, 0, height=height, width=width)
    assert image.shape == (height, width, 3) and image.dtype == np.uint8
    assert mask.shape == (height, width) and mask.dtype == np.uint8


@pytest.mark.parametrize("path", ["set/query/a.png", "set/masks/a.jpg", "a.jpg"])
def test_mask_path_refuses_what_is_no_image_of_the_set(path: str) -> None:
    with pytest.raises(ValueError, match=r"img_path must be a .jpg in .*got"):
        mask_path(path)


def test_contact_sheet_is_made_of_the_pictures() -> None:
    size = {"height": 32, "width": 16}
    sheet = contact_sheet([5, 9], num_cameras=2, images_per_camera=2, **size)
    assert sheet.shape == (2 * 32, 4 * 16, 3)
    assert np.array_equal(sheet[32:, 16:32], render_pedestrian(9, 0, 1, **size)[0])
    with pytest.raises(ValueError, match="at least one identity"):
        contact_sheet([])
    with pytest.raises(ValueError, match="num_cameras"):
        contact_sheet([1], num_cameras=7)


def test_the_module_needs_no_deep_learning() -> None:
    source = inspect.getsource(data)
    assert "torch" not in source and "matplotlib" not in source
