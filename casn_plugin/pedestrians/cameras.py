"""How they are seen: viewpoints, each with its own light, response to light and kind of street.

A picture is drawn in linear light on a canvas, larger than itself, before the camera records it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from casn_plugin.pedestrians.colours import Colour

Point = tuple[float, float, float]
Pixels = Float32[np.ndarray, " n"]
Picture = Float32[np.ndarray, "h w 3"]
Values = Float32[np.ndarray, "h w"]
Cover = Bool[np.ndarray, "h w"]


class View(NamedTuple):
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


@dataclass(frozen=True)
class Camera:
    """A viewpoint with its light, response and scene.

    Angles are in degrees, `yaw` 0 sees people from the front; `light` points right, up, near.
    `occlusion` and `passers` are the shares of pictures with something before the person and with
    a passer-by behind.
    """

    number: int
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
    passers: float = 0.1

    def heading(self, seed: int, pid: int) -> float:
        """Returns the way a person walks past in degrees, the same in all its pictures."""
        rng = np.random.default_rng([seed, pid, self.number, 0x7AC])
        turned = 180.0 if rng.random() < 0.12 else 0.0
        return float(self.yaw + turned + rng.normal(0, self.spread))

    def frame(
        self, seed: int, pid: int, rng: np.random.Generator, shape: tuple[int, int]
    ) -> tuple[View, float]:
        """Returns where a person stands in a canvas and the share of its height that they fill."""
        rows, columns = shape
        zoom = 0.9 * math.exp(rng.normal(0, self.jitter))
        if rng.random() < 0.1:
            zoom *= rng.uniform(1.1, 1.4)
        slack = abs(1 - zoom) / 2 + 0.5 * self.jitter
        middle = rng.uniform(-slack, slack) if zoom > 1 else rng.normal(0, 0.4 * self.jitter)
        pitch = math.radians(self.pitch)
        foot = columns * (0.5 + rng.normal(0, self.jitter)), rows * (0.49 + middle + zoom / 2)
        yaw = math.radians(self.heading(seed, pid) + rng.normal(0, 8))
        return View(yaw, pitch, rows * zoom / math.cos(pitch), foot), zoom

    def shade(self, right: Pixels, up: Pixels, near: Pixels) -> Float32[np.ndarray, "n 3"]:
        """Returns the light that falls on surfaces facing that way, of sun and sky."""
        norm = 1 / np.sqrt(right * right + up * up + near * near)
        light = self.light
        lit = np.maximum((right * light[0] + up * light[1] + near * light[2]) * norm, 0)
        fill = 0.62 + 0.38 * up * norm
        shade = np.outer(lit, np.asarray(self.sun, np.float32))
        shade += np.outer(fill, np.asarray(self.sky, np.float32))
        return shade

    def record(
        self, picture: Picture, rng: np.random.Generator, height: int, width: int
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Returns the picture of that size that the camera makes of the light in the canvas."""
        detail = self.detail * rng.uniform(0.75, 1.0)
        coarse = max(int(width * detail), 8), max(int(height * detail), 8)
        image: Picture = cv2.resize(picture, coarse, interpolation=cv2.INTER_AREA)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        sigma = self.blur * rng.uniform(0.6, 1.4) * height / 128
        image = cv2.GaussianBlur(image, (0, 0), max(sigma, 0.05))
        gains = np.array(self.gains) * rng.normal(1, 0.03, 3) * math.exp(rng.normal(0, 0.14))
        image = np.maximum(image * gains.astype(np.float32), 0)
        image = (1.4 * image / (1 + 0.45 * image)) ** np.float32(self.gamma / 2.2)
        grey = image.mean(axis=2, keepdims=True)
        image = grey + (image - grey) * np.float32(self.saturation * rng.uniform(0.9, 1.1))
        noise = rng.standard_normal(image.shape, np.float32) * np.float32(self.noise)
        return np.asarray(np.clip(255 * image + noise, 0, 255), np.uint8)


CAMERAS = (
    Camera(
        number=0, yaw=5.0, spread=24.0, pitch=9.0, jitter=0.05, occlusion=0.18,
        light=(-0.55, 0.65, 0.55), sun=(1.0, 0.94, 0.84), sky=(0.5, 0.54, 0.6),
        gains=(1.06, 1.0, 0.9), gamma=1.0, saturation=1.05, noise=3.0, blur=0.3, detail=1.0,
        wall="brick", wall_colour=0x8A5A48, wall_base=0.42,
        ground="paving", ground_colour=0xA8A196, props=("post", "bin", "bike", "bush"),
    ),
    Camera(
        number=1, yaw=178.0, spread=28.0, pitch=16.0, jitter=0.07, occlusion=0.25,
        light=(0.5, 0.75, 0.3), sun=(0.3, 0.32, 0.36), sky=(0.62, 0.7, 0.8),
        gains=(0.84, 1.0, 1.18), gamma=1.12, saturation=0.8, noise=6.0, blur=0.5, detail=0.8,
        wall="cars", wall_colour=0x70757A, wall_base=0.3,
        ground="asphalt", ground_colour=0x6A6C70, props=("car", "post", "car", "tree"),
    ),
    Camera(
        number=2, yaw=88.0, spread=22.0, pitch=6.0, jitter=0.06, occlusion=0.22,
        light=(0.25, 0.9, 0.35), sun=(0.5, 0.54, 0.4), sky=(0.55, 0.6, 0.46),
        gains=(0.95, 1.08, 0.84), gamma=0.86, saturation=0.95, noise=4.0, blur=0.4, detail=0.9,
        wall="hedge", wall_colour=0x4C6434, wall_base=0.5,
        ground="grass", ground_colour=0x6F8148, props=("tree", "bench", "bush", "post"),
    ),
    Camera(
        number=3, yaw=-42.0, spread=32.0, pitch=20.0, jitter=0.08, occlusion=0.25,
        light=(-0.2, 0.8, 0.5), sun=(0.62, 0.5, 0.36), sky=(0.5, 0.44, 0.36),
        gains=(1.2, 1.02, 0.82), gamma=1.1, saturation=0.85, noise=7.0, blur=0.6, detail=0.65,
        wall="shop", wall_colour=0x6B6258, wall_base=0.34,
        ground="tiles", ground_colour=0x9A8B7A, props=("bin", "sign", "bench", "post"),
    ),
    Camera(
        number=4, yaw=146.0, spread=30.0, pitch=12.0, jitter=0.05, occlusion=0.2,
        light=(0.75, 0.5, 0.25), sun=(1.25, 1.12, 0.95), sky=(0.34, 0.4, 0.52),
        gains=(1.0, 0.98, 1.04), gamma=0.8, saturation=1.15, noise=3.0, blur=0.3, detail=1.0,
        wall="concrete", wall_colour=0xA6A4A0, wall_base=0.36,
        ground="crossing", ground_colour=0x77787A, props=("car", "sign", "post", "bike"),
    ),
    Camera(
        number=5, yaw=-96.0, spread=24.0, pitch=25.0, jitter=0.08, occlusion=0.22,
        light=(0.0, 0.95, 0.3), sun=(0.36, 0.32, 0.42), sky=(0.55, 0.48, 0.62),
        gains=(1.04, 0.88, 1.14), gamma=0.95, saturation=0.75, noise=7.0, blur=0.7, detail=0.75,
        wall="door", wall_colour=0x8E8A94, wall_base=0.25,
        ground="paving", ground_colour=0x85828A, props=("bin", "bench", "bush", "post"),
    ),
)  # fmt: skip
