"""The street: scenes without people, and the things that stand before a person."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from casn_plugin.pedestrians.cameras import Camera, Cover, Picture, Values
from casn_plugin.pedestrians.colours import BRIGHTS, LIGHTS, LINEAR, MUTED, Colour, rgb
from casn_plugin.pedestrians.surfaces import Tiles, noise_tiles, sample

Outline = Sequence[tuple[float, float]] | Float[np.ndarray, "corners 2"]

OCCLUDERS = {"person": 0.3, "pole": 0.2, "bollard": 0.15, "foliage": 0.2, "car": 0.15}
"""What stands before a person where something does, and the share of each."""

_SCENE_WIDTHS = 6
_SCENE_HEIGHTS = 1.5
_CAR_PAINTS = (0xC9CBCD, 0x1E2124, 0x6F757B, 0x8E1F24, 0x27406E, 0xE6E5E0, 0x4B5A50)
_CAR_BODY = ((0.0, 0.95), (0.0, 0.55), (0.08, 0.46), (0.45, 0.42), (0.8, 0.05), (1.7, 0.02),
             (2.15, 0.4), (2.5, 0.5), (2.55, 0.95))  # fmt: skip
_CAR_GLASS = ((0.58, 0.42), (0.86, 0.12), (1.22, 0.1), (1.22, 0.42), (1.3, 0.42), (1.3, 0.1),
              (1.66, 0.1), (1.98, 0.4))  # fmt: skip
_BIKE_FRAME = ((-0.26, 0.17), (-0.1, 0.42), (0.17, 0.44), (0.0, 0.17), (-0.1, 0.42), (0.0, 0.17),
               (-0.26, 0.17))  # fmt: skip


class _Brush(NamedTuple):
    """Draws on an RGB canvas in shares of `size`, right of and above (`x`, `y`)."""

    canvas: UInt8[np.ndarray, "h w 3"]
    rng: np.random.Generator
    x: float
    y: float
    size: float

    def at(self, right: float, up: float) -> tuple[int, int]:
        return int(self.x + right * self.size), int(self.y - up * self.size)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        corners = self.at(left, top), self.at(right, bottom)
        cv2.rectangle(self.canvas, *corners, colour, -1, cv2.LINE_AA)

    def disc(self, right: float, up: float, across: float, colour: Colour, flat: float = 1) -> None:
        axes = max(int(across * self.size), 1), max(int(flat * across * self.size), 1)
        centre = self.at(right, up)
        cv2.ellipse(self.canvas, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA)

    def shape(self, corners: Outline, colour: Colour, line: float = 0) -> None:
        """Draws a filled polygon, or an open line of that width."""
        points = np.array([self.at(right, up) for right, up in np.asarray(corners)], np.int32)
        if line:
            width = max(int(line * self.size), 1)
            cv2.polylines(self.canvas, [points], False, colour, width, cv2.LINE_AA)
        else:
            cv2.fillPoly(self.canvas, [points], colour, cv2.LINE_AA)

    def choose(self, codes: Sequence[int]) -> int:
        return int(self.rng.choice(codes))

    def foliage(self, right: float, up: float, radius: float, code: int) -> None:
        for _ in range(90):
            angle, far = self.rng.uniform(0, 2 * math.pi), math.sqrt(self.rng.random())
            dx, dy = far * math.cos(angle), far * math.sin(angle)
            value = 0.75 + 0.3 * dy + self.rng.uniform(-0.25, 0.25)
            leaf = radius * self.rng.uniform(0.06, 0.16)
            self.disc(right + radius * dx, up + 0.8 * radius * dy, leaf, rgb(code, value))

    def car(self) -> None:
        """Draws a car one high and 2.55 long, from its lower left corner."""
        shade = self.choose(_CAR_PAINTS)
        body, glass = (np.array(part) * (1, -1) + (0, 1) for part in (_CAR_BODY, _CAR_GLASS))
        self.disc(1.28, 0.0, 1.35, (30.0, 30.0, 32.0), 0.09)
        self.shape(body, rgb(shade))
        self.shape(body * (1.0, 0.35) + (0.0, 0.03), rgb(shade, 0.72))
        self.shape(glass, rgb(0x2A343C, self.rng.uniform(0.8, 1.6)))
        for wheel in (0.5, 2.05):
            self.disc(wheel, 0.14, 0.2, (22.0, 22.0, 24.0))
            self.disc(wheel, 0.14, 0.1, (130.0, 132.0, 136.0))


def _prop(brush: _Brush, kind: str) -> None:
    """Draws street furniture whose foot is at the brush; one size is a person's height."""
    if kind == "car":
        brush._replace(x=brush.x - brush.size, size=0.8 * brush.size).car()
        return
    brush.disc(0.0, 0.0, 0.2, (55.0, 54.0, 54.0), 0.2)
    if kind in {"post", "sign"}:
        shade = brush.choose((0x4A4D50, 0x8C9092, 0x2E4A3A))
        for half, value in ((0.03, 0.7), (0.018, 1.0), (0.006, 1.3)):
            brush.box(-half, 1.9, half, 0.0, rgb(shade, value))
    if kind == "sign":
        brush.box(-0.17, 1.15, 0.17, 0.72, rgb(0x33363A))
        brush.box(-0.15, 1.13, 0.15, 0.74, rgb(brush.choose(BRIGHTS + LIGHTS)))
        brush.box(-0.1, 1.05, 0.1, 1.0, rgb(0xF0F0F0))
    elif kind == "bin":
        shade = brush.choose((0x2F5A3A, 0x3C4044, 0x5D6A78))
        brush.box(-0.14, 0.5, 0.14, 0.0, rgb(shade, 0.75))
        brush.box(-0.1, 0.5, 0.02, 0.0, rgb(shade, 1.1))
        brush.box(-0.15, 0.56, 0.15, 0.49, rgb(shade, 0.5))
    elif kind == "bench":
        for rise in (0.5, 0.41, 0.27):
            wood = rgb(0x7A5636, brush.rng.uniform(0.8, 1.1))
            brush.box(-0.5, rise, 0.5, rise - 0.06, wood)
        for leg in (-0.42, 0.42):
            brush.box(leg - 0.02, 0.27, leg + 0.02, 0.0, rgb(0x333333))
    elif kind == "bike":
        ring = np.linspace(0, 2 * math.pi, 24)
        for hub in (-0.26, 0.26):
            wheel = np.stack([hub + 0.17 * np.cos(ring), 0.17 + 0.17 * np.sin(ring)], axis=1)
            brush.shape(wheel, (28.0, 28.0, 30.0), 0.02)
        enamel = rgb(brush.choose(BRIGHTS))
        brush.shape(_BIKE_FRAME, enamel, 0.022)
        brush.shape(((0.26, 0.17), (0.15, 0.52)), enamel, 0.022)
    elif kind == "tree":
        brush.box(-0.07, 1.9, 0.07, 0.0, rgb(0x4E4034, 0.8))
        brush.box(-0.05, 1.9, 0.0, 0.0, rgb(0x5E4E40, 1.1))
    elif kind == "bush":
        brush.foliage(0.0, 0.22, 0.32, 0x56733A)


def _ground(camera: Camera, tiles: Tiles, rows: int, columns: int, unit: int) -> Values:
    """Returns the brightness of the floor in perspective, from the foot of the wall down."""
    down = np.arange(rows, dtype=np.float32)[:, None]
    depth = 2.2 * unit / (down + 0.35 * unit)
    u = ((np.arange(columns, dtype=np.float32) - columns / 2) / unit + 0.1) * depth
    v = np.broadcast_to(depth * 1.3, u.shape)
    value = 1 + 0.05 * sample(tiles[2], u, v, 30.0) + 0.05 * sample(tiles[1], u, v, 160.0)
    if camera.ground in {"paving", "tiles"}:
        size = 0.35 if camera.ground == "paving" else 0.75
        value *= 1 + 0.05 * np.sin(np.floor(u / size) * 12.9 + np.floor(v / size) * 78.2)
        value *= 1 - 0.3 * (((u / size) % 1 < 0.05) | ((v / size) % 1 < 0.07))
    elif camera.ground == "grass":
        blades, patches = sample(tiles[1], 2 * u, 0.5 * v, 300.0), sample(tiles[2], u, v, 60.0)
        value += 0.16 * blades + 0.08 * patches
    elif camera.ground == "crossing":
        value *= 1 + 0.7 * ((u % 1.1 < 0.5) & (v > 0.9) & (v < 3.2))
    return value


def _wall(camera: Camera, tiles: Tiles, rows: int, columns: int, unit: int) -> Values:
    """Returns the brightness of what closes the scene behind the floor."""
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) / unit
    value = 1 + 0.05 * sample(tiles[2], x, y, 60.0) + 0.03 * sample(tiles[1], x, y, 250.0)
    if camera.wall == "brick":
        course = np.floor(y / 0.06)
        x += 0.08 * (course % 2)
        value *= 1 + 0.08 * np.sin(course * 37.7 + np.floor(x / 0.16) * 91.3)
        value *= 1 + 0.25 * ((y % 0.06 < 0.012) | (x % 0.16 < 0.015))
    elif camera.wall == "hedge":
        value += 0.3 * sample(tiles[1], x, y, 130.0) + 0.22 * sample(tiles[2], x, y, 80.0) - 0.25
    elif camera.wall in {"concrete", "door"}:
        value *= 1 - 0.2 * ((x % 0.9 < 0.015) | (y % 0.7 < 0.015))
    return np.maximum(value, 0.1)


def _bay(brush: _Brush, wall: str, top: float) -> None:
    """Draws a window, a door or a parked car at the foot of the wall, which is `top` high."""
    rng = brush.rng
    if wall == "shop":
        brush.box(-0.02, 0.86 * top, 0.72, 0.06, rgb(0x38342F))
        brush.box(0.0, 0.84 * top, 0.7, 0.08, rgb(0x7C8A94, rng.uniform(0.25, 0.6)))
        for _ in range(4):
            left, high = rng.uniform(0.05, 0.55), rng.uniform(0.15, 0.7) * top
            goods = brush.choose(BRIGHTS + LIGHTS + MUTED)
            brush.box(left, high, left + 0.12, 0.1, rgb(goods, 0.6))
    elif wall in {"brick", "door", "concrete"} and rng.random() < 0.6:
        door = wall == "door" or rng.random() < 0.3
        high, low = (0.87 * top, 0.0) if door else (top, 0.5 * top)
        wide = rng.uniform(0.3, 0.5)
        panel = brush.choose((0x3B3F45, 0x5A4636, 0x2F4A5C, 0x6D7378, 0x24282B))
        brush.box(-0.03, high + 0.03, wide + 0.03, low, rgb(0xB9B4AA))
        brush.box(0.0, high, wide, low, rgb(panel))
        brush.box(0.2 * wide, high - 0.1 * top, 0.8 * wide, (high + low) / 2.0, rgb(panel, 1.5))
    elif wall == "cars" and rng.random() < 0.75:
        brush._replace(y=brush.y + 0.1 * brush.size, size=0.36 * brush.size).car()


@lru_cache(maxsize=16)
def scene(seed: int, camera: Camera, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns what the camera sees without people, larger than a picture of that size."""
    tiles = noise_tiles(seed)
    rng = np.random.default_rng([seed, camera.number, 0x5CE0E])
    rows, columns = int(_SCENE_HEIGHTS * height), _SCENE_WIDTHS * width
    base = int((camera.wall_base + 0.25) * height)
    wall = _wall(camera, tiles, base, columns, height)[..., None] * rgb(camera.wall_colour)
    floor = _ground(camera, tiles, rows - base, columns, height)[..., None]
    surfaces = np.concatenate([wall, floor * rgb(camera.ground_colour)])
    canvas = np.ascontiguousarray(np.clip(surfaces, 0, 255).astype(np.uint8))
    brush = _Brush(canvas, rng, 0.0, base, height)
    for left in np.arange(0, columns / height, 0.85):
        shifted = brush._replace(x=height * (left + rng.uniform(0, 0.25)))
        _bay(shifted, camera.wall, base / height)
    brush.box(0.0, 0.02, columns / height, -0.02, rgb(0x3A3835))
    count = 2 * _SCENE_WIDTHS
    feet = np.sort(rng.uniform(base + 0.06 * height, 1.05 * height, count))
    places = rng.permutation(count) + rng.uniform(0, 0.8, count)
    for foot, place in zip(feet.tolist(), places.tolist(), strict=True):
        size = 0.35 * height + 0.5 * (foot - base)
        kind = camera.props[int(rng.integers(len(camera.props)))]
        _prop(_Brush(canvas, rng, place * width / 2, foot, size), kind)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) / height
    dapple = 1 + 0.13 * np.tanh(sample(tiles[2], x, y * 2, 50.0))
    lit = np.clip(canvas * dapple[..., None], 0, 255).astype(np.uint8)
    return np.asarray(cv2.GaussianBlur(lit, (0, 0), 0.004 * height), np.uint8)


def occlude(picture: Picture, kind: str, camera: Camera, rng: np.random.Generator) -> Cover:
    """Paints one of the `OCCLUDERS` but a person before everything and returns where it is."""
    height, width = picture.shape[:2]
    plate = np.zeros((height, width, 3), np.uint8)
    edge = float(rng.choice((rng.uniform(0.1, 0.42), rng.uniform(0.58, 0.9))))
    brush = _Brush(plate, rng, 0.0, height, width)
    tall = height / width
    if kind == "pole":
        half = rng.uniform(0.05, 0.12)
        shade = brush.choose((0x55585C, 0x8E9294, 0x5A4A3C, 0x2F4437))
        for share, value in ((1.0, 0.6), (0.7, 0.85), (0.35, 1.15)):
            left, right = edge - half * share, edge + 0.8 * half * share
            brush.box(left, tall, right, 0.0, rgb(shade, value))
    elif kind == "bollard":
        half, shade = rng.uniform(0.08, 0.15), brush.choose((0x6E7072, 0x303336, 0xB8A23A))
        middle, top = rng.uniform(0.25, 0.75), rng.uniform(0.2, 0.38) * tall
        for share, value in ((1.0, 0.65), (0.6, 1.0), (0.25, 1.2)):
            brush.disc(middle, top, half * share, rgb(shade, value), 0.5)
            brush.box(middle - half * share, top, middle + half * share, 0.0, rgb(shade, value))
        brush.box(middle - half, top - half, middle + half, top - 2.0 * half, (225.0, 225.0, 220.0))
    elif kind == "foliage":
        side = float(rng.integers(2))
        for _ in range(3):
            brush.foliage(side, rng.uniform(0.0, 0.65) * tall, rng.uniform(0.3, 0.5), 0x4F6B35)
    else:
        size, left = rng.uniform(0.3, 0.42) * height, rng.uniform(-1.2, 0.5) * width
        _Brush(plate, rng, left, height + 0.25 * size, size).car()
    front = np.asarray(plate.any(axis=2))
    light = np.float32(0.9 * (camera.sky[1] + 0.45 * camera.sun[1]))
    picture[front] = (LINEAR * light)[plate[front]]
    return front
