"""Figures: a pair and a ranked list are drawn with all that is said of them, without a display."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROGRAMS
from matplotlib.colors import to_rgba

from casn_plugin.explanation import AttendedImage, overlay, plot_pair, plot_ranking
from casn_plugin.explanation.pictures import RIGHT, WRONG


@pytest.mark.parametrize("size", [(64, 32), (96, 96)])
def test_a_pair_is_explained_with_its_spans(size):
    pictures = np.random.default_rng(0).random((2, *size, 3))
    first, second = torch.zeros(8, 4), torch.zeros(8, 4)
    first[2:5, 1] = torch.tensor([0.5, 1.0, 0.4])
    second[5, 3] = 1.0
    first[0, 0] = second[7, 0] = 0.2  # below t
    images = [AttendedImage(picture, attention, 0.3)
              for picture, attention in zip(pictures, (first, second), strict=True)]  # fmt: skip
    figure = plot_pair(*images, headline="head", details="more")
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
    pairs = [(AttendedImage(query, first[i]), AttendedImage(pictures[i], second[i]))
             for i in range(3)]  # fmt: skip
    plain = plot_ranking(query, pairs, right, list("abc"))
    apart = plot_ranking(query, pairs, right, list("abc"), apart=1)
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
def test_the_words_of_a_ranked_list_fit_its_figure(number):
    image = AttendedImage(np.zeros((64, 32, 3)), torch.rand(8, 4))
    headline = "Person 1234 of camera 5: wrong at rank 1, found at rank 19732"
    pairs = [(image, image)] * number
    figure = plot_ranking(image.picture, pairs, [True] * number, [""] * number, headline=headline)
    figure.canvas.draw()
    title, below = (text for text in figure.texts if text.get_text())
    assert title.get_text().replace("\n", " ") == headline
    said = below.get_text().replace("\n", " ")
    assert "red and broken, another" in said and said.endswith("the rank by features alone.")
    for text in (title, below):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height


def test_no_window_toolkit_is_touched():
    program = PROGRAMS / "figures_without_windows.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
