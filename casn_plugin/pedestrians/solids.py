"""Solids and their ray casting: tapered tubes, and the layer that they are drawn on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Float32

from casn_plugin.pedestrians.cameras import Camera, Cover, Picture, Point, Values, View
from casn_plugin.pedestrians.surfaces import Paint

Profile = Sequence[float] | Float[np.ndarray, " given"]

STEPS = 96
"""At how many places along a solid its half widths are known."""
_SHARES = np.linspace(0, 1, STEPS)


class Solid(NamedTuple):
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


def _resample(widths: Profile) -> Float32[np.ndarray, " steps"]:
    values = np.asarray(widths, np.float32)
    if len(values) == STEPS:
        return values
    steps = np.interp(_SHARES * (len(values) - 1), np.arange(len(values)), values)
    return steps.astype(np.float32)


class Layer(NamedTuple):
    """A person alone: linear colour, and nearness in pixels, far below 0 where nobody is."""

    colour: Picture
    nearness: Values

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> "Layer":
        """Returns a layer of that many rows and columns on which nobody is."""
        return cls(np.zeros((*shape, 3), np.float32), np.full(shape, -1e6, np.float32))

    @property
    def cover(self) -> Cover:
        """Where somebody is."""
        return np.asarray(self.nearness > -1e5)

    def draw(self, solid: Solid, view: View, camera: Camera) -> None:
        """Draws a solid, lit as at the camera, where it is nearer than what the layer holds."""
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
        step = (STEPS - 1) / length
        slope = (np.append(wide[1:], wide[-1:]) - wide) * np.float32(step)

        overhang = (
            max(solid.caps) * float(wide.max()) + float(thick.max()) * math.sin(view.pitch) + 1
        )
        reach_x = float(wide.max()) * abs(px) + overhang * abs(ux) + 1
        reach_y = float(wide.max()) * abs(py) + overhang * abs(uy) + 1
        height, width = self.nearness.shape
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
        index = np.clip(along * step, 0, STEPS - 1).astype(np.intp)
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
        nearness = self.nearness.reshape(-1)
        hit = np.flatnonzero((rest > 0) & (depth > nearness.take(place)))
        if not len(hit):
            return

        place, index = place.take(hit), index.take(hit)
        along, radius = along.take(hit), radius.take(hit)
        side, rise = off.take(hit) / radius, rise.take(hit) / radius
        azimuth = np.arctan2(side, rise) - delta.take(index)
        axial = np.sign(along) * over.take(hit) / radius - slope.take(index) * rise
        facing_right, facing_up = side * px + axial * ux, -side * py - axial * uy
        shade = camera.shade(facing_right, facing_up, rise)
        span = math.dist(solid.start, solid.end)
        albedo = solid.paint(along / length, azimuth, along / length * span)
        nearness[place] = depth.take(hit)
        self.colour.reshape(-1, 3)[place] = albedo * shade

    def darken_hollows(self, size: float) -> None:
        """Takes light where the surroundings are nearer than the surface; `size` in pixels."""
        relief = np.maximum(self.nearness, self.nearness[self.cover].min(initial=0.0))
        around = cv2.GaussianBlur(relief, (0, 0), 0.02 * size)
        hollow = np.clip((around - relief) / (0.1 * size), 0, 1)
        self.colour[:] *= (1 - 0.75 * hollow)[..., None]

    def lay_over(self, picture: Picture) -> Cover:
        """Draws the person over a picture of the same size and returns where."""
        cover = self.cover
        np.copyto(picture, self.colour, where=cover[..., None])
        return cover
