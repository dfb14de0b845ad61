"""What surfaces look like: noise, cloth and its folds, the garment of the trunk, the face.

A paint gives the colour of points on a tube by their share of its length, their angle around it in
radians (0 ahead) and their distance along it in body heights.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from casn_plugin.pedestrians.colours import Colour
from casn_plugin.pedestrians.looks import Cloth, Look

Pixels = Float32[np.ndarray, " n"]
Albedo = Float32[np.ndarray, "n 3"]
Tile = Float32[np.ndarray, "tile tile"]
Tiles = Float32[np.ndarray, "3 tile tile"]
Surface = Float32[np.ndarray, "*points"]
Paint = Callable[[Pixels, Pixels, Pixels], Albedo]

_TILE = 256


@lru_cache(maxsize=4)
def noise_tiles(seed: int) -> Tiles:
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


def sample(tile: Tile, u: Surface, v: Surface, grain: float) -> Surface:
    """Returns a noise tile at surface coordinates; `grain` is noise pixels per body height."""
    columns, rows = (u * grain).astype(np.intp), (v * grain).astype(np.intp)
    return np.asarray(tile[rows & (_TILE - 1), columns & (_TILE - 1)])


def _blend(base: Albedo, colour: Colour, share: Any) -> None:
    share = np.asarray(share, np.float32)[:, None]
    base += share * (np.asarray(colour, np.float32) - base)


def _weave(cloth: Cloth, u: Pixels, v: Pixels, tiles: Tiles) -> Albedo:
    """Returns the cloth's colour at surface coordinates in body heights."""
    albedo = np.full((len(u), 3), cloth.colour, np.float32)
    pitch = 0.045 * cloth.scale
    if cloth.texture == "bars":
        _blend(albedo, cloth.second, (v / pitch) % 1 < 0.45)
    elif cloth.texture == "pinstripe":
        _blend(albedo, cloth.second, ((u / (0.5 * pitch)) % 1 < 0.3) * 0.8)
    elif cloth.texture == "check":
        for coordinate in (u, v):
            _blend(albedo, cloth.second, ((coordinate / (0.9 * pitch)) % 1 < 0.42) * 0.45)
    elif cloth.texture == "floral":
        _blend(albedo, cloth.second, sample(tiles[2], u, v, 2000 / cloth.scale) > 0.9)
    elif cloth.texture == "quilt":
        albedo *= (0.55 + 0.6 * np.sin(np.pi * ((v / (0.9 * pitch)) % 1)) ** 0.6)[:, None]
    return albedo


def _paint_cloth(
    cloth: Cloth,
    tiles: Tiles,
    radius: float,
    crumple: tuple[float, float, float],
    share: Pixels,
    azimuth: Pixels,
    along: Pixels,
) -> Albedo:
    folds, du, dv = crumple
    u = azimuth * np.float32(radius)
    crease = sample(tiles[0], u + du, along + dv, 330.0)
    return _weave(cloth, u, along, tiles) * (1 + folds * crease)[:, None]


def _paint_torso(
    look: Look,
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
        marks = sample(blotches, x + look.weight, height, 2600.0) > -0.1
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


def _paint_face(look: Look, skin: Paint, share: Pixels, azimuth: Pixels, along: Pixels) -> Albedo:
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


class Painter(NamedTuple):
    """Makes the paints of one person in one picture; folds fall anew on every solid."""

    rng: np.random.Generator
    tiles: Tiles

    def fabric(self, cloth: Cloth, radius: float, folds: float = 0.17) -> Paint:
        """Returns cloth around a tube of that radius."""
        du, dv = self.rng.uniform(0, 1, 2).tolist()
        return partial(_paint_cloth, cloth, self.tiles, radius, (folds, du, dv))

    def plain(self, colour: Colour, folds: float = 0.05) -> Paint:
        """Returns skin, leather or anything else without a pattern."""
        return self.fabric(Cloth("plain", colour, colour, 1.0), 0.05, folds)

    def torso(self, look: Look, low: float, high: float) -> Paint:
        """Returns the upper garment of a trunk that reaches from one height to another."""
        return partial(_paint_torso, look, self.fabric(look.top, 0.09), self.tiles[2], low, high)

    def face(self, look: Look) -> Paint:
        """Returns the head of that look as far as it is neither hat nor loose hair."""
        return partial(_paint_face, look, self.plain(look.skin, 0.03))
