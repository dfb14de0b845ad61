"""The embedded data set: rendered pedestrians, made once and kept in a cache folder.

Every identity is a set of attributes (build, hair, clothes, bag ...), every camera a viewpoint with
its own light, colours and street scene. A picture is ray-cast from about twenty-five tapered solids
posed in a walk, lit, laid over a crop of the scene and passed through the camera's response.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from tqdm import tqdm

__all__ = ["PedestrianSet", "contact_sheet", "load_pedestrians", "mask_path", "render_pedestrian"]

FORMAT_VERSION = 1
FIRST_TEST_PID = 5001
"""Test identities are numbered from here, so that neither half depends on the other's size."""

_OVERSAMPLING = 2
_SCENE_WIDTHS = 6
_SCENE_HEIGHTS = 1.5
_FIRST_PASSER = 100_000
_OCCLUDERS = {"person": 0.3, "pole": 0.2, "bollard": 0.15, "foliage": 0.2, "car": 0.15}

Colour = tuple[float, float, float]
Record = tuple[str, int, int]
Point = tuple[float, float, float]
Widths = Float[np.ndarray, " steps"]
Profile = Sequence[float] | Float[np.ndarray, " given"]
Outline = Sequence[tuple[float, float]] | Float[np.ndarray, "corners 2"]
Pixels = Float32[np.ndarray, " n"]
Albedo = Float32[np.ndarray, "n 3"]
Tile = Float32[np.ndarray, "tile tile"]
Tiles = Float32[np.ndarray, "3 tile tile"]
Surface = Float32[np.ndarray, "*points"]
Paint = Callable[[Pixels, Pixels, Pixels], Albedo]
Picture = Float32[np.ndarray, "h w 3"]
Values = Float32[np.ndarray, "h w"]
Cover = Bool[np.ndarray, "h w"]


class PedestrianSet(NamedTuple):
    """The three lists of a re-identification data set, each of (image path, pid, camid).

    Attributes:
        train: Pictures to learn from; pids are relabelled 0..n-1.
        query: One picture per test identity and camera; pids are those of the file names.
        gallery: All other pictures of the test identities.
    """

    train: list[Record]
    query: list[Record]
    gallery: list[Record]


# --- identities ---------------------------------------------------------------------------------


class _Cloth(NamedTuple):
    texture: str
    colour: Colour
    second: Colour
    scale: float


@dataclass(frozen=True)
class _Look:
    """What stays the same about a person from picture to picture; lengths in body heights."""

    stature: float
    weight: float
    shoulders: float
    hips: float
    skin: Colour
    hair: str
    hair_colour: Colour
    beard: bool
    glasses: bool
    hat: str
    hat_colour: Colour
    upper: str
    top: _Cloth
    contrast_sleeves: bool
    lower: str
    bottom: _Cloth
    shoes: Colour
    boots: bool
    bag: str
    bag_colour: Colour


def _linear(code: int) -> Colour:
    """Returns a 0xRRGGBB colour as linear light in [0, 1]."""
    red, green, blue = (((code >> shift & 255) / 255) ** 2.2 for shift in (16, 8, 0))
    return red, green, blue


_SKINS = (0xE2B698, 0xD8A684, 0xCF9870, 0xB07A50, 0x7D5236, 0x553622)
_HAIRS = (0x15110F, 0x1E1713, 0x2E2119, 0x4A3222, 0x75502E, 0xB08A52, 0x8C3F22, 0x9A9894)
_DARKS = (0x17181A, 0x1B1D24, 0x24304C, 0x333538, 0x3A2C24, 0x26301F)
_MUTED = (0x565A5E, 0x84878A, 0x6B5F50, 0x8A7658, 0xB9A888, 0x54624A, 0x4C5F7A, 0x6C2F34)
_LIGHTS = (0xDEDCD7, 0xD0CCC0, 0xB9BBBD, 0xD2BFC8, 0xAEC1D2)
_BRIGHTS = (
    0xA8262E,
    0xC24A38,
    0x2C4C8C,
    0x4A86B4,
    0x2F7350,
    0xCFA540,
    0xBE5A86,
    0x66447F,
    0x3F958F,
)
_DENIMS = (0x2B3750, 0x3D5275, 0x5A76A0, 0x7F98B8)


def _times(colour: Colour, value: float) -> Colour:
    return colour[0] * value, colour[1] * value, colour[2] * value


def _pick(rng: np.random.Generator, options: dict[str, float]) -> str:
    weights = np.fromiter(options.values(), float)
    return str(rng.choice(list(options), p=weights / weights.sum()))


def _dye(rng: np.random.Generator, shares: Sequence[tuple[Sequence[int], float]]) -> Colour:
    """Returns a colour from one of the palettes, a little off the swatch."""
    weights = np.array([share for _, share in shares])
    palette = shares[int(rng.choice(len(shares), p=weights / weights.sum()))][0]
    red, green, blue = _linear(int(rng.choice(palette)))
    value, tint = rng.uniform(0.75, 1.3), rng.uniform(0.9, 1.1, 2).tolist()
    return (
        min(red * value * tint[0], 0.9),
        min(green * value, 0.9),
        min(blue * value * tint[1], 0.9),
    )


def _top_cloth(rng: np.random.Generator, upper: str) -> _Cloth:
    shares = ((_DARKS, 0.34), (_LIGHTS, 0.22), (_MUTED, 0.2), (_BRIGHTS, 0.24))
    if upper in {"jacket", "coat", "hoodie"}:
        textures = {
            "plain": 0.5,
            "open": 0.2,
            "quilt": 0.12,
            "block": 0.1,
            "check": 0.04,
            "print": 0.04,
        }
    else:
        textures = {"plain": 0.36, "bars": 0.14, "pinstripe": 0.07, "check": 0.11, "print": 0.2}
        textures |= {"block": 0.06, "floral": 0.06}
    texture = _pick(rng, textures)
    colour = _dye(rng, shares)
    second = _dye(rng, ((_LIGHTS, 0.5), (_BRIGHTS, 0.3), (_DARKS, 0.2)))
    if abs(sum(colour) - sum(second)) < 0.35:
        second = _linear(0xE4E2DC) if sum(colour) < 0.9 else _linear(0x202227)
    return _Cloth(texture, colour, second, float(rng.uniform(0.75, 1.5)))


def _bottom_cloth(rng: np.random.Generator) -> _Cloth:
    colour = _dye(
        rng, ((_DARKS, 0.42), (_DENIMS, 0.33), (_MUTED, 0.15), (_LIGHTS, 0.05), (_BRIGHTS, 0.05))
    )
    texture = _pick(rng, {"plain": 0.84, "seam": 0.08, "check": 0.04, "floral": 0.04})
    return _Cloth(texture, colour, _dye(rng, ((_LIGHTS, 1.0),)), float(rng.uniform(0.7, 1.3)))


def _hair(rng: np.random.Generator, slender: bool) -> str:
    if slender:
        return _pick(rng, {"long": 0.34, "tail": 0.24, "bob": 0.22, "bun": 0.12, "short": 0.08})
    return _pick(rng, {"short": 0.72, "crop": 0.12, "bald": 0.1, "bob": 0.06})


def _bag(rng: np.random.Generator) -> str:
    return _pick(rng, {"none": 0.42, "backpack": 0.28, "shoulder": 0.17, "handbag": 0.13})


def _accent(rng: np.random.Generator) -> Colour:
    return _dye(rng, ((_DARKS, 0.5), (_MUTED, 0.2), (_BRIGHTS, 0.2), (_LIGHTS, 0.1)))


def _draw_look(rng: np.random.Generator) -> _Look:
    slender = bool(rng.random() < 0.5)
    lower = {"trousers": 0.62, "wide": 0.14, "shorts": 0.24}
    if slender:
        lower = {
            "leggings": 0.34,
            "trousers": 0.22,
            "wide": 0.1,
            "shorts": 0.12,
            "skirt": 0.12,
            "dress": 0.1,
        }
    upper = {"tshirt": 0.36, "shirt": 0.24, "hoodie": 0.12, "jacket": 0.18, "coat": 0.1}
    if slender:
        upper["sleeveless"] = 0.1
    garment = _pick(rng, upper)
    return _Look(
        stature=float(rng.normal(0.97 if slender else 1.02, 0.03)),
        weight=float(np.clip(rng.normal(1.06 if slender else 1.2, 0.12), 0.86, 1.55)),
        shoulders=float(rng.normal(0.93 if slender else 1.06, 0.04)),
        hips=float(rng.normal(1.05 if slender else 0.97, 0.05)),
        skin=_linear(int(rng.choice(_SKINS, p=(0.2, 0.26, 0.22, 0.16, 0.1, 0.06)))),
        hair=_hair(rng, slender),
        hair_colour=_dye(rng, ((_HAIRS[:3], 0.6), (_HAIRS[3:], 0.4))),
        beard=not slender and bool(rng.random() < 0.25),
        glasses=bool(rng.random() < 0.2),
        hat=_pick(rng, {"none": 0.8, "cap": 0.12, "beanie": 0.08}),
        hat_colour=_accent(rng),
        upper=garment,
        top=_top_cloth(rng, garment),
        contrast_sleeves=bool(rng.random() < 0.12),
        lower=_pick(rng, lower),
        bottom=_bottom_cloth(rng),
        shoes=_dye(rng, ((_DARKS, 0.45), (_LIGHTS, 0.3), (_MUTED, 0.1), (_BRIGHTS, 0.15))),
        boots=bool(rng.random() < 0.15),
        bag=_bag(rng),
        bag_colour=_accent(rng),
    )


_VARIATIONS: tuple[Callable[[np.random.Generator, _Look], dict[str, Any]], ...] = (
    lambda rng, look: {"shoes": _accent(rng), "boots": not look.boots},
    lambda rng, look: {"bag": _bag(rng), "bag_colour": _accent(rng)},
    lambda rng, look: {"hair": _hair(rng, look.hair not in {"short", "crop", "bald"})},
    lambda rng, look: {"hair_colour": _dye(rng, ((_HAIRS, 1.0),))},
    lambda rng, look: {"bottom": _bottom_cloth(rng)},
    lambda rng, look: {"top": look.top._replace(texture=_top_cloth(rng, look.upper).texture)},
    lambda rng, look: {"top": look.top._replace(second=_accent(rng))},
    lambda rng, look: {"hat": "cap" if look.hat == "none" else "none"},
    lambda rng, look: {"weight": look.weight * (1.25 if look.weight < 1.1 else 0.8)},
)


def _twin_of(pid: int) -> int | None:
    """Returns the identity that `pid` is a look-alike of, None for three in four."""
    return pid - 1 if pid % 4 == 3 else None


@lru_cache(maxsize=4096)
def _look(seed: int, pid: int) -> _Look:
    original = _twin_of(pid)
    rng = np.random.default_rng([seed, pid, 0x100C])
    if original is None:
        return _draw_look(rng)
    look = _look(seed, original)
    for which in rng.choice(len(_VARIATIONS), size=int(rng.integers(1, 3)), replace=False):
        look = replace(look, **_VARIATIONS[which](rng, look))
    return look


# --- cameras ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Camera:
    """A viewpoint with its light, response and scene.

    Angles are in degrees, `yaw` 0 sees people from the front; `light` points right, up, near.
    """

    yaw: float
    spread: float
    pitch: float
    jitter: float
    occlusion: float
    light: Colour
    sun: Colour
    sky: Colour
    gains: Colour
    gamma: float
    saturation: float
    noise: float
    blur: float
    detail: float
    wall: str
    wall_colour: int
    wall_base: float
    ground: str
    ground_colour: int
    props: tuple[str, ...]


_CAMERAS = (
    _Camera(
        yaw=5.0, spread=24.0, pitch=9.0, jitter=0.05, occlusion=0.18,
        light=(-0.55, 0.65, 0.55), sun=(1.0, 0.94, 0.84), sky=(0.5, 0.54, 0.6),
        gains=(1.06, 1.0, 0.9), gamma=1.0, saturation=1.05, noise=3.0, blur=0.3, detail=1.0,
        wall="brick", wall_colour=0x8A5A48, wall_base=0.42,
        ground="paving", ground_colour=0xA8A196, props=("post", "bin", "bike", "bush"),
    ),
    _Camera(
        yaw=178.0, spread=28.0, pitch=16.0, jitter=0.07, occlusion=0.25,
        light=(0.5, 0.75, 0.3), sun=(0.3, 0.32, 0.36), sky=(0.62, 0.7, 0.8),
        gains=(0.84, 1.0, 1.18), gamma=1.12, saturation=0.8, noise=6.0, blur=0.5, detail=0.8,
        wall="cars", wall_colour=0x70757A, wall_base=0.3,
        ground="asphalt", ground_colour=0x6A6C70, props=("car", "post", "car", "tree"),
    ),
    _Camera(
        yaw=88.0, spread=22.0, pitch=6.0, jitter=0.06, occlusion=0.22,
        light=(0.25, 0.9, 0.35), sun=(0.5, 0.54, 0.4), sky=(0.55, 0.6, 0.46),
        gains=(0.95, 1.08, 0.84), gamma=0.86, saturation=0.95, noise=4.0, blur=0.4, detail=0.9,
        wall="hedge", wall_colour=0x4C6434, wall_base=0.5,
        ground="grass", ground_colour=0x6F8148, props=("tree", "bench", "bush", "post"),
    ),
    _Camera(
        yaw=-42.0, spread=32.0, pitch=20.0, jitter=0.08, occlusion=0.25,
        light=(-0.2, 0.8, 0.5), sun=(0.62, 0.5, 0.36), sky=(0.5, 0.44, 0.36),
        gains=(1.2, 1.02, 0.82), gamma=1.1, saturation=0.85, noise=7.0, blur=0.6, detail=0.65,
        wall="shop", wall_colour=0x6B6258, wall_base=0.34,
        ground="tiles", ground_colour=0x9A8B7A, props=("bin", "sign", "bench", "post"),
    ),
    _Camera(
        yaw=146.0, spread=30.0, pitch=12.0, jitter=0.05, occlusion=0.2,
        light=(0.75, 0.5, 0.25), sun=(1.25, 1.12, 0.95), sky=(0.34, 0.4, 0.52),
        gains=(1.0, 0.98, 1.04), gamma=0.8, saturation=1.15, noise=3.0, blur=0.3, detail=1.0,
        wall="concrete", wall_colour=0xA6A4A0, wall_base=0.36,
        ground="crossing", ground_colour=0x77787A, props=("car", "sign", "post", "bike"),
    ),
    _Camera(
        yaw=-96.0, spread=24.0, pitch=25.0, jitter=0.08, occlusion=0.22,
        light=(0.0, 0.95, 0.3), sun=(0.36, 0.32, 0.42), sky=(0.55, 0.48, 0.62),
        gains=(1.04, 0.88, 1.14), gamma=0.95, saturation=0.75, noise=7.0, blur=0.7, detail=0.75,
        wall="door", wall_colour=0x8E8A94, wall_base=0.25,
        ground="paving", ground_colour=0x85828A, props=("bin", "bench", "bush", "post"),
    ),
)  # fmt: skip


# --- solids -------------------------------------------------------------------------------------


class _View(NamedTuple):
    """Where the body stands in the canvas; yaw 0 faces the camera, angles in radians."""

    yaw: float
    pitch: float
    scale: float
    foot: tuple[float, float]

    def project(self, point: Point) -> Point:
        """Returns column, row and nearness in canvas pixels of a body point (left, up, forward)."""
        left, up, forward = point
        sin, cos = math.sin(self.yaw), math.cos(self.yaw)
        right, near = left * cos + forward * sin, forward * cos - left * sin
        sin, cos = math.sin(self.pitch), math.cos(self.pitch)
        row = self.foot[1] - self.scale * (up * cos - near * sin)
        return self.foot[0] + self.scale * right, row, self.scale * (near * cos + up * sin)


class _Solid(NamedTuple):
    """A tapered elliptic tube between two body points; lengths in body heights.

    `across` and `deep` (None: round) are its half widths at even steps from start to end; `caps`
    how far each end bulges beyond the axis, as a share of the half width (0 cuts it flat).
    """

    paint: Paint
    start: Point
    end: Point
    across: Profile
    deep: Profile | None = None
    caps: tuple[float, float] = (1.0, 1.0)
    turn: float = 0.0


class _Layer(NamedTuple):
    """A person alone: linear colour, and nearness in pixels, far below 0 where nobody is."""

    colour: Picture
    nearness: Values

    @property
    def cover(self) -> Cover:
        return np.asarray(self.nearness > -1e5)


_STEPS = 96
_SHARES = np.linspace(0, 1, _STEPS)


def _resample(widths: Profile) -> Float32[np.ndarray, " steps"]:
    values = np.asarray(widths, np.float32)
    if len(values) == _STEPS:
        return values
    steps = np.interp(_SHARES * (len(values) - 1), np.arange(len(values)), values)
    return steps.astype(np.float32)


def _cast(layer: _Layer, solid: _Solid, view: _View, camera: _Camera) -> None:
    """Draws a solid into the layer where it is nearer than what the layer holds."""
    start, end = view.project(solid.start), view.project(solid.end)
    length = max(math.hypot(end[0] - start[0], end[1] - start[1]), 0.5)
    ux, uy = (end[0] - start[0]) / length, (end[1] - start[1]) / length
    px, py = (-uy, ux) if uy <= 0 else (uy, -ux)

    sin, cos = math.sin(view.yaw + solid.turn), math.cos(view.yaw + solid.turn)
    across = _resample(solid.across)
    deep = across if solid.deep is None else _resample(solid.deep)
    wide, thick = np.hypot(across * cos, deep * sin), np.hypot(across * sin, deep * cos)
    wide, thick = wide * np.float32(view.scale), thick * np.float32(view.scale)
    delta = np.arctan2(deep * sin, across * cos)
    step = (_STEPS - 1) / length
    slope = (np.append(wide[1:], wide[-1:]) - wide) * np.float32(step)

    overhang = max(solid.caps) * float(wide.max()) + float(thick.max()) * math.sin(view.pitch) + 1
    reach_x = float(wide.max()) * abs(px) + overhang * abs(ux) + 1
    reach_y = float(wide.max()) * abs(py) + overhang * abs(uy) + 1
    height, width = layer.nearness.shape
    left = max(int(min(start[0], end[0]) - reach_x), 0)
    right = min(int(max(start[0], end[0]) + reach_x) + 1, width)
    top = max(int(min(start[1], end[1]) - reach_y), 0)
    bottom = min(int(max(start[1], end[1]) + reach_y) + 1, height)
    if left >= right or top >= bottom:
        return
    dx = np.arange(left, right, dtype=np.float32) - start[0]
    dy = (np.arange(top, bottom, dtype=np.float32) - start[1])[:, None]
    off = dx * px + dy * py
    along = dx * ux + dy * uy
    index = np.clip(along * step, 0, _STEPS - 1).astype(np.intp)
    rest = (wide * wide).take(index) - off * off

    # From here on only the pixels within the silhouette, in one row.
    inside = np.flatnonzero(rest > 0)
    along, off, rest = along.take(inside), off.take(inside), rest.take(inside)
    index = index.take(inside)
    place = (np.arange(top, bottom)[:, None] * width + np.arange(left, right)).take(inside)
    radius, ratio = wide.take(index), (thick / wide).take(index)
    # Seen from above, the near side of a tube hangs lower than its axis.
    along -= np.sqrt(rest) * ratio * (math.sin(view.pitch) * uy)
    before, after = (1 / max(cap, 1e-3) for cap in solid.caps)
    over = np.maximum(np.maximum(along * -before, (along - length) * after), 0)
    rest -= over * over
    rise = np.sqrt(np.maximum(rest, 0))
    depth = np.clip(along / length, 0, 1) * (end[2] - start[2]) + rise * ratio + start[2]
    nearness = layer.nearness.reshape(-1)
    hit = np.flatnonzero((rest > 0) & (depth > nearness.take(place)))
    if not len(hit):
        return

    place, index = place.take(hit), index.take(hit)
    along, radius = along.take(hit), radius.take(hit)
    side, rise = off.take(hit) / radius, rise.take(hit) / radius
    azimuth = np.arctan2(side, rise) - delta.take(index)
    axial = np.sign(along) * over.take(hit) / radius - slope.take(index) * rise
    facing_right, facing_up = side * px + axial * ux, -side * py - axial * uy
    norm = 1 / np.sqrt(facing_right * facing_right + facing_up * facing_up + rise * rise)
    light = camera.light
    lit = np.maximum((facing_right * light[0] + facing_up * light[1] + rise * light[2]) * norm, 0)
    fill = 0.62 + 0.38 * facing_up * norm
    shade = np.outer(lit, np.asarray(camera.sun, np.float32))
    shade += np.outer(fill, np.asarray(camera.sky, np.float32))

    span = math.dist(solid.start, solid.end)
    albedo = solid.paint(along / length, azimuth, along / length * span)
    nearness[place] = depth.take(hit)
    layer.colour.reshape(-1, 3)[place] = albedo * shade


# --- surfaces -----------------------------------------------------------------------------------

_TILE = 256


@lru_cache(maxsize=4)
def _tiles(seed: int) -> Tiles:
    """Returns three seamless noise tiles about 0, of spread 1: cloth folds, grain, blotches."""
    rng = np.random.default_rng([seed, 0x7E57])

    def smooth(sigma: tuple[float, float]) -> Tile:
        spectrum = np.fft.fft2(rng.normal(size=(_TILE, _TILE)))
        fy, fx = np.meshgrid(np.fft.fftfreq(_TILE), np.fft.fftfreq(_TILE), indexing="ij")
        fu, fv = fx + 0.6 * fy, fy - 0.6 * fx
        kernel = np.exp(-2 * np.pi**2 * ((fu * sigma[0]) ** 2 + (fv * sigma[1]) ** 2))
        field = np.fft.ifft2(spectrum * kernel).real
        return np.asarray(field / field.std(), np.float32)

    folds = 0.4 * smooth((6.0, 3.0)) - np.abs(smooth((16.0, 5.0)))
    grain = 0.6 * smooth((1.0, 1.0)) + 0.4 * smooth((3.0, 3.0))
    tiles = np.stack([(folds - folds.mean()) / folds.std(), grain, smooth((9.0, 9.0))])
    return tiles.astype(np.float32)


def _sample(tile: Tile, u: Surface, v: Surface, grain: float) -> Surface:
    """Returns a noise tile at surface coordinates; `grain` is noise pixels per body height."""
    columns, rows = (u * grain).astype(np.intp), (v * grain).astype(np.intp)
    return np.asarray(tile[rows & (_TILE - 1), columns & (_TILE - 1)])


def _flat(colour: Colour, count: int) -> Albedo:
    return np.full((count, 3), colour, np.float32)


def _blend(base: Albedo, colour: Colour, share: Any) -> None:
    share = np.asarray(share, np.float32)[:, None]
    base += share * (np.asarray(colour, np.float32) - base)


def _weave(cloth: _Cloth, u: Pixels, v: Pixels, tiles: Tiles) -> Albedo:
    """Returns the cloth's colour at surface coordinates in body heights."""
    albedo = _flat(cloth.colour, len(u))
    pitch = 0.045 * cloth.scale
    if cloth.texture == "bars":
        _blend(albedo, cloth.second, (v / pitch) % 1 < 0.45)
    elif cloth.texture == "pinstripe":
        _blend(albedo, cloth.second, ((u / (0.5 * pitch)) % 1 < 0.3) * 0.8)
    elif cloth.texture == "check":
        for coordinate in (u, v):
            _blend(albedo, cloth.second, ((coordinate / (0.9 * pitch)) % 1 < 0.42) * 0.45)
    elif cloth.texture == "floral":
        _blend(albedo, cloth.second, _sample(tiles[2], u, v, 2000 / cloth.scale) > 0.9)
    elif cloth.texture == "quilt":
        albedo *= (0.55 + 0.6 * np.sin(np.pi * ((v / (0.9 * pitch)) % 1)) ** 0.6)[:, None]
    return albedo


def _paint_cloth(
    cloth: _Cloth,
    tiles: Tiles,
    radius: float,
    crumple: tuple[float, float, float],
    share: Pixels,
    azimuth: Pixels,
    along: Pixels,
) -> Albedo:
    folds, du, dv = crumple
    u = azimuth * np.float32(radius)
    crease = _sample(tiles[0], u + du, along + dv, 330.0)
    return _weave(cloth, u, along, tiles) * (1 + folds * crease)[:, None]


class _Painter(NamedTuple):
    """Makes the paints of one picture; folds fall anew on every solid."""

    rng: np.random.Generator
    tiles: Tiles

    def fabric(self, cloth: _Cloth, radius: float, folds: float = 0.17) -> Paint:
        """Returns cloth around a tube of that radius."""
        du, dv = self.rng.uniform(0, 1, 2).tolist()
        return partial(_paint_cloth, cloth, self.tiles, radius, (folds, du, dv))

    def plain(self, colour: Colour, folds: float = 0.05) -> Paint:
        """Returns skin, leather or anything else without a pattern."""
        return self.fabric(_Cloth("plain", colour, colour, 1.0), 0.05, folds)


# --- the body -----------------------------------------------------------------------------------

_HEIGHTS = (0.30, 0.44, 0.50, 0.55, 0.60, 0.64, 0.70, 0.75, 0.79, 0.815, 0.835, 0.86)
_ACROSS = (0.100, 0.094, 0.094, 0.090, 0.080, 0.078, 0.086, 0.096, 0.100, 0.090, 0.068, 0.032)
_DEEP = (0.066, 0.066, 0.068, 0.066, 0.059, 0.057, 0.064, 0.070, 0.064, 0.056, 0.044, 0.030)


class _Pose(NamedTuple):
    """How a person is caught: angles in radians, `phase` the point in the walking cycle."""

    phase: float
    stride: float
    swing: float
    elbows: tuple[float, float]
    lean: float
    head: float


def _draw_pose(rng: np.random.Generator) -> _Pose:
    standing = rng.random() < 0.15
    elbows = rng.uniform(0.15, 0.6, 2)
    if rng.random() < 0.2:
        elbows[int(rng.integers(2))] = rng.uniform(1.3, 2.1)
    return _Pose(
        phase=float(rng.uniform(0, 2 * math.pi)),
        stride=float(rng.uniform(0.03, 0.12) if standing else rng.uniform(0.3, 0.52)),
        swing=float(rng.uniform(0.0, 0.1) if standing else rng.uniform(0.15, 0.55)),
        elbows=(float(elbows[0]), float(elbows[1])),
        lean=float(rng.normal(0.04, 0.04)),
        head=float(rng.normal(0, 0.3)),
    )


def _trunk(look: _Look, low: float, high: float, ease: float) -> tuple[Widths, Widths]:
    """Returns the half widths of the trunk between two heights, `ease` wider than the body."""
    heights = np.linspace(low, high, _STEPS)
    girth = np.interp(heights, (0.5, 0.66, 0.86), (look.hips, 1, look.shoulders))
    bulk = look.weight ** np.interp(heights, (0.6, 0.86), (1.0, 0.5))
    across = np.interp(heights, _HEIGHTS, _ACROSS) * girth * bulk
    belly = 1 + max(look.weight - 1.1, 0) * np.exp(-(((heights - 0.62) / 0.07) ** 2))
    deep = np.interp(heights, _HEIGHTS, _DEEP) * bulk * belly
    return across + ease, deep + ease


def _paint_torso(
    look: _Look,
    cloth: Paint,
    blotches: Tile,
    low: float,
    high: float,
    share: Pixels,
    azimuth: Pixels,
    along: Pixels,
) -> Albedo:
    """Returns the upper garment with its print, opening, collar and the straps of the bag."""
    albedo = cloth(share, azimuth, along)
    front = np.cos(azimuth) > 0
    x, height = 0.092 * np.sin(azimuth), low + share * (high - low)
    texture, second = look.top.texture, look.top.second
    if texture == "print":
        size = 0.042 * look.top.scale
        radius = np.hypot(x, (height - 0.735) * 0.8)
        marks = _sample(blotches, x + look.weight, height, 2600.0) > -0.1
        _blend(albedo, second, front & (radius < size) & marks)
    elif texture == "block":
        _blend(albedo, second, height > 0.70)
    elif texture == "open":
        gap = 0.022 * look.top.scale + 0.03 * np.maximum(0.72 - height, 0)
        _blend(albedo, second, front & (np.abs(x) < gap))
    if look.upper in {"jacket", "coat", "hoodie"} and texture != "open":
        _blend(albedo, (0.02, 0.02, 0.02), (front & (np.abs(x) < 0.0035)) * 0.7)
    if look.upper in {"tshirt", "sleeveless"}:
        depth = 0.022 if look.upper == "tshirt" else 0.045
        neck = front & (height > 0.842 - depth + 18 * x * x) & (np.abs(x) < 0.05)
        _blend(albedo, look.skin, neck)
    if look.bag == "backpack":
        strap = front & (np.abs(np.abs(x) - 0.058) < 0.011) & (height > 0.66)
        _blend(albedo, look.bag_colour, strap)
    elif look.bag == "shoulder":
        line = height - (0.72 - 1.45 * x)
        _blend(albedo, look.bag_colour, np.abs(line) < 0.014)
    return albedo


def _paint_face(look: _Look, skin: Paint, share: Pixels, azimuth: Pixels, along: Pixels) -> Albedo:
    fringe = {"bald": 1.6, "crop": 0.86, "short": 0.84}.get(look.hair, 0.78)
    red, green, blue = look.skin
    albedo = skin(share, azimuth, along)
    turn = np.abs(azimuth)
    eyes = np.exp(-(((turn - 0.46) / 0.2) ** 2) - (((share - 0.5) / 0.07) ** 2))
    brows = np.exp(-(((turn - 0.48) / 0.26) ** 2) - (((share - 0.63) / 0.05) ** 2))
    nose = np.exp(-(((turn - 0.12) / 0.1) ** 2) - (((share - 0.3) / 0.06) ** 2))
    mouth = np.exp(-((turn / 0.34) ** 2) - (((share - 0.1) / 0.05) ** 2))
    _blend(albedo, (0.02, 0.015, 0.01), 0.85 * eyes)
    _blend(albedo, look.hair_colour, 0.7 * brows)
    _blend(albedo, (red * 0.45, green * 0.4, blue * 0.4), 0.6 * nose)
    _blend(albedo, (red * 0.65, green * 0.35, blue * 0.35), 0.8 * mouth)
    if look.beard:
        jaw = (share < 0.22) & (turn < 1.5) | (share < 0.45) & (np.abs(turn - 1.35) < 0.25)
        _blend(albedo, look.hair_colour, 0.75 * jaw)
    if look.glasses:
        _blend(albedo, (0.01, 0.01, 0.01), 0.8 * ((np.abs(share - 0.52) < 0.08) & (turn < 1.1)))
    nape = 0.1 if look.hair in {"short", "crop"} else -0.2
    hairy = (share > fringe) | (turn > 1.25 + 0.5 * (share < 0.3)) & (share > nape)
    _blend(albedo, look.hair_colour, hairy & (look.hair != "bald"))
    return albedo


# Start (ahead, up), end, half widths across and deep and caps of what is on a head, from the neck.
_HAIRCUTS: dict[str, tuple[Any, ...]] = {
    "long": ((-0.022, 0.08), (-0.038, -0.085), (0.047, 0.054, 0.056, 0.05),
             (0.034, 0.032, 0.026, 0.02), (1.0, 0.5)),
    "bob": ((-0.01, 0.09), (-0.014, 0.0), (0.047, 0.053, 0.054), (0.044, 0.046, 0.042), (1.0, 0.3)),
    "tail": ((-0.06, 0.085), (-0.075, -0.04), (0.012, 0.02, 0.016, 0.008), None, (1.0, 1.0)),
    "bun": ((-0.045, 0.115), (-0.06, 0.125), (0.024, 0.024), None, (1.0, 1.0)),
}  # fmt: skip
_HATS: dict[str, list[tuple[Any, ...]]] = {
    "none": [],
    "beanie": [((0.0, 0.078), (-0.004, 0.112), (0.049, 0.049, 0.046), (0.057, 0.057, 0.053),
                (0.0, 0.75))],
    "cap": [((0.0, 0.088), (-0.004, 0.112), (0.049, 0.049, 0.046), (0.055, 0.055, 0.051),
             (0.0, 0.75)),
            ((0.05, 0.086), (0.048, 0.09), (0.038, 0.036), (0.05, 0.048), (0.1, 0.1))],
}  # fmt: skip


class _Frame(NamedTuple):
    """What parts of the body are fixed to: a place that leans forward and turns, in radians."""

    origin: Point
    lean: float
    turn: float

    def at(self, ahead: float, above: float, left: float = 0.0) -> Point:
        sin, cos = math.sin(self.turn), math.cos(self.turn)
        ahead += above * self.lean
        x, up, z = self.origin
        return x + left * cos + ahead * sin, up + above, z + ahead * cos - left * sin

    def wear(self, paint: Paint, start: Any, end: Any, across: Any, deep: Any, caps: Any) -> _Solid:
        return _Solid(paint, self.at(*start), self.at(*end), across, deep, caps, self.turn)


def _head(look: _Look, painter: _Painter, skull: _Frame) -> Iterator[_Solid]:
    skin, hat = painter.plain(look.skin), painter.plain(look.hat_colour, 0.1)
    strands = _Cloth("pinstripe", look.hair_colour, _times(look.hair_colour, 0.6), 0.3)
    hair = painter.fabric(strands, 0.05, 0.3)
    yield _Solid(skin, skull.at(-0.012, -0.03), skull.at(0.004, 0.04), (0.032, 0.029, 0.028))
    face = partial(_paint_face, look, painter.plain(look.skin, 0.03))
    widths = (0.026, 0.036, 0.041, 0.043, 0.042), (0.038, 0.046, 0.05, 0.052, 0.05)
    yield skull.wear(face, (0.008, 0.022), (0.006, 0.106), *widths, (0.7, 0.85))
    trimmed = look.hair in {"bald", "crop", "short"}
    for side in (-0.042, 0.042) if trimmed else ():
        yield _Solid(
            skin, skull.at(0.0, 0.052, side), skull.at(-0.002, 0.07, 1.05 * side), (0.007, 0.009)
        )
    if look.hair != "bald":
        bulk = {"crop": 0.0, "short": 0.003}.get(look.hair, 0.007)
        low = 0.06 if trimmed else 0.035
        shell = np.array((0.034, 0.043, 0.044, 0.042)) + bulk
        yield skull.wear(hair, (-0.012, low), (-0.006, 0.104), shell, shell + 0.007, (0.6, 1))
        yield skull.wear(hair, (0.012, 0.118), (-0.02, 0.116), (0.026, 0.034), None, (0.6, 1))
    if look.hair in _HAIRCUTS:
        yield skull.wear(hair, *_HAIRCUTS[look.hair])
    for piece in _HATS[look.hat]:
        yield skull.wear(hat, *piece)


def _swing(origin: Point, length: float, angle: float, aside: float = 0.0) -> Point:
    """Returns where a limb ends that hangs down, swung forward and aside by angles in radians."""
    left, up, forward = origin
    down = length * math.cos(aside)
    return (
        left + length * math.sin(aside),
        up - down * math.cos(angle),
        forward + down * math.sin(angle),
    )


def _between(start: Point, end: Point, share: float) -> Point:
    a, b, c = (p + share * (q - p) for p, q in zip(start, end, strict=True))
    return a, b, c


def _arms(look: _Look, pose: _Pose, painter: _Painter, shoulder: Point) -> Iterator[_Solid]:
    cloth = look.top
    if cloth.texture in {"print", "open", "block"} or look.contrast_sleeves:
        cloth = cloth._replace(texture="plain")
    if look.contrast_sleeves:
        cloth = cloth._replace(colour=cloth.second)
    skin, bag = painter.plain(look.skin), painter.plain(look.bag_colour, 0.08)
    bulk = math.sqrt(look.weight)
    loose = {"tshirt": 0.006, "sleeveless": 0.0, "shirt": 0.005}.get(look.upper, 0.011)
    loose += 0.006 * (look.top.texture == "quilt")
    upper, fore = bulk * np.array((0.033, 0.032, 0.027)), bulk * np.array((0.027, 0.025, 0.02))
    for side, elbow in zip((-1, 1), pose.elbows, strict=True):
        angle = 0.05 - side * pose.swing * math.sin(pose.phase)
        aside = side * (0.13 + 0.08 * (look.weight - 1.1))
        joint = (side * (0.094 * look.shoulders * bulk + 0.002), shoulder[1], shoulder[2])
        bend = _swing(joint, 0.165, angle, aside)
        wrist = _swing(bend, 0.14, angle + elbow, 0.2 * aside - 0.25 * side * (elbow > 1.0))
        tip = _swing(wrist, 0.05, angle + elbow + 0.15, -0.3 * aside)
        yield _Solid(skin, wrist, tip, (0.017, 0.021, 0.013))
        if look.upper in {"tshirt", "sleeveless"}:
            yield _Solid(skin, joint, bend, upper)
            yield _Solid(skin, bend, wrist, fore)
        else:
            yield _Solid(painter.fabric(cloth, 0.036, 0.2), joint, bend, upper + loose)
            sleeve = painter.fabric(cloth, 0.03, 0.22)
            yield _Solid(sleeve, bend, wrist, fore + loose, caps=(1, 0.1))
        if look.upper == "tshirt":
            hem = _between(joint, bend, 0.5 + 0.2 * look.top.scale)
            yield _Solid(painter.fabric(cloth, 0.036), joint, hem, upper + loose, caps=(1, 0))
        if look.bag == "handbag" and side == 1:
            rim, foot = _swing(tip, 0.09, 0.0), _swing(tip, 0.175, 0.0)
            handle = (0.022, 0.008, 0.03)
            yield _Solid(bag, tip, rim, handle, (0.005, 0.005), (0, 0), math.pi / 2)
            body = (0.055, 0.065, 0.07), (0.02, 0.03, 0.032)
            yield _Solid(bag, rim, foot, *body, (0.1, 0.1), math.pi / 2)


def _legs(look: _Look, pose: _Pose, painter: _Painter) -> tuple[float, float, list[_Solid]]:
    """Returns the height of the hips, how far the thighs spread, and the solids of both legs."""
    bulk = look.weight**0.7
    limbs: list[tuple[Point, Point, Point, float]] = []
    lowest = spread = 0.0
    for side in (-1, 1):
        cycle = pose.phase + (math.pi if side < 0 else 0)
        thigh = pose.stride * math.sin(cycle) + 0.04
        shin = thigh - 0.08 - 1.9 * pose.stride * max(math.cos(cycle), 0) ** 1.3
        hip = (side * 0.044 * look.hips * bulk, 0.0, 0.0)
        bend = _swing(hip, 0.235, thigh, -0.01 * side)
        ankle = _swing(bend, 0.225, shin, -0.02 * side)
        tilt = 0.9 * min(shin, 0) + 0.25 * max(thigh, 0)
        limbs.append((hip, bend, ankle, tilt))
        lowest = min(lowest, ankle[1] - 0.1 * max(math.sin(-tilt), 0))
        spread = max(spread, abs(bend[2]))
    floor = 0.042 - lowest

    skin, leather = painter.plain(look.skin), painter.plain(look.shoes)
    loose = {"trousers": 0.008, "wide": 0.016, "shorts": 0.012}.get(look.lower, 0.0)
    upper = bulk * np.array((0.060, 0.056, 0.043)) + 0.6 * loose
    lower = bulk * np.array((0.042, 0.043, 0.030, 0.024))
    solids = []
    for hip, bend, ankle, tilt in limbs:
        hip, bend, ankle = ((x, y + floor, z) for x, y, z in (hip, bend, ankle))
        if look.lower in {"trousers", "wide", "leggings"}:
            tube = lower + loose * np.array((0.6, 0.8, 1.4, 1.9))
            solids.append(_Solid(painter.fabric(look.bottom, 0.055, 0.2), hip, bend, upper))
            shank = painter.fabric(look.bottom, 0.045, 0.24)
            solids.append(_Solid(shank, bend, ankle, tube, caps=(1, 0.4)))
        else:
            solids.append(_Solid(skin, hip, bend, upper - 0.6 * loose))
            solids.append(_Solid(skin, bend, ankle, lower))
            if look.boots:
                shaft = _between(bend, ankle, 0.45)
                solids.append(_Solid(leather, shaft, ankle, lower[1:] + 0.006, caps=(0, 1)))
        if look.lower == "shorts":
            hem = _between(hip, bend, 0.62 + 0.25 * look.bottom.scale)
            leg = bulk * np.array((0.066, 0.066, 0.064))
            solids.append(_Solid(painter.fabric(look.bottom, 0.06), hip, hem, leg, caps=(1, 0)))
        sin, cos = math.sin(tilt), math.cos(tilt)
        heel = (ankle[0], ankle[1] - 0.018 + 0.02 * sin, ankle[2] - 0.02 * cos)
        toe = (1.3 * ankle[0], ankle[1] - 0.026 + 0.11 * sin, ankle[2] + 0.095 * cos)
        last = (0.026, 0.028, 0.025, 0.02), (0.03, 0.03, 0.022, 0.016)
        solids.append(_Solid(leather, heel, toe, *last, (0.8, 0.8)))
    return floor, spread, solids


def _body(look: _Look, pose: _Pose, painter: _Painter) -> list[_Solid]:
    """Returns the solids of a person who stands on height 0 and walks forward."""
    hips, spread, solids = _legs(look, pose, painter)
    lean = math.tan(pose.lean)
    spine = _Frame((0.0, hips - 0.5, -0.5 * lean), lean, 0.0)

    dress = look.lower == "dress"
    bottom = look.top if dress else look.bottom
    seat = _trunk(look, 0.485, 0.61, 0.003)
    solids.append(
        _Solid(
            painter.fabric(bottom, 0.09),
            spine.at(0.0, 0.485),
            spine.at(0.0, 0.61),
            *seat,
            (0.35, 0),
        )
    )
    if look.lower in {"skirt", "dress"}:
        skirt = (
            (seat[0][-1], seat[0][0] + 0.014, 0.12, 0.122, 0.126),
            (seat[1][-1], seat[1][0] + 0.01, *(0.08 + spread * np.array((0.3, 0.6, 0.9)))),
        )
        hem = spine.at(0.0, 0.40 - 0.1 * look.bottom.scale)
        solids.append(
            _Solid(painter.fabric(bottom, 0.1, 0.28), spine.at(0.0, 0.61), hem, *skirt, (0, 0))
        )

    low = 0.58 if dress else {"coat": 0.33, "jacket": 0.47, "hoodie": 0.475}.get(look.upper, 0.485)
    ease = {"tshirt": 0.005, "sleeveless": 0.005, "shirt": 0.007}.get(look.upper, 0.013)
    ease += 0.008 * (look.top.texture == "quilt")
    across, deep = _trunk(look, low, 0.862, ease)
    flare = np.clip((0.52 - np.linspace(low, 0.862, _STEPS)) / 0.2, 0, 1) * (look.upper == "coat")
    across, deep = across + 0.02 * flare, deep + 0.9 * spread * flare
    cloth = painter.fabric(look.top, 0.09)
    torso = partial(_paint_torso, look, cloth, painter.tiles[2], low, 0.862)
    solids.append(_Solid(torso, spine.at(0.0, low), spine.at(0.0, 0.862), across, deep, (0, 0.3)))
    if look.upper == "hoodie":
        hood = (0.05, 0.052, 0.035), (0.03, 0.03, 0.02)
        solids.append(
            _Solid(
                painter.fabric(look.top, 0.05), spine.at(-0.05, 0.845), spine.at(-0.06, 0.81), *hood
            )
        )
    if look.upper not in {"tshirt", "sleeveless"}:
        collar = painter.plain(_times(look.top.colour, 0.85), 0.1)
        solids.append(
            _Solid(
                collar,
                spine.at(-0.006, 0.84),
                spine.at(-0.006, 0.875),
                (0.045, 0.037),
                None,
                (0.3, 0),
            )
        )
    bag = painter.plain(look.bag_colour, 0.08)
    if look.bag == "backpack":
        back = -0.028 - float(deep[_STEPS // 2])
        sack = (0.074, 0.082, 0.082, 0.078, 0.06), (0.05, 0.055, 0.048, 0.04, 0.03)
        solids.append(_Solid(bag, spine.at(back, 0.60), spine.at(back, 0.80), *sack, (0.3, 0.4)))
        pocket = painter.plain(_times(look.bag_colour, 0.8), 0.1)
        pouch = (0.06, 0.062, 0.058), (0.03, 0.032, 0.02)
        solids.append(
            _Solid(
                pocket,
                spine.at(back - 0.035, 0.60),
                spine.at(back - 0.03, 0.68),
                *pouch,
                (0.3, 0.3),
            )
        )
    elif look.bag == "shoulder":
        beside = 0.024 + float(across[: _STEPS // 4].max())
        pouch = (0.075, 0.08, 0.078), (0.026, 0.024, 0.016)
        ends = spine.at(-0.01, 0.47, beside), spine.at(-0.01, 0.56, beside)
        solids.append(_Solid(bag, *ends, *pouch, (0.15, 0.15), math.pi / 2))
    return [
        *solids,
        *_arms(look, pose, painter, spine.at(-0.2 * lean, 0.792)),
        *_head(look, painter, _Frame(spine.at(0.0, 0.862), 0.0, pose.head)),
    ]


# --- scenes -------------------------------------------------------------------------------------

_LINEAR = (np.arange(256, dtype=np.float32) / 255) ** np.float32(2.2)
_CAR_PAINTS = (0xC9CBCD, 0x1E2124, 0x6F757B, 0x8E1F24, 0x27406E, 0xE6E5E0, 0x4B5A50)
_CAR_BODY = ((0.0, 0.95), (0.0, 0.55), (0.08, 0.46), (0.45, 0.42), (0.8, 0.05), (1.7, 0.02),
             (2.15, 0.4), (2.5, 0.5), (2.55, 0.95))  # fmt: skip
_CAR_GLASS = ((0.58, 0.42), (0.86, 0.12), (1.22, 0.1), (1.22, 0.42), (1.3, 0.42), (1.3, 0.1),
              (1.66, 0.1), (1.98, 0.4))  # fmt: skip
_BIKE_FRAME = ((-0.26, 0.17), (-0.1, 0.42), (0.17, 0.44), (0.0, 0.17), (-0.1, 0.42), (0.0, 0.17),
               (-0.26, 0.17))  # fmt: skip


def _bytes(code: int, value: float = 1.0) -> Colour:
    """Returns a 0xRRGGBB colour as channels in 0..255, `value` times as bright."""
    red, green, blue = (min((code >> shift & 255) * value, 255.0) for shift in (16, 8, 0))
    return red, green, blue


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
            self.disc(right + radius * dx, up + 0.8 * radius * dy, leaf, _bytes(code, value))

    def car(self) -> None:
        """Draws a car one high and 2.55 long, from its lower left corner."""
        shade = self.choose(_CAR_PAINTS)
        body, glass = (np.array(part) * (1, -1) + (0, 1) for part in (_CAR_BODY, _CAR_GLASS))
        self.disc(1.28, 0.0, 1.35, (30.0, 30.0, 32.0), 0.09)
        self.shape(body, _bytes(shade))
        self.shape(body * (1.0, 0.35) + (0.0, 0.03), _bytes(shade, 0.72))
        self.shape(glass, _bytes(0x2A343C, self.rng.uniform(0.8, 1.6)))
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
            brush.box(-half, 1.9, half, 0.0, _bytes(shade, value))
    if kind == "sign":
        brush.box(-0.17, 1.15, 0.17, 0.72, _bytes(0x33363A))
        brush.box(-0.15, 1.13, 0.15, 0.74, _bytes(brush.choose(_BRIGHTS + _LIGHTS)))
        brush.box(-0.1, 1.05, 0.1, 1.0, _bytes(0xF0F0F0))
    elif kind == "bin":
        shade = brush.choose((0x2F5A3A, 0x3C4044, 0x5D6A78))
        brush.box(-0.14, 0.5, 0.14, 0.0, _bytes(shade, 0.75))
        brush.box(-0.1, 0.5, 0.02, 0.0, _bytes(shade, 1.1))
        brush.box(-0.15, 0.56, 0.15, 0.49, _bytes(shade, 0.5))
    elif kind == "bench":
        for rise in (0.5, 0.41, 0.27):
            wood = _bytes(0x7A5636, brush.rng.uniform(0.8, 1.1))
            brush.box(-0.5, rise, 0.5, rise - 0.06, wood)
        for leg in (-0.42, 0.42):
            brush.box(leg - 0.02, 0.27, leg + 0.02, 0.0, _bytes(0x333333))
    elif kind == "bike":
        ring = np.linspace(0, 2 * math.pi, 24)
        for hub in (-0.26, 0.26):
            wheel = np.stack([hub + 0.17 * np.cos(ring), 0.17 + 0.17 * np.sin(ring)], axis=1)
            brush.shape(wheel, (28.0, 28.0, 30.0), 0.02)
        enamel = _bytes(brush.choose(_BRIGHTS))
        brush.shape(_BIKE_FRAME, enamel, 0.022)
        brush.shape(((0.26, 0.17), (0.15, 0.52)), enamel, 0.022)
    elif kind == "tree":
        brush.box(-0.07, 1.9, 0.07, 0.0, _bytes(0x4E4034, 0.8))
        brush.box(-0.05, 1.9, 0.0, 0.0, _bytes(0x5E4E40, 1.1))
    elif kind == "bush":
        brush.foliage(0.0, 0.22, 0.32, 0x56733A)


def _ground(camera: _Camera, tiles: Tiles, rows: int, columns: int, unit: int) -> Values:
    """Returns the brightness of the floor in perspective, from the foot of the wall down."""
    down = np.arange(rows, dtype=np.float32)[:, None]
    depth = 2.2 * unit / (down + 0.35 * unit)
    u = ((np.arange(columns, dtype=np.float32) - columns / 2) / unit + 0.1) * depth
    v = np.broadcast_to(depth * 1.3, u.shape)
    value = 1 + 0.05 * _sample(tiles[2], u, v, 30.0) + 0.05 * _sample(tiles[1], u, v, 160.0)
    if camera.ground in {"paving", "tiles"}:
        size = 0.35 if camera.ground == "paving" else 0.75
        value *= 1 + 0.05 * np.sin(np.floor(u / size) * 12.9 + np.floor(v / size) * 78.2)
        value *= 1 - 0.3 * (((u / size) % 1 < 0.05) | ((v / size) % 1 < 0.07))
    elif camera.ground == "grass":
        value += 0.16 * _sample(tiles[1], 2 * u, 0.5 * v, 300.0) + 0.08 * _sample(
            tiles[2], u, v, 60.0
        )
    elif camera.ground == "crossing":
        value *= 1 + 0.7 * ((u % 1.1 < 0.5) & (v > 0.9) & (v < 3.2))
    return value


def _wall(camera: _Camera, tiles: Tiles, rows: int, columns: int, unit: int) -> Values:
    """Returns the brightness of what closes the scene behind the floor."""
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) / unit
    value = 1 + 0.05 * _sample(tiles[2], x, y, 60.0) + 0.03 * _sample(tiles[1], x, y, 250.0)
    if camera.wall == "brick":
        course = np.floor(y / 0.06)
        x += 0.08 * (course % 2)
        value *= 1 + 0.08 * np.sin(course * 37.7 + np.floor(x / 0.16) * 91.3)
        value *= 1 + 0.25 * ((y % 0.06 < 0.012) | (x % 0.16 < 0.015))
    elif camera.wall == "hedge":
        value += 0.3 * _sample(tiles[1], x, y, 130.0) + 0.22 * _sample(tiles[2], x, y, 80.0) - 0.25
    elif camera.wall in {"concrete", "door"}:
        value *= 1 - 0.2 * ((x % 0.9 < 0.015) | (y % 0.7 < 0.015))
    return np.maximum(value, 0.1)


def _bay(brush: _Brush, wall: str, top: float) -> None:
    """Draws a window, a door or a parked car at the foot of the wall, which is `top` high."""
    rng = brush.rng
    if wall == "shop":
        brush.box(-0.02, 0.86 * top, 0.72, 0.06, _bytes(0x38342F))
        brush.box(0.0, 0.84 * top, 0.7, 0.08, _bytes(0x7C8A94, rng.uniform(0.25, 0.6)))
        for _ in range(4):
            left, high = rng.uniform(0.05, 0.55), rng.uniform(0.15, 0.7) * top
            goods = brush.choose(_BRIGHTS + _LIGHTS + _MUTED)
            brush.box(left, high, left + 0.12, 0.1, _bytes(goods, 0.6))
    elif wall in {"brick", "door", "concrete"} and rng.random() < 0.6:
        door = wall == "door" or rng.random() < 0.3
        high, low = (0.87 * top, 0.0) if door else (top, 0.5 * top)
        wide = rng.uniform(0.3, 0.5)
        panel = brush.choose((0x3B3F45, 0x5A4636, 0x2F4A5C, 0x6D7378, 0x24282B))
        brush.box(-0.03, high + 0.03, wide + 0.03, low, _bytes(0xB9B4AA))
        brush.box(0.0, high, wide, low, _bytes(panel))
        brush.box(0.2 * wide, high - 0.1 * top, 0.8 * wide, (high + low) / 2.0, _bytes(panel, 1.5))
    elif wall == "cars" and rng.random() < 0.75:
        brush._replace(y=brush.y + 0.1 * brush.size, size=0.36 * brush.size).car()


@lru_cache(maxsize=16)
def _scene(seed: int, camid: int, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns what the camera sees without people, larger than a picture of that size."""
    camera, tiles = _CAMERAS[camid], _tiles(seed)
    rng = np.random.default_rng([seed, camid, 0x5CE0E])
    rows, columns = int(_SCENE_HEIGHTS * height), _SCENE_WIDTHS * width
    base = int((camera.wall_base + 0.25) * height)
    wall = _wall(camera, tiles, base, columns, height)[..., None] * _bytes(camera.wall_colour)
    floor = _ground(camera, tiles, rows - base, columns, height)[..., None]
    surfaces = np.concatenate([wall, floor * _bytes(camera.ground_colour)])
    canvas = np.ascontiguousarray(np.clip(surfaces, 0, 255).astype(np.uint8))
    brush = _Brush(canvas, rng, 0.0, base, height)
    for left in np.arange(0, columns / height, 0.85):
        shifted = brush._replace(x=height * (left + rng.uniform(0, 0.25)))
        _bay(shifted, camera.wall, base / height)
    brush.box(0.0, 0.02, columns / height, -0.02, _bytes(0x3A3835))
    count = 2 * _SCENE_WIDTHS
    feet = np.sort(rng.uniform(base + 0.06 * height, 1.05 * height, count))
    places = rng.permutation(count) + rng.uniform(0, 0.8, count)
    for foot, place in zip(feet.tolist(), places.tolist(), strict=True):
        size = 0.35 * height + 0.5 * (foot - base)
        kind = camera.props[int(rng.integers(len(camera.props)))]
        _prop(_Brush(canvas, rng, place * width / 2, foot, size), kind)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) / height
    dapple = 1 + 0.13 * np.tanh(_sample(tiles[2], x, y * 2, 50.0))
    lit = np.clip(canvas * dapple[..., None], 0, 255).astype(np.uint8)
    return np.asarray(cv2.GaussianBlur(lit, (0, 0), 0.004 * height), np.uint8)


# --- pictures -----------------------------------------------------------------------------------


def _stand(
    look: _Look,
    camera: _Camera,
    view: _View,
    shape: tuple[int, int],
    rng: np.random.Generator,
    tiles: Tiles,
) -> _Layer:
    """Returns a person of that look alone, caught in a random pose."""
    layer = _Layer(np.zeros((*shape, 3), np.float32), np.full(shape, -1e6, np.float32))
    view = view._replace(scale=view.scale * look.stature)
    solids = _body(look, _draw_pose(rng), _Painter(rng, tiles))
    # Front to back, so that what is hidden costs no shading.
    solids.sort(key=lambda solid: -view.project(solid.start)[2] - view.project(solid.end)[2])
    for solid in solids:
        _cast(layer, solid, view, camera)
    # Where the surroundings are nearer than the surface, less light gets in.
    relief = np.maximum(layer.nearness, layer.nearness[layer.cover].min(initial=0.0))
    around = cv2.GaussianBlur(relief, (0, 0), 0.02 * view.scale)
    hollow = np.clip((around - relief) / (0.1 * view.scale), 0, 1)
    layer.colour[:] *= (1 - 0.75 * hollow)[..., None]
    return layer


def _pass(
    picture: Picture,
    camera: _Camera,
    view: _View,
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
    look = _look(seed, _FIRST_PASSER + int(rng.integers(10_000)))
    view = _View(yaw, view.pitch, view.scale * near, foot)
    layer = _stand(look, camera, view, (height, width), rng, _tiles(seed))
    np.copyto(picture, layer.colour, where=layer.cover[..., None])
    return layer.cover


def _occlude(picture: Picture, kind: str, camera: _Camera, rng: np.random.Generator) -> Cover:
    """Paints a thing in front of everything and returns where it is."""
    height, width = picture.shape[:2]
    plate = np.zeros((height, width, 3), np.uint8)
    edge = float(rng.choice((rng.uniform(0.1, 0.42), rng.uniform(0.58, 0.9))))
    brush = _Brush(plate, rng, 0.0, height, width)
    tall = height / width
    if kind == "pole":
        half, shade = (
            rng.uniform(0.05, 0.12),
            brush.choose((0x55585C, 0x8E9294, 0x5A4A3C, 0x2F4437)),
        )
        for share, value in ((1.0, 0.6), (0.7, 0.85), (0.35, 1.15)):
            left, right = edge - half * share, edge + 0.8 * half * share
            brush.box(left, tall, right, 0.0, _bytes(shade, value))
    elif kind == "bollard":
        half, shade = rng.uniform(0.08, 0.15), brush.choose((0x6E7072, 0x303336, 0xB8A23A))
        middle, top = rng.uniform(0.25, 0.75), rng.uniform(0.2, 0.38) * tall
        for share, value in ((1.0, 0.65), (0.6, 1.0), (0.25, 1.2)):
            brush.disc(middle, top, half * share, _bytes(shade, value), 0.5)
            brush.box(middle - half * share, top, middle + half * share, 0.0, _bytes(shade, value))
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
    picture[front] = (_LINEAR * light)[plate[front]]
    return front


def _shadow(picture: Picture, cover: Cover, camera: _Camera, foot: tuple[float, float]) -> None:
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


def _develop(
    picture: Picture, camera: _Camera, rng: np.random.Generator, height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the picture as the camera records it."""
    detail = camera.detail * rng.uniform(0.75, 1.0)
    coarse = max(int(width * detail), 8), max(int(height * detail), 8)
    image: Picture = cv2.resize(picture, coarse, interpolation=cv2.INTER_AREA)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    sigma = camera.blur * rng.uniform(0.6, 1.4) * height / 128
    image = cv2.GaussianBlur(image, (0, 0), max(sigma, 0.05))
    gains = np.array(camera.gains) * rng.normal(1, 0.03, 3) * math.exp(rng.normal(0, 0.14))
    image = np.maximum(image * gains.astype(np.float32), 0)
    image = (1.4 * image / (1 + 0.45 * image)) ** np.float32(camera.gamma / 2.2)
    grey = image.mean(axis=2, keepdims=True)
    image = grey + (image - grey) * np.float32(camera.saturation * rng.uniform(0.9, 1.1))
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(camera.noise)
    return np.asarray(np.clip(255 * image + noise, 0, 255), np.uint8)


def _heading(seed: int, pid: int, camid: int) -> float:
    """Returns the way a person walks past a camera in degrees, the same in all its pictures."""
    rng = np.random.default_rng([seed, pid, camid, 0x7AC])
    turned = 180.0 if rng.random() < 0.12 else 0.0
    return float(_CAMERAS[camid].yaw + turned + rng.normal(0, _CAMERAS[camid].spread))


def _check(name: str, value: object, least: int, most: int | None = None) -> None:
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
        The picture (height, width, 3) in 0..255 and the mask (height, width): 255 where the person
        is seen, 0 elsewhere, whatever stands in front of the person included.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If an argument is out of its range.

    Example:
        >>> picture, mask = render_pedestrian(1, 0, 0, height=64, width=32)
        >>> picture.shape, mask.shape, sorted(set(mask.flat))
        ((64, 32, 3), (64, 32), [np.uint8(0), np.uint8(255)])
    """
    _check("pid", pid, 1)
    _check("camid", camid, 0, len(_CAMERAS) - 1)
    _check("index", index, 0)
    _check("seed", seed, 0)
    _check("height", height, 32)
    _check("width", width, 16)
    camera, tiles = _CAMERAS[camid], _tiles(seed)
    rng = np.random.default_rng([seed, pid, camid, index])
    rows, columns = _OVERSAMPLING * height, _OVERSAMPLING * width

    zoom = 0.9 * math.exp(rng.normal(0, camera.jitter))
    if rng.random() < 0.1:
        zoom *= rng.uniform(1.1, 1.4)
    slack = abs(1 - zoom) / 2 + 0.5 * camera.jitter
    middle = rng.uniform(-slack, slack) if zoom > 1 else rng.normal(0, 0.4 * camera.jitter)
    pitch = math.radians(camera.pitch)
    foot = columns * (0.5 + rng.normal(0, camera.jitter)), rows * (0.49 + middle + zoom / 2)
    yaw = math.radians(_heading(seed, pid, camid) + rng.normal(0, 8))
    view = _View(yaw, pitch, rows * zoom / math.cos(pitch), foot)

    scene = _scene(seed, camid, rows, columns)
    magnify = zoom * rng.uniform(0.95, 1.2)
    left = rng.uniform(0, scene.shape[1] - columns / min(magnify, 1.0) - 1)
    warp = np.array(
        [[magnify, 0, -left * magnify], [0, magnify, foot[1] - 1.2 * rows * magnify]], np.float32
    )
    crop = cv2.warpAffine(scene, warp, (columns, rows), borderMode=cv2.BORDER_REFLECT)
    light = np.float32(camera.sky[1] + 0.55 * camera.sun[1])
    picture: Picture = np.asarray(cv2.LUT(crop, _LINEAR * light), np.float32)

    person = _stand(_look(seed, pid), camera, view, (rows, columns), rng, tiles)
    visible = person.cover
    _shadow(picture, visible, camera, foot)
    if rng.random() < 0.1:
        _pass(picture, camera, view, rng, seed, behind=True)
    np.copyto(picture, person.colour, where=visible[..., None])
    if rng.random() < camera.occlusion:
        kind = _pick(rng, _OCCLUDERS)
        if kind == "person":
            visible &= ~_pass(picture, camera, view, rng, seed, behind=False)
        else:
            visible &= ~_occlude(picture, kind, camera, rng)
    share = cv2.resize(
        visible.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_AREA
    )
    mask = np.where(share > 127, 255, 0).astype(np.uint8)
    return _develop(picture, camera, rng, height, width), mask


def contact_sheet(
    pids: Sequence[int] = tuple(range(1, 9)),
    *,
    num_cameras: int = len(_CAMERAS),
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
    _check("num_cameras", num_cameras, 1, len(_CAMERAS))
    _check("images_per_camera", images_per_camera, 1)
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


# --- the set on disk ----------------------------------------------------------------------------

_TRAIN, _QUERY, _GALLERY, _MASKS = "bounding_box_train", "query", "bounding_box_test", "masks"


class _Item(NamedTuple):
    folder: str
    name: str
    pid: int
    camid: int
    number: int


def mask_path(img_path: str) -> str:
    """Returns the path of the person mask that belongs to an image of the set.

    Args:
        img_path: Path of an image, as the lists of `load_pedestrians` hold it.

    Returns:
        Path of a grey PNG of the image's size: 255 where the person is seen, 0 elsewhere.

    Raises:
        ValueError: If the path is not that of an image in one of the set's folders.

    Example:
        >>> mask_path("set/query/5001_c1s1_000001_00.jpg")
        'set/masks/5001_c1s1_000001_00.png'
    """
    path = Path(img_path)
    if path.suffix != ".jpg" or path.parent.name not in {_TRAIN, _QUERY, _GALLERY}:
        raise ValueError(
            f"img_path must be a .jpg in {_TRAIN}, {_QUERY} or {_GALLERY}, got {img_path!r}"
        )
    return str(path.parent.parent / _MASKS / f"{path.stem}.png")


def _items(parameters: dict[str, int]) -> list[_Item]:
    """Returns every image of a set, sorted by identity, camera and index."""
    pids = [*range(1, 1 + parameters["num_train_pids"])]
    pids += range(FIRST_TEST_PID, FIRST_TEST_PID + parameters["num_test_pids"])
    items = []
    for pid in pids:
        for camid in range(parameters["num_cameras"]):
            for index in range(parameters["images_per_camera"]):
                test = _QUERY if index == 0 else _GALLERY
                folder = _TRAIN if pid < FIRST_TEST_PID else test
                name = f"{pid:04d}_c{camid + 1}s1_{index + 1:06d}_00"
                items.append(_Item(folder, name, pid, camid, index))
    return items


def _write(path: Path, image: np.ndarray, *options: int) -> None:
    done, data = cv2.imencode(path.suffix, image, options)
    if not done:
        raise RuntimeError(f"cv2 cannot encode {path.name}")
    path.write_bytes(data.tobytes())


def _manifest(parameters: dict[str, int]) -> dict[str, Any]:
    return {
        "format": "casn-plugin pedestrians",
        "version": FORMAT_VERSION,
        "parameters": parameters,
        "images": len(_items(parameters)),
    }


def _render_all(folder: Path, parameters: dict[str, int], progress: bool) -> None:
    """Renders the set beside `folder` and moves it there in one step when it is complete."""
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    size = {name: parameters[name] for name in ("seed", "height", "width")}
    try:
        for name in (_TRAIN, _QUERY, _GALLERY, _MASKS):
            (partial / name).mkdir(parents=True)
        items = _items(parameters)
        hidden = None if progress else True  # None: shown on a terminal
        for item in tqdm(items, desc="Rendering pedestrians", unit="img", disable=hidden):
            image, mask = render_pedestrian(item.pid, item.camid, item.number, **size)
            path = partial / item.folder / f"{item.name}.jpg"
            _write(path, image[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, 95)
            _write(partial / _MASKS / f"{item.name}.png", mask)
        (partial / "manifest.json").write_text(json.dumps(_manifest(parameters), indent=2) + "\n")
        try:
            partial.rename(folder)
        except OSError:
            # Another process was first; its set is checked like any other that was there before.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _verify(folder: Path, parameters: dict[str, int]) -> None:
    """Raises RuntimeError unless the folder holds exactly the set of these parameters."""
    remedy = f"delete the folder {folder} to have it rendered anew, or pass another root"
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise RuntimeError(f"no readable manifest.json in {folder} ({error}); {remedy}") from error
    expected = _manifest(parameters)
    if found != expected:
        raise RuntimeError(f"{folder} holds another set: {found}, expected {expected}; {remedy}")
    present = {
        name: {entry.name for entry in os.scandir(folder / name)}
        if (folder / name).is_dir()
        else set()
        for name in (_TRAIN, _QUERY, _GALLERY, _MASKS)
    }
    items = _items(parameters)
    wanted = [(item.folder, f"{item.name}.jpg") for item in items]
    wanted += [(_MASKS, f"{item.name}.png") for item in items]
    missing = [f"{where}/{name}" for where, name in wanted if name not in present[where]]
    if missing:
        raise RuntimeError(
            f"{len(missing)} files missing in {folder}, first {missing[0]}; {remedy}"
        )


def _cache_folder() -> Path:
    if own := os.environ.get("CASN_PLUGIN_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "casn-plugin"


def load_pedestrians(
    root: str | os.PathLike[str] | None = None,
    *,
    num_train_pids: int = 64,
    num_test_pids: int = 64,
    num_cameras: int = 4,
    images_per_camera: int = 4,
    height: int = 128,
    width: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> PedestrianSet:
    """Returns the train, query and gallery lists, rendering the images to disk the first time.

    The images lie in a folder of `root` named after the parameters, in Market-1501's layout, with
    the person masks (see `mask_path`) beside them. An image depends on `seed`, its identity, camera
    and index and on the size only, so a larger set holds the files of a smaller one.

    Args:
        root: Folder to keep sets in; None takes `$CASN_PLUGIN_CACHE`, else
            `$XDG_CACHE_HOME/casn-plugin`, else `~/.cache/casn-plugin`.
        num_train_pids: Identities to train on, from 1 to 5000.
        num_test_pids: Identities to test on, from 1 to 4999; none is in the training set.
        num_cameras: Cameras, from 2 to 6; every identity is seen by all of them.
        images_per_camera: Pictures of an identity from each camera, from 2 to 999999; of a test
            identity the first is a query and the others are in the gallery.
        height: Height of the images in pixels, at least 32.
        width: Width of the images in pixels, at least 16.
        seed: Chooses the people and the scenes, from 0.
        progress: Whether to show a progress bar while rendering.

    Returns:
        Lists of (image path, pid, camid), camid from 0. In train the pids run from 0, in query and
        gallery they are those of the file names, from 5001.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If a number is out of its range.
        RuntimeError: If the set's folder is there but is not what it should be.
        OSError: If the folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     data = load_pedestrians(
        ...         root, num_train_pids=2, num_test_pids=1, num_cameras=2, images_per_camera=3,
        ...         height=32, width=16, progress=False)
        >>> len(data.train), len(data.query), len(data.gallery)
        (12, 2, 4)
        >>> os.path.basename(data.query[1][0]), data.query[1][1:]
        ('5001_c2s1_000001_00.jpg', (5001, 1))
    """
    _check("num_train_pids", num_train_pids, 1, FIRST_TEST_PID - 1)
    _check("num_test_pids", num_test_pids, 1, 10_000 - FIRST_TEST_PID)
    _check("num_cameras", num_cameras, 2, len(_CAMERAS))
    _check("images_per_camera", images_per_camera, 2, 999_999)
    _check("height", height, 32)
    _check("width", width, 16)
    _check("seed", seed, 0)
    parameters = {
        "num_train_pids": int(num_train_pids),
        "num_test_pids": int(num_test_pids),
        "num_cameras": int(num_cameras),
        "images_per_camera": int(images_per_camera),
        "height": int(height),
        "width": int(width),
        "seed": int(seed),
    }
    parent = _cache_folder() if root is None else Path(root)
    folder = parent.expanduser().absolute() / (
        f"pedestrians-v{FORMAT_VERSION}-s{seed}-{num_train_pids}+{num_test_pids}ids"
        f"-{num_cameras}cams-{images_per_camera}imgs-{height}x{width}"
    )
    if not folder.exists():
        _render_all(folder, parameters, progress)
    _verify(folder, parameters)

    lists: dict[str, list[Record]] = {_TRAIN: [], _QUERY: [], _GALLERY: []}
    for item in _items(parameters):
        pid = item.pid - 1 if item.folder == _TRAIN else item.pid
        lists[item.folder].append((str(folder / item.folder / f"{item.name}.jpg"), pid, item.camid))
    return PedestrianSet(lists[_TRAIN], lists[_QUERY], lists[_GALLERY])
