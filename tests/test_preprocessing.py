"""How pictures become what a model takes, and pictures again."""

import numpy as np
import PIL.Image
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
    with pytest.raises(ValueError, match="mean must be finite, got nan"):
        Preprocessing((8, 4), mean=(0.5, float("nan"), 0.5))
    for std in ((1e-300, 1.0, 1.0), (1.0, 1e-40, 1.0)):  # 0 in float32; what white is divided by
        with pytest.raises(ValueError, match="finite numbers of colours in float32, got"):
            Preprocessing((8, 4), std=std)


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5, 0.4, 0.3), (0.1, 0.2, 0.9))]
)
def test_pictures_are_the_images_before_normalization(mean, std):
    pictures = torch.rand(2, 3, 6, 4)
    imgs = (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shown = Preprocessing((6, 4), mean=mean, std=std).pictures(imgs)
    np.testing.assert_allclose(shown, pictures.permute(0, 2, 3, 1), atol=1e-6)
    assert Preprocessing((6, 4)).pictures(1e3 * imgs).max() <= 1


def test_black_is_black():
    prepared = Preprocessing((4, 2), (0.5, 0.4, 0.3), (0.1, 0.2, 0.9))
    expected = prepared.black[:, None, None].expand(3, 4, 2)
    torch.testing.assert_close(prepared.load(PIL.Image.new("RGB", (2, 4))), expected)


def test_numbers_of_every_kind_become_plain_ones(unchecked):
    for number in (np.float32, np.float64, torch.tensor):
        one = Preprocessing([np.int64(8), np.int64(4)], [number(0.5)] * 3, [number(0.25)] * 3)
        assert one == Preprocessing((8, 4), (0.5,) * 3, (0.25,) * 3)
        assert {type(each) for each in (*one.mean, *one.std)} == {float}
    for kind in (np.array, torch.tensor):
        one = Preprocessing(kind((8, 4)), kind((0.5,) * 3), kind((1, 2, 3)))
        assert one == Preprocessing((8, 4), (0.5,) * 3, (1, 2, 3)) and type(one.size[0]) is int
    for wrong in ({0.5, 0.4, 0.3}, torch.ones(3, 1, 1), [True] * 3, np.array(["a"] * 3), 0.5):
        with pytest.raises(TypeError, match="mean must be"):
            Preprocessing((8, 4), wrong)


def test_lists_are_as_good_as_tuples(unchecked):
    listed = Preprocessing([8, 4], [0.5] * 3, [0.2] * 3)
    assert listed == Preprocessing((8, 4), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert listed.size == (8, 4) and hash(listed)
