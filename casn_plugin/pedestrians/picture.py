"""A picture: the street, its people from the back to the front, and the mask of the one meant."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import UInt8

from casn_plugin.pedestrians.body import stand
from casn_plugin.pedestrians.cameras import CAMERAS, Camera, Cover, Picture, Values, View
from casn_plugin.pedestrians.colours import LINEAR
from casn_plugin.pedestrians.looks import look_of, pick
from casn_plugin.pedestrians.street import OCCLUDERS, occlude, scene
from casn_plugin.pedestrians.surfaces import noise_tiles

_OVERSAMPLING = 2
_FIRST_PASSER = 100_000


def _backdrop(
    camera: Camera,
    foot: float,
    zoom: float,
    shape: tuple[int, int],
    rng: np.random.Generator,
    seed: int,
) -> Picture:
    """Returns the part of the street behind a person whose foot is in that row."""
    rows, columns = shape
    street = scene(seed, camera, rows, columns)
    magnify = zoom * rng.uniform(0.95, 1.2)
    left = rng.uniform(0, street.shape[1] - columns / min(magnify, 1.0) - 1)
    warp = np.array(
        [[magnify, 0, -left * magnify], [0, magnify, foot - 1.2 * rows * magnify]], np.float32
    )
    crop = cv2.warpAffine(street, warp, (columns, rows), borderMode=cv2.BORDER_REFLECT)
    light = np.float32(camera.sky[1] + 0.55 * camera.sun[1])
    return np.asarray(cv2.LUT(crop, LINEAR * light), np.float32)


def _pass(
    picture: Picture,
    camera: Camera,
    view: View,
    rng: np.random.Generator,
    seed: int,
    behind: bool,
) -> Cover:
    """Paints a passer-by beside the person, behind or in front, and returns where."""
    height, width = picture.shape[:2]
    near = rng.uniform(0.62, 0.85) if behind else rng.uniform(1.02, 1.15)
    aside = float(rng.choice((-1, 1))) * rng.uniform(0.32, 0.5) * width
    yaw = math.radians(camera.yaw + rng.choice((0.0, 180.0)) + rng.normal(0, 30))
    foot = (view.foot[0] + aside, view.foot[1] + (near - 1) * 0.35 * height)
    look = look_of(seed, _FIRST_PASSER + int(rng.integers(10_000)))
    view = View(yaw, view.pitch, view.scale * near, foot)
    return stand(look, camera, view, (height, width), rng, noise_tiles(seed)).lay_over(picture)


def _shadow(picture: Picture, cover: Cover, camera: Camera, foot: tuple[float, float]) -> None:
    """Darkens the ground where the person stands and where the sun does not reach."""
    height, width = cover.shape
    sunny = camera.sun[0] / (camera.sun[0] + camera.sky[0])
    fall, shear = 0.12 + 0.25 * camera.light[2], -1.1 * camera.light[0]
    warp = np.array([[1, -shear, shear * foot[1]], [0, fall, foot[1] * (1 - fall)]], np.float32)
    cast = cv2.warpAffine(cover.astype(np.float32), warp, (width, height))
    cast = cv2.GaussianBlur(cast, (0, 0), 0.012 * height)
    contact: Values = np.zeros((height, width), np.float32)
    axes = int(0.096 * height), int(0.022 * height)
    cv2.ellipse(contact, (int(foot[0]), int(foot[1])), axes, 0, 0, 360, (1.0,), -1)
    contact = cv2.GaussianBlur(contact, (0, 0), 0.015 * height)
    dark = (1 - 0.75 * sunny * cast) * (1 - 0.5 * contact)
    picture *= dark[..., None]


def photograph(
    pid: int, camera: Camera, index: int, *, seed: int, height: int, width: int
) -> tuple[UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """Returns what `render_pedestrian` does, for any camera and without a look at the numbers."""
    rng = np.random.default_rng([seed, pid, camera.number, index])
    shape = _OVERSAMPLING * height, _OVERSAMPLING * width
    view, zoom = camera.frame(seed, pid, rng, shape)
    picture = _backdrop(camera, view.foot[1], zoom, shape, rng, seed)
    person = stand(look_of(seed, pid), camera, view, shape, rng, noise_tiles(seed))
    _shadow(picture, person.cover, camera, view.foot)
    if rng.random() < camera.passers:
        _pass(picture, camera, view, rng, seed, behind=True)
    visible = person.lay_over(picture)
    if rng.random() < camera.occlusion:
        kind = pick(rng, OCCLUDERS)
        if kind == "person":
            visible &= ~_pass(picture, camera, view, rng, seed, behind=False)
        else:
            visible &= ~occlude(picture, kind, camera, rng)
    share = cv2.resize(
        visible.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_AREA
    )
    mask = np.where(share > 127, 255, 0).astype(np.uint8)
    return camera.record(picture, rng, height, width), mask


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises TypeError or ValueError unless the argument of that name is an integer in range."""
    wanted = (
        f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    )
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be {wanted}, got {value}")


def render_pedestrian(
    pid: int, camid: int, index: int, *, seed: int = 0, height: int = 128, width: int = 64
) -> tuple[UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"]]:
    """Returns one RGB picture and the mask of the person in it.

    The picture depends on the arguments only, never on what was rendered before.

    Args:
        pid: The identity, from 1; one in four is a look-alike of the identity before it.
        camid: The camera, from 0 to 5.
        index: Which of the person's pictures from that camera, from 0.
        seed: Chooses the people and the scenes, from 0.
        height: Height of the picture in pixels, at least 32.
        width: Width of the picture in pixels, at least 16.

    Returns:
        The picture (height, width, 3) in 0..255 and the mask (height, width), 255 where the person
        is seen, 0 elsewhere, whatever stands in front of the person included.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If an argument is out of its range.

    Example:
        >>> picture, mask = render_pedestrian(1, 0, 0, height=64, width=32)
        >>> picture.shape, mask.shape, set(mask.flat) == {0, 255}
        ((64, 32, 3), (64, 32), True)
    """
    check_integer("pid", pid, 1)
    check_integer("camid", camid, 0, len(CAMERAS) - 1)
    check_integer("index", index, 0)
    check_integer("seed", seed, 0)
    check_integer("height", height, 32)
    check_integer("width", width, 16)
    return photograph(pid, CAMERAS[camid], index, seed=seed, height=height, width=width)


def contact_sheet(
    pids: Sequence[int] = tuple(range(1, 9)),
    *,
    num_cameras: int = len(CAMERAS),
    images_per_camera: int = 1,
    seed: int = 0,
    height: int = 128,
    width: int = 64,
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Returns an RGB picture of all pictures: one row an identity, the cameras side by side.

    Args:
        pids: The identities, as for `render_pedestrian`.
        num_cameras: How many cameras, from 1 to 6.
        images_per_camera: How many pictures of an identity from every camera, at least 1.
        seed: Chooses the people and the scenes, from 0.
        height: Height of one picture in pixels, at least 32.
        width: Width of one picture in pixels, at least 16.

    Returns:
        The sheet (len(pids) * height, num_cameras * images_per_camera * width, 3) in 0..255.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If an argument is out of its range or `pids` is empty.

    Example:
        >>> contact_sheet([1, 2], num_cameras=3, height=32, width=16).shape
        (64, 48, 3)
    """
    check_integer("num_cameras", num_cameras, 1, len(CAMERAS))
    check_integer("images_per_camera", images_per_camera, 1)
    if not len(pids):
        raise ValueError("pids must hold at least one identity, got none")
    rows = [
        [
            render_pedestrian(pid, camid, index, seed=seed, height=height, width=width)[0]
            for camid in range(num_cameras)
            for index in range(images_per_camera)
        ]
        for pid in pids
    ]
    return np.vstack([np.hstack(row) for row in rows])
