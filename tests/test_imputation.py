"""Pixels taken out of images: against a dense system, and against pytorch-grad-cam's imputer."""

import numpy as np
import pytest
import reference
import torch
from pytorch_grad_cam.metrics.road import NoisyLinearImputer

from casn_plugin.imputation import without_pixels


def images(number: int = 2, rows: int = 9, columns: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    imgs = torch.randn(number, 3, rows, columns, generator=generator)
    return imgs, torch.rand(number, rows, columns, generator=generator) < 0.6


def test_pixels_are_the_mean_of_their_neighbours():
    imgs, removed = images()
    removed[1, :5] = True  # a whole area
    found = without_pixels(imgs, removed, noise=0.0)
    for i in range(2):
        expected = reference.imputed(imgs[i].numpy(), removed[i].numpy())
        np.testing.assert_allclose(found[i], expected, atol=1e-6)


def test_it_is_the_imputation_of_pytorch_grad_cam():
    imgs, removed = images(rows=16, columns=8)
    found = without_pixels(imgs, removed, noise=0.0)
    for i in range(2):
        expected = NoisyLinearImputer(noise=0.0)(imgs[i], 1 - removed[i].float())
        torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-5)


def test_the_noise_is_seeded_and_only_where_pixels_were():
    imgs, removed = images(rows=60, columns=50)
    before = imgs.clone()
    one, same = (without_pixels(imgs, removed, noise=0.5, seed=1) for _ in range(2))
    other, none = (without_pixels(imgs, removed, noise=n, seed=2) for n in (0.5, 0.0))
    assert torch.equal(one, same) and not torch.equal(one, other) and torch.equal(imgs, before)
    added = one - none
    assert not added[(~removed)[:, None].expand_as(added)].any()
    assert added[removed[:, None].expand_as(added)].std() == pytest.approx(0.5, rel=0.05)


def test_where_nothing_is_left_it_is_the_mean_colour():
    imgs, removed = images()
    removed[0], removed[1] = True, False
    mean = imgs.mean((2, 3), keepdim=True).expand_as(imgs)
    for fill in ("neighbours", "mean"):
        found = without_pixels(imgs, removed, fill=fill)
        assert torch.equal(found[0], mean[0]) and torch.equal(found[1], imgs[1])


def test_one_colour_or_the_mean_is_put_in():
    imgs, removed = images()
    black = torch.tensor([-2.0, -1.0, 0.5])
    for fill, colour in (("mean", imgs.mean((2, 3))), (black, black.expand(2, 3))):
        found = without_pixels(imgs, removed, fill=fill)
        expected = torch.where(removed[:, None], colour[:, :, None, None], imgs)
        assert torch.equal(found, expected)


def test_wrong_arguments(unchecked):
    imgs, removed = images()
    for kind, message, given in (
        (TypeError, "removed must be a bool tensor, got torch.float32", {"removed": removed * 1.0}),
        (ValueError, r"removed must be of shape \(2, 9, 7\)", {"removed": removed[:1]}),
        (ValueError, "fill must be of 3 channels", {"fill": torch.zeros(2)}),
        (ValueError, "fill must be 'neighbours' or 'mean'", {"fill": "black"}),
        (ValueError, "noise must be >= 0", {"noise": -1.0}),
        (TypeError, "imgs must be", {"imgs": imgs.long()}),
    ):
        with pytest.raises(kind, match=message):
            without_pixels(**{"imgs": imgs, "removed": removed, **given})
