"""Draws figures of every kind; no window toolkit may be touched on the way."""

import sys

import numpy as np
import torch

from casn_plugin.explanation import AttendedImage, plot_cmc, plot_curves, plot_pair, plot_ranking

image = AttendedImage(np.zeros((8, 4, 3)), torch.rand(4, 2))
plot_pair(image, image).canvas.draw()
plot_ranking(image.picture, [(image, image)], [True], [""]).canvas.draw()
ranking = {"mAP": 0.5, "cmc": [0.5, 1.0]}
results = {"features": ranking, "attention": ranking, "fused": ranking}
plot_curves([{"epoch": 1, "loss": 2.0}], results).canvas.draw()
plot_cmc(results).canvas.draw()
assert "matplotlib.pyplot" not in sys.modules
