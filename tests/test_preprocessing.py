"""How pictures become what a model takes, and pictures again."""

import numpy as np
import pytest
import torch

from casn_plugin import Preprocessing
from casn_plugin.preprocessing import IMAGENET_MEAN, IMAGENET_STD


def test_images_are_dense(unchecked):
    with pytest.raises(TypeError, match="an image must be dense, got a tensor of layout"):
        Preprocessing((8, 4)).load(torch.rand(3, 8, 4).to_sparse())


def test_sizes_and_colours_that_can_not_be():
    with pytest.raises(ValueError, match="std positive, got"):
        Preprocessing((8, 4), std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="must be three numbers"):
        Preprocessing((8, 4), mean=(1.0, 0.0))


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.4, 0.3), (0.1, 0.2, 0.9))]
)
def test_pictures_are_the_images_before_normalization(mean, std):
    pictures = torch.rand(2, 3, 6, 4)
    imgs = (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown = Preprocessing((6, 4), mean=mean, std=std).pictures(imgs)
    np.testing.assert_allclose(shown, pictures.permute(0, 2, 3, 1), atol=1e-6)
    assert Preprocessing((6, 4)).pictures(1e3 * imgs).max() <= 1


def test_lists_are_as_good_as_tuples(unchecked):
    listed = Preprocessing([8, 4], [0.5] * 3, [0.2] * 3)
    assert listed == Preprocessing((8, 4), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert listed.size == (8, 4) and hash(listed)
