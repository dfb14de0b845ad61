"""Pictures: what depends on what, the mask, what stands before a person, bad arguments."""

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from casn_plugin.pedestrians import contact_sheet, picture, render_pedestrian
from casn_plugin.pedestrians.body import stand
from casn_plugin.pedestrians.cameras import CAMERAS
from casn_plugin.pedestrians.street import OCCLUDERS

# pid, camid, index, seed; pixels of the mask; mean colour within and without. Someone behind the
# last one, something else before each of the others.
KNOWN = (
    ((5001, 0, 0, 3), 682, (137.2, 128.7, 116.5), (124.9, 103.3, 89.2)),
    ((8, 1, 3, 0), 366, (102.5, 124.1, 149.4), (75.5, 88.0, 93.2)),
    ((5087, 2, 2, 0), 322, (116.2, 124.4, 100.0), (82.4, 97.3, 62.8)),
    ((34, 3, 1, 0), 535, (96.1, 75.9, 59.3), (69.5, 66.4, 55.2)),
    ((5059, 4, 2, 0), 643, (125.5, 120.6, 122.6), (126.2, 137.3, 130.8)),
    ((54, 5, 1, 0), 713, (68.5, 61.9, 61.0), (100.3, 94.6, 102.8)),
)


@pytest.mark.parametrize(("which", "pixels", "person", "street"), KNOWN)
def test_pictures_of_a_format_version_stay_what_they_are(
    which: tuple[int, int, int, int],
    pixels: int,
    person: tuple[float, float, float],
    street: tuple[float, float, float],
) -> None:
    """Cached sets are told apart by FORMAT_VERSION alone: other pictures need another version.

    Bytes differ between releases of NumPy and OpenCV, by one grey level at most where measured.
    """
    *shot, seed = which
    image, mask = render_pedestrian(*shot, seed=seed, height=64, width=32)
    assert abs(int((mask > 0).sum()) - pixels) <= 4
    assert image[mask > 0].mean(axis=0) == pytest.approx(person, abs=0.6)
    assert image[mask == 0].mean(axis=0) == pytest.approx(street, abs=0.6)


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


def test_the_mask_is_where_the_person_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Painting the person white changes the picture inside the mask and not outside."""
    quiet = replace(CAMERAS[0], occlusion=0.0, passers=0.0, noise=0.0, blur=0.0)
    size = {"seed": 0, "height": 128, "width": 64}
    plain, mask = picture.photograph(4, quiet, 0, **size)

    def invisible(*arguments: Any) -> Any:
        layer = stand(*arguments)
        layer.colour[:] = 4.0
        return layer

    monkeypatch.setattr(picture, "stand", invisible)
    white, _ = picture.photograph(4, quiet, 0, **size)
    changed = np.abs(white.astype(int) - plain).sum(axis=2) > 60
    assert changed[cv2.erode(mask, np.ones((3, 3))) > 0].mean() > 0.95
    assert changed[cv2.dilate(mask, np.ones((5, 5))) == 0].mean() < 0.01
    assert (mask > 0).mean() > 0.1


@pytest.mark.parametrize("kind", ["person", "pole", "bollard", "foliage", "car"])
def test_occluders_are_not_in_the_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def masks(chance: float) -> np.ndarray:
        camera, size = replace(CAMERAS[1], occlusion=chance), {"seed": 0, "height": 64, "width": 32}
        pictures = [picture.photograph(6, camera, index, **size) for index in range(8)]
        return np.stack([mask for _, mask in pictures]) > 0

    assert set(OCCLUDERS) == {"person", "pole", "bollard", "foliage", "car"}
    monkeypatch.setattr(picture, "OCCLUDERS", {kind: 1.0})
    free, hidden = masks(0.0), masks(1.0)
    assert not (hidden & ~free).any()
    assert hidden.sum() < 0.97 * free.sum()


def test_some_pictures_are_occluded_and_most_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    covered = []

    def occlude(canvas: np.ndarray, *_: Any) -> np.ndarray:
        covered.append(1)
        return np.zeros(canvas.shape[:2], bool)

    monkeypatch.setattr(picture, "occlude", occlude)
    monkeypatch.setattr(picture, "OCCLUDERS", {"pole": 1.0})
    for index in range(40):
        render_pedestrian(1, index % 4, index, height=32, width=16)
    assert 2 <= len(covered) <= 20


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


def test_contact_sheet_is_made_of_the_pictures() -> None:
    size = {"height": 32, "width": 16}
    sheet = contact_sheet([5, 9], num_cameras=2, images_per_camera=2, **size)
    assert sheet.shape == (2 * 32, 4 * 16, 3)
    assert np.array_equal(sheet[32:, 16:32], render_pedestrian(9, 0, 1, **size)[0])
    with pytest.raises(ValueError, match="at least one identity"):
        contact_sheet([])
    with pytest.raises(ValueError, match="num_cameras"):
        contact_sheet([1], num_cameras=7)
