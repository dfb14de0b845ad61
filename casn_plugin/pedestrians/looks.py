"""Who the people are: the look of every identity, and who is a look-alike of whom.

A look is a set of attributes (build, hair, clothes, bag ...), the same in all pictures of a person.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from casn_plugin.pedestrians.colours import BRIGHTS, DARKS, LIGHTS, MUTED, Colour, linear


class Cloth(NamedTuple):
    """What a garment is made of; `scale` is the size of its texture, 1 the usual one."""

    texture: str
    colour: Colour
    second: Colour
    scale: float


@dataclass(frozen=True)
class Look:
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
    top: Cloth
    contrast_sleeves: bool
    lower: str
    bottom: Cloth
    shoes: Colour
    boots: bool
    bag: str
    bag_colour: Colour


_SKINS = (0xE2B698, 0xD8A684, 0xCF9870, 0xB07A50, 0x7D5236, 0x553622)
_HAIRS = (0x15110F, 0x1E1713, 0x2E2119, 0x4A3222, 0x75502E, 0xB08A52, 0x8C3F22, 0x9A9894)
_DENIMS = (0x2B3750, 0x3D5275, 0x5A76A0, 0x7F98B8)


def pick(rng: np.random.Generator, options: dict[str, float]) -> str:
    """Returns one of the options, drawn by their shares."""
    weights = np.fromiter(options.values(), float)
    return str(rng.choice(list(options), p=weights / weights.sum()))


def _dye(rng: np.random.Generator, shares: Sequence[tuple[Sequence[int], float]]) -> Colour:
    """Returns a colour from one of the palettes, a little off the swatch."""
    weights = np.array([share for _, share in shares])
    palette = shares[int(rng.choice(len(shares), p=weights / weights.sum()))][0]
    red, green, blue = linear(int(rng.choice(palette)))
    value, tint = rng.uniform(0.75, 1.3), rng.uniform(0.9, 1.1, 2).tolist()
    return (
        min(red * value * tint[0], 0.9),
        min(green * value, 0.9),
        min(blue * value * tint[1], 0.9),
    )


def _top_cloth(rng: np.random.Generator, upper: str) -> Cloth:
    shares = ((DARKS, 0.34), (LIGHTS, 0.22), (MUTED, 0.2), (BRIGHTS, 0.24))
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
    texture = pick(rng, textures)
    colour = _dye(rng, shares)
    second = _dye(rng, ((LIGHTS, 0.5), (BRIGHTS, 0.3), (DARKS, 0.2)))
    if abs(sum(colour) - sum(second)) < 0.35:
        second = linear(0xE4E2DC) if sum(colour) < 0.9 else linear(0x202227)
    return Cloth(texture, colour, second, float(rng.uniform(0.75, 1.5)))


def _bottom_cloth(rng: np.random.Generator) -> Cloth:
    colour = _dye(
        rng, ((DARKS, 0.42), (_DENIMS, 0.33), (MUTED, 0.15), (LIGHTS, 0.05), (BRIGHTS, 0.05))
    )
    texture = pick(rng, {"plain": 0.84, "seam": 0.08, "check": 0.04, "floral": 0.04})
    return Cloth(texture, colour, _dye(rng, ((LIGHTS, 1.0),)), float(rng.uniform(0.7, 1.3)))


def _hair(rng: np.random.Generator, slender: bool) -> str:
    if slender:
        return pick(rng, {"long": 0.34, "tail": 0.24, "bob": 0.22, "bun": 0.12, "short": 0.08})
    return pick(rng, {"short": 0.72, "crop": 0.12, "bald": 0.1, "bob": 0.06})


def _bag(rng: np.random.Generator) -> str:
    return pick(rng, {"none": 0.42, "backpack": 0.28, "shoulder": 0.17, "handbag": 0.13})


def _accent(rng: np.random.Generator) -> Colour:
    return _dye(rng, ((DARKS, 0.5), (MUTED, 0.2), (BRIGHTS, 0.2), (LIGHTS, 0.1)))


def _draw_look(rng: np.random.Generator) -> Look:
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
    garment = pick(rng, upper)
    return Look(
        stature=float(rng.normal(0.97 if slender else 1.02, 0.03)),
        weight=float(np.clip(rng.normal(1.06 if slender else 1.2, 0.12), 0.86, 1.55)),
        shoulders=float(rng.normal(0.93 if slender else 1.06, 0.04)),
        hips=float(rng.normal(1.05 if slender else 0.97, 0.05)),
        skin=linear(int(rng.choice(_SKINS, p=(0.2, 0.26, 0.22, 0.16, 0.1, 0.06)))),
        hair=_hair(rng, slender),
        hair_colour=_dye(rng, ((_HAIRS[:3], 0.6), (_HAIRS[3:], 0.4))),
        beard=not slender and bool(rng.random() < 0.25),
        glasses=bool(rng.random() < 0.2),
        hat=pick(rng, {"none": 0.8, "cap": 0.12, "beanie": 0.08}),
        hat_colour=_accent(rng),
        upper=garment,
        top=_top_cloth(rng, garment),
        contrast_sleeves=bool(rng.random() < 0.12),
        lower=pick(rng, lower),
        bottom=_bottom_cloth(rng),
        shoes=_dye(rng, ((DARKS, 0.45), (LIGHTS, 0.3), (MUTED, 0.1), (BRIGHTS, 0.15))),
        boots=bool(rng.random() < 0.15),
        bag=_bag(rng),
        bag_colour=_accent(rng),
    )


_VARIATIONS: tuple[Callable[[np.random.Generator, Look], dict[str, Any]], ...] = (
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


def twin_of(pid: int) -> int | None:
    """Returns the identity that `pid` is a look-alike of, None for three in four.

    Example:
        >>> [twin_of(pid) for pid in range(1, 8)]
        [None, None, 2, None, None, None, 6]
    """
    return pid - 1 if pid % 4 == 3 else None


@lru_cache(maxsize=4096)
def look_of(seed: int, pid: int) -> Look:
    """Returns the look of an identity among the people of a seed.

    Example:
        >>> one, two = look_of(0, 2), look_of(0, 3)
        >>> one == two, one.skin == two.skin
        (False, True)
    """
    original = twin_of(pid)
    rng = np.random.default_rng([seed, pid, 0x100C])
    if original is None:
        return _draw_look(rng)
    look = look_of(seed, original)
    for which in rng.choice(len(_VARIATIONS), size=int(rng.integers(1, 3)), replace=False):
        look = replace(look, **_VARIATIONS[which](rng, look))
    return look
