"""Pictures are drawn where the attention is, without a display and in true colours."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from casn_plugin.visualization import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RIGHT,
    WRONG,
    denormalize,
    overlay,
    pair_mosaic,
    plot_cmc,
    plot_curves,
    plot_pair,
    plot_pairs,
    plot_ranking,
)


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.4, 0.3), (0.1, 0.2, 0.9))]
)
def test_denormalize_undoes_the_normalization(mean, std):
    pictures = torch.rand(2, 3, 6, 4)
    imgs = (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown = denormalize(imgs, mean, std)
    np.testing.assert_allclose(shown, pictures.permute(0, 2, 3, 1), atol=1e-6)
    assert denormalize(1e3 * imgs).max() <= 1


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


def test_pairs_are_marked_by_colour_and_by_words(tmp_path):
    pictures, maps = np.random.default_rng(0).random((3, 64, 32, 3)), torch.rand(3, 8, 4)
    figure = plot_pairs(pictures, pictures, maps, maps, [True, False, True], titles=["a", "b", "c"])
    words = [axis.get_xlabel() for axis in figure.axes]
    assert words.count("✓ same person") == 2 and words.count("✗ other person") == 1
    assert words.count("row maxima; distance 0.00") == 3
    figure.savefig(tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").stat().st_size > 10_000


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


@pytest.mark.parametrize("size", [(64, 32), (96, 96)])
def test_a_pair_is_explained_with_its_spans(size):
    pictures = np.random.default_rng(0).random((2, *size, 3))
    first, second = torch.zeros(8, 4), torch.zeros(8, 4)
    first[2:5, 1] = torch.tensor([0.5, 1.0, 0.4])
    second[5, 3] = 1.0
    first[0, 0] = second[7, 0] = 0.2  # below t
    figure = plot_pair(*pictures, first, second, headline="head", details="more", threshold=0.3)
    assert figure.get_suptitle() == "head" and figure.get_supxlabel().startswith("more")
    assert "rows 3 to 5 of 8" in figure.axes[2].get_xlabel()
    assert "rows 6 to 6 of 8" in figure.axes[4].get_xlabel()
    for axis, profile, span in (
        (figure.axes[2], [0.2, 0, 0.5, 1, 0.4, 0, 0, 0], (2, 5)),
        (figure.axes[4], [0, 0, 0, 0, 0, 1, 0, 0.2], (5, 6)),
    ):
        np.testing.assert_allclose(axis.lines[1].get_xdata(), profile)
        assert (axis.patches[0].get_y(), axis.patches[0].get_height()) == (span[0], np.ptp(span))
    assert [axis.xaxis_inverted() for axis in figure.axes[2:5]] == [False, False, True]
    covered = overlay(pictures, torch.stack([first, second]))
    for i, expected in ((0, pictures[0]), (1, covered[0]), (5, covered[1]), (6, pictures[1])):
        np.testing.assert_array_equal(figure.axes[i].images[0].get_array(), expected)
    aligned = {line.get_label(): line.get_xdata() for line in figure.axes[3].lines}
    np.testing.assert_allclose(aligned["second picture"], np.ones(8))
    assert aligned["first picture"][0] == 0.5 and aligned["first picture"].max() > 0.9
    figure.canvas.draw()


def test_a_ranked_list_sets_the_truth_apart():
    query, *matches = np.random.default_rng(0).random((4, 64, 32, 3))
    pictures, first, second = np.stack(matches), torch.rand(3, 8, 4), torch.rand(3, 8, 4)
    right = [False, True, True]
    plain = plot_ranking(query, pictures, first, second, right, list("abc"))
    apart = plot_ranking(query, pictures, first, second, right, list("abc"), apart=1)
    assert len(plain.axes) == len(apart.axes) == 12
    of_query = overlay(np.broadcast_to(query, pictures.shape), first)
    for row, panel in enumerate((pictures, overlay(pictures, second), of_query)):
        for i in range(3):
            axis = plain.axes[4 * row + 1 + i]
            np.testing.assert_array_equal(axis.images[0].get_array(), panel[i])
            frame = axis.spines["left"]
            assert frame.get_edgecolor() == to_rgba(RIGHT if right[i] else WRONG)
            assert (frame.get_linestyle() == "-") == right[i]
    for figure in (plain, apart):
        figure.canvas.draw()
    gaps = []
    for figure in (plain, apart):
        places = [axis.get_position() for axis in figure.axes if axis.get_xlabel() in list("abc")]
        gaps.append([b.x0 - a.x1 for a, b in itertools.pairwise(places)])
    assert gaps[0][1] == pytest.approx(gaps[0][0], abs=1e-3) and gaps[1][1] > 2 * gaps[1][0]


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_the_headline_of_a_ranked_list_fits_its_figure(number):
    picture, maps = np.zeros((64, 32, 3)), torch.rand(number, 8, 4)
    headline = "Person 1234 of camera 5: wrong at rank 1, found at rank 19732"
    figure = plot_ranking(
        picture, np.zeros((number, 64, 32, 3)), maps, maps, [True] * number, [""] * number,
        headline=headline,
    )  # fmt: skip
    figure.canvas.draw()
    (title,) = (text for text in figure.texts if text.get_text())
    assert title.get_text().replace("\n", " ") == headline
    box = title.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


def test_curves_show_every_term_and_ranking():
    ranking = {"mAP": 0.25, "cmc": [0.4, 0.8, 1.0]}
    results = {"features": ranking, "attention": ranking, "fused": ranking}
    history = [
        {"epoch": 1, "loss": 2.0, "loss_ide": 1.0},
        {"epoch": 2, "loss": 1.0, "loss_ia": 0.1},
    ]
    left, right = plot_curves(history, results).axes
    assert [line.get_label() for line in left.lines] == ["L (Eq. 6)", "L_ide", "L_ia"]
    assert [line.get_label() for line in right.lines] == [
        f"{name}: mAP 25.0%" for name in ("features", "attention", "fused")
    ]
    assert plot_curves([], results).axes
    (axis,) = plot_cmc({"fused": ranking}, max_rank=2).axes
    assert axis.lines[0].get_ydata() == pytest.approx([40, 80])
    assert list(axis.lines[0].get_xdata()) == [1, 2]


def test_no_window_toolkit_is_touched():
    script = (
        "import sys, torch, numpy as np\n"
        "from casn_plugin.visualization import plot_pair, plot_pairs, plot_ranking\n"
        "pictures, maps = np.zeros((1, 8, 4, 3)), torch.rand(1, 4, 2)\n"
        "plot_pairs(pictures, pictures, maps, maps, [True])\n"
        "plot_pair(pictures[0], pictures[0], maps[0], maps[0]).canvas.draw()\n"
        "plot_ranking(pictures[0], pictures, maps, maps, [True], ['']).canvas.draw()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
