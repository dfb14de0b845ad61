"""The body: a look in a pose, from shoes to hat, and how a person stands before a camera."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from casn_plugin.pedestrians.cameras import Camera, Point, View
from casn_plugin.pedestrians.colours import scaled
from casn_plugin.pedestrians.looks import Cloth, Look
from casn_plugin.pedestrians.solids import STEPS, Layer, Solid
from casn_plugin.pedestrians.surfaces import Paint, Painter, Tiles

Widths = Float[np.ndarray, " steps"]

# The trunk of a body of mean build: heights, and the half widths there.
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


def _trunk(look: Look, low: float, high: float, ease: float) -> tuple[Widths, Widths]:
    """Returns the half widths of the trunk between two heights, `ease` wider than the body."""
    heights = np.linspace(low, high, STEPS)
    girth = np.interp(heights, (0.5, 0.66, 0.86), (look.hips, 1, look.shoulders))
    bulk = look.weight ** np.interp(heights, (0.6, 0.86), (1.0, 0.5))
    across = np.interp(heights, _HEIGHTS, _ACROSS) * girth * bulk
    belly = 1 + max(look.weight - 1.1, 0) * np.exp(-(((heights - 0.62) / 0.07) ** 2))
    deep = np.interp(heights, _HEIGHTS, _DEEP) * bulk * belly
    return across + ease, deep + ease


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

    def wear(self, paint: Paint, start: Any, end: Any, across: Any, deep: Any, caps: Any) -> Solid:
        return Solid(paint, self.at(*start), self.at(*end), across, deep, caps, self.turn)


def _head(look: Look, painter: Painter, skull: _Frame) -> Iterator[Solid]:
    skin, hat = painter.plain(look.skin), painter.plain(look.hat_colour, 0.1)
    strands = Cloth("pinstripe", look.hair_colour, scaled(look.hair_colour, 0.6), 0.3)
    hair = painter.fabric(strands, 0.05, 0.3)
    yield Solid(skin, skull.at(-0.012, -0.03), skull.at(0.004, 0.04), (0.032, 0.029, 0.028))
    face = painter.face(look)
    widths = (0.026, 0.036, 0.041, 0.043, 0.042), (0.038, 0.046, 0.05, 0.052, 0.05)
    yield skull.wear(face, (0.008, 0.022), (0.006, 0.106), *widths, (0.7, 0.85))
    trimmed = look.hair in {"bald", "crop", "short"}
    for side in (-0.042, 0.042) if trimmed else ():
        yield Solid(
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


def _arms(look: Look, pose: _Pose, painter: Painter, shoulder: Point) -> Iterator[Solid]:
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
        yield Solid(skin, wrist, tip, (0.017, 0.021, 0.013))
        if look.upper in {"tshirt", "sleeveless"}:
            yield Solid(skin, joint, bend, upper)
            yield Solid(skin, bend, wrist, fore)
        else:
            yield Solid(painter.fabric(cloth, 0.036, 0.2), joint, bend, upper + loose)
            sleeve = painter.fabric(cloth, 0.03, 0.22)
            yield Solid(sleeve, bend, wrist, fore + loose, caps=(1, 0.1))
        if look.upper == "tshirt":
            hem = _between(joint, bend, 0.5 + 0.2 * look.top.scale)
            yield Solid(painter.fabric(cloth, 0.036), joint, hem, upper + loose, caps=(1, 0))
        if look.bag == "handbag" and side == 1:
            rim, foot = _swing(tip, 0.09, 0.0), _swing(tip, 0.175, 0.0)
            handle = (0.022, 0.008, 0.03)
            yield Solid(bag, tip, rim, handle, (0.005, 0.005), (0, 0), math.pi / 2)
            body = (0.055, 0.065, 0.07), (0.02, 0.03, 0.032)
            yield Solid(bag, rim, foot, *body, (0.1, 0.1), math.pi / 2)


def _legs(look: Look, pose: _Pose, painter: Painter) -> tuple[float, float, list[Solid]]:
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
            solids.append(Solid(painter.fabric(look.bottom, 0.055, 0.2), hip, bend, upper))
            shank = painter.fabric(look.bottom, 0.045, 0.24)
            solids.append(Solid(shank, bend, ankle, tube, caps=(1, 0.4)))
        else:
            solids.append(Solid(skin, hip, bend, upper - 0.6 * loose))
            solids.append(Solid(skin, bend, ankle, lower))
            if look.boots:
                shaft = _between(bend, ankle, 0.45)
                solids.append(Solid(leather, shaft, ankle, lower[1:] + 0.006, caps=(0, 1)))
        if look.lower == "shorts":
            hem = _between(hip, bend, 0.62 + 0.25 * look.bottom.scale)
            leg = bulk * np.array((0.066, 0.066, 0.064))
            solids.append(Solid(painter.fabric(look.bottom, 0.06), hip, hem, leg, caps=(1, 0)))
        sin, cos = math.sin(tilt), math.cos(tilt)
        heel = (ankle[0], ankle[1] - 0.018 + 0.02 * sin, ankle[2] - 0.02 * cos)
        toe = (1.3 * ankle[0], ankle[1] - 0.026 + 0.11 * sin, ankle[2] + 0.095 * cos)
        last = (0.026, 0.028, 0.025, 0.02), (0.03, 0.03, 0.022, 0.016)
        solids.append(Solid(leather, heel, toe, *last, (0.8, 0.8)))
    return floor, spread, solids


def _body(look: Look, pose: _Pose, painter: Painter) -> list[Solid]:
    """Returns the solids of a person who stands on height 0 and walks forward."""
    hips, spread, solids = _legs(look, pose, painter)
    lean = math.tan(pose.lean)
    spine = _Frame((0.0, hips - 0.5, -0.5 * lean), lean, 0.0)

    dress = look.lower == "dress"
    bottom = look.top if dress else look.bottom
    seat = _trunk(look, 0.485, 0.61, 0.003)
    solids.append(
        Solid(
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
            Solid(painter.fabric(bottom, 0.1, 0.28), spine.at(0.0, 0.61), hem, *skirt, (0, 0))
        )

    low = 0.58 if dress else {"coat": 0.33, "jacket": 0.47, "hoodie": 0.475}.get(look.upper, 0.485)
    ease = {"tshirt": 0.005, "sleeveless": 0.005, "shirt": 0.007}.get(look.upper, 0.013)
    ease += 0.008 * (look.top.texture == "quilt")
    across, deep = _trunk(look, low, 0.862, ease)
    flare = np.clip((0.52 - np.linspace(low, 0.862, STEPS)) / 0.2, 0, 1) * (look.upper == "coat")
    across, deep = across + 0.02 * flare, deep + 0.9 * spread * flare
    torso = painter.torso(look, low, 0.862)
    solids.append(Solid(torso, spine.at(0.0, low), spine.at(0.0, 0.862), across, deep, (0, 0.3)))
    if look.upper == "hoodie":
        hood = (0.05, 0.052, 0.035), (0.03, 0.03, 0.02)
        solids.append(
            Solid(
                painter.fabric(look.top, 0.05), spine.at(-0.05, 0.845), spine.at(-0.06, 0.81), *hood
            )
        )
    if look.upper not in {"tshirt", "sleeveless"}:
        collar = painter.plain(scaled(look.top.colour, 0.85), 0.1)
        solids.append(
            Solid(
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
        back = -0.028 - float(deep[STEPS // 2])
        sack = (0.074, 0.082, 0.082, 0.078, 0.06), (0.05, 0.055, 0.048, 0.04, 0.03)
        solids.append(Solid(bag, spine.at(back, 0.60), spine.at(back, 0.80), *sack, (0.3, 0.4)))
        pocket = painter.plain(scaled(look.bag_colour, 0.8), 0.1)
        pouch = (0.06, 0.062, 0.058), (0.03, 0.032, 0.02)
        solids.append(
            Solid(
                pocket,
                spine.at(back - 0.035, 0.60),
                spine.at(back - 0.03, 0.68),
                *pouch,
                (0.3, 0.3),
            )
        )
    elif look.bag == "shoulder":
        beside = 0.024 + float(across[: STEPS // 4].max())
        pouch = (0.075, 0.08, 0.078), (0.026, 0.024, 0.016)
        ends = spine.at(-0.01, 0.47, beside), spine.at(-0.01, 0.56, beside)
        solids.append(Solid(bag, *ends, *pouch, (0.15, 0.15), math.pi / 2))
    return [
        *solids,
        *_arms(look, pose, painter, spine.at(-0.2 * lean, 0.792)),
        *_head(look, painter, _Frame(spine.at(0.0, 0.862), 0.0, pose.head)),
    ]


def stand(
    look: Look,
    camera: Camera,
    view: View,
    shape: tuple[int, int],
    rng: np.random.Generator,
    tiles: Tiles,
) -> Layer:
    """Returns a person of that look alone, caught in a random pose.

    Args:
        look: Who it is.
        camera: Where the light comes from.
        view: Where the person stands in the canvas, and at which scale for one of mean stature.
        shape: Rows and columns of the canvas.
        rng: Draws the pose and how clothes fall.
        tiles: The noise of `noise_tiles`.
    """
    layer = Layer.empty(shape)
    view = view._replace(scale=view.scale * look.stature)
    solids = _body(look, _draw_pose(rng), Painter(rng, tiles))
    # Front to back, so that what is hidden costs no shading.
    solids.sort(key=lambda solid: -view.project(solid.start)[2] - view.project(solid.end)[2])
    for solid in solids:
        layer.draw(solid, view, camera)
    layer.darken_hollows(view.scale)
    return layer
