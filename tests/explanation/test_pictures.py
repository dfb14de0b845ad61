"""Pictures: attention is where the map is, in true colours, and told without colours too."""

import numpy as np
import pytest
import torch

from casn_plugin.explanation import overlay, pair_mosaic
from casn_plugin.explanation.pictures import RIGHT, WRONG


def test_the_overlay_peaks_where_the_map_does():
    pictures = np.full((2, 64, 32, 3), 0.5)
    maps = torch.zeros(2, 8, 4)
    maps[0, 6, 1] = 3.0
    shown = overlay(pictures, maps)
    changed = np.abs(shown - pictures).sum(-1)
    row, column = np.unravel_index(changed[0].argmax(), changed[0].shape)
    assert 6 * 8 <= row < 7 * 8 and 8 <= column < 16
    assert changed[1].max() == 0  # a blank map leaves the picture as it is
    assert changed[0][:32].max() == 0  # and so do rows without attention
    assert shown.min() >= 0 and shown.max() <= 1
    maps[0, 0, 0], maps[1] = torch.inf, torch.nan  # of a model that diverged
    np.testing.assert_array_equal(overlay(pictures, maps), shown)


@pytest.mark.parametrize("number", [1, 5])
def test_a_mosaic_has_a_row_for_each_pair(number):
    pictures = np.full((number, 48, 24, 3), 0.5)
    first, second = torch.zeros(number, 6, 3), torch.zeros(number, 6, 3)
    first[:, 1, 0], second[:, 4, 2] = 1, 1
    same = [i % 2 == 0 for i in range(number)]
    mosaic = pair_mosaic(pictures, pictures, first, second, same)
    assert mosaic.shape == (number * 54, 4 * 28 + 4, 3) and 0 <= mosaic.min() <= mosaic.max() <= 1
    for i, right in enumerate(same):
        row = mosaic[54 * i : 54 * i + 52]
        tiles = [row[2:50, left + 2 : left + 26] for left in (0, 28, 60, 88)]
        np.testing.assert_array_equal(tiles[0], pictures[i])
        np.testing.assert_array_equal(tiles[3], pictures[i])
        for tile, place in ((tiles[1], (1, 0)), (tiles[2], (4, 2))):
            peak = np.unravel_index(np.abs(tile - 0.5).sum(-1).argmax(), (48, 24))
            assert (peak[0] // 8, peak[1] // 8) == place
        frame = row[:, 60 + 28]  # the left edge of the last picture
        colour = np.array(
            [int((RIGHT if right else WRONG)[j : j + 2], 16) / 255 for j in (1, 3, 5)]
        )
        coloured = np.isclose(frame, colour).all(1)
        assert coloured.all() if right else 0.3 < coloured.mean() < 0.7  # whole or broken


def test_the_colours_of_attention_grow_lighter_evenly():
    """Told apart without seeing colours."""
    from matplotlib import colormaps

    lightness = colormaps["inferno"](np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    ramp = torch.linspace(0, 1, 64)[None, None].expand(1, 2, 64)
    shown = overlay(np.zeros((1, 2, 64, 3)), ramp)[0, 0] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(shown) >= 0).all() and shown[-1] > 0.5


def test_a_picture_stays_visible_below_the_strongest_attention():
    rng = np.random.default_rng(0)
    pictures = rng.random((1, 32, 16, 3))
    shown = overlay(pictures, torch.ones(1, 4, 2))
    correlation = np.corrcoef(pictures.ravel(), shown.ravel())[0, 1]
    assert correlation > 0.5  # covered wholly, and yet to be recognised
