"""Solids: how wide a tube is in the canvas, and that the nearer one is seen."""

import numpy as np
import pytest

from casn_plugin.pedestrians.cameras import CAMERAS, View
from casn_plugin.pedestrians.solids import Layer, Solid

VIEW = View(0.0, 0.0, 100.0, (32.0, 120.0))


def tube(colour: tuple[float, float, float], ahead: float, radius: float = 0.1) -> Solid:
    def paint(share: np.ndarray, azimuth: np.ndarray, along: np.ndarray) -> np.ndarray:
        return np.full((len(share), 3), colour, np.float32)

    ends = (0.0, 0.2, ahead), (0.0, 1.0, ahead)
    return Solid(paint, *ends, (radius, radius), caps=(0.0, 0.0))


def test_a_tube_is_as_wide_and_high_as_its_scale_says() -> None:
    layer = Layer.empty((128, 64))
    assert not layer.cover.any()
    layer.draw(tube((1.0, 0.0, 0.0), 0.0), VIEW, CAMERAS[0])
    rows, columns = np.nonzero(layer.cover)
    assert columns.min() == pytest.approx(32 - 10, abs=1)
    assert columns.max() == pytest.approx(32 + 10, abs=1)
    assert rows.min() == pytest.approx(120 - 100, abs=1)
    assert rows.max() == pytest.approx(120 - 20, abs=1)


def test_the_nearer_solid_is_seen_in_whichever_order_they_are_drawn() -> None:
    near, far = tube((1.0, 0.0, 0.0), 0.3, 0.05), tube((0.0, 1.0, 0.0), -0.3)
    layers = []
    for order in ((near, far), (far, near)):
        layers.append(Layer.empty((128, 64)))
        for solid in order:
            layers[-1].draw(solid, VIEW, CAMERAS[0])
    assert np.array_equal(layers[0].colour, layers[1].colour)
    red, green, _ = np.moveaxis(layers[0].colour, 2, 0)
    assert red[60, 32] > 0 and green[60, 32] == 0
    assert green[60, 25] > 0 and red[60, 25] == 0


def test_a_layer_covers_a_picture_only_where_somebody_is() -> None:
    layer = Layer.empty((128, 64))
    layer.draw(tube((1.0, 1.0, 1.0), 0.0), VIEW, CAMERAS[0])
    picture = np.full((128, 64, 3), 7.0, np.float32)
    cover = layer.lay_over(picture)
    assert np.array_equal(cover, layer.cover) and 0 < cover.mean() < 1
    assert (picture[~cover] == 7.0).all()
    assert np.array_equal(picture[cover], layer.colour[cover])
