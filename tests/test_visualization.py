"""Pictures are drawn where the attention is, without a display and in true colours."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from casn_plugin.visualization import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    denormalize,
    overlay,
    plot_curves,
    plot_pairs,
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


def test_pairs_are_marked_by_colour_and_by_words(tmp_path):
    pictures, maps = np.random.default_rng(0).random((3, 64, 32, 3)), torch.rand(3, 8, 4)
    figure = plot_pairs(pictures, pictures, maps, maps, [True, False, True], titles=["a", "b", "c"])
    words = [axis.get_xlabel() for axis in figure.axes]
    assert words.count("same person") == 2 and words.count("different person") == 1
    assert words.count("row maxima; distance 0.00") == 3
    figure.savefig(tmp_path / "pairs.png")
    assert (tmp_path / "pairs.png").stat().st_size > 10_000


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


def test_no_window_toolkit_is_touched():
    script = (
        "import sys, torch, numpy as np\n"
        "from casn_plugin.visualization import plot_pairs\n"
        "pictures = np.zeros((1, 8, 4, 3))\n"
        "plot_pairs(pictures, pictures, torch.rand(1, 4, 2), torch.rand(1, 4, 2), [True])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
