"""The body: what is worn on one side shows on that side."""

from dataclasses import replace

import numpy as np

from casn_plugin.pedestrians.body import stand
from casn_plugin.pedestrians.cameras import CAMERAS, View
from casn_plugin.pedestrians.looks import look_of
from casn_plugin.pedestrians.surfaces import noise_tiles


def test_a_backpack_shows_from_behind_and_the_face_from_the_front() -> None:
    skin, bag = (0.5, 0.0, 0.0), (0.0, 0.5, 0.0)
    look = replace(
        look_of(0, 1), skin=skin, bag="backpack", bag_colour=bag, hair="short", hat="none"
    )

    def seen(degrees: float) -> tuple[int, int]:
        view = View(np.radians(degrees), 0.1, 230.0, (64.0, 245.0))
        rng = np.random.default_rng(0)
        layer = stand(look, CAMERAS[0], view, (256, 128), rng, noise_tiles(0))
        red, green, blue = np.moveaxis(layer.colour, 2, 0)
        head = layer.cover[:60]
        return int(((red > 5 * green)[:60] & head).sum()), int((green > 5 * red + 5 * blue).sum())

    (face, straps), (nape, sack) = seen(0), seen(180)
    assert face > 2 * nape
    assert sack > 4 * straps > 0
