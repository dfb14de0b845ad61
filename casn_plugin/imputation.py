"""Pixels taken out of images, and what is put in their place."""

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

from casn_plugin.doors import check_choice, check_seed, check_tensor, check_weight

Fill = Literal["neighbours", "mean"]
"""What stands where pixels were, if it is not one colour."""

_BESIDE = ((0, 1, 1 / 6), (1, 0, 1 / 6), (1, 1, 1 / 12), (1, -1, 1 / 12))
"""Half of a pixel's neighbours and their weights; the other half is the same, mirrored."""


def without_pixels(
    imgs: Float[Tensor, "images channels rows columns"],
    removed: Bool[Tensor, "images rows columns"],
    *,
    fill: Fill | Float[Tensor, " channels"] = "neighbours",
    noise: float = 0.01,
    seed: int = 0,
) -> Float[Tensor, "images channels rows columns"]:
    """Returns images without some of their pixels.

    "neighbours" is the noisy linear imputation of ROAD (Rong et al., ICML 2022): every removed
    pixel is the weighted mean of its eight neighbours, removed ones too, so that neither an edge
    nor a colour tells a network where something was. Where nothing is left, or with "mean", it is
    the image's mean colour.

    Args:
        imgs: images, normalised or not.
        removed: True where a pixel is removed.
        fill: what stands there: "neighbours", "mean" or one colour, as the images have it.
        noise: standard deviation of what "neighbours" adds to every pixel put in, >= 0.
        seed: of the noise.

    Raises:
        TypeError: images that are no float tensor, or a mask that is no boolean one.
        ValueError: a mask of another shape, another fill, or noise that is negative.

    Example:
        >>> imgs = torch.tensor([[[[1.0, 7.0, 3.0]]]])
        >>> removed = torch.tensor([[[False, True, False]]])
        >>> without_pixels(imgs, removed, noise=0.0)
        tensor([[[[1., 2., 3.]]]])
    """
    check_tensor("imgs", imgs, "images channels rows columns")
    if not isinstance(removed, Tensor) or removed.dtype != torch.bool:
        came = removed.dtype if isinstance(removed, Tensor) else type(removed).__name__
        raise TypeError(f"removed must be a bool tensor, got {came}")
    if removed.shape != imgs[:, 0].shape:
        raise ValueError(
            f"removed must be of shape {tuple(imgs[:, 0].shape)}, as imgs are, got "
            f"{tuple(removed.shape)}"
        )
    check_weight("noise", noise)
    seed = check_seed(seed)
    if isinstance(fill, Tensor):
        if fill.shape != imgs.shape[1:2]:
            raise ValueError(f"fill must be of {imgs.shape[1]} channels, got {tuple(fill.shape)}")
        put = fill.to(imgs)[:, None, None].expand_as(imgs[0]).expand_as(imgs)
        return torch.where(removed[:, None], put, imgs)
    check_choice("fill", fill, ("neighbours", "mean"))
    found = torch.where(removed[:, None], imgs.mean((2, 3), keepdim=True), imgs)
    if fill == "mean":
        return found
    generator = torch.Generator().manual_seed(seed)
    for i, mask in enumerate(removed.flatten(1).cpu().numpy()):
        if mask.any() and not mask.all():
            values = imgs[i].detach().flatten(1).T.double().cpu().numpy()
            put = torch.from_numpy(_of_neighbours(values, mask, imgs.shape[2:]))
            put = put + noise * torch.randn(put.shape, generator=generator, dtype=put.dtype)
            found[i].flatten(1)[:, removed[i].flatten()] = put.T.to(imgs)
    return found


def _of_neighbours(values: np.ndarray, mask: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Returns what removed pixels are if each is the weighted mean of its neighbours.

    Args:
        values: (pixels, channels) of the image.
        mask: (pixels,) which are removed: some, and not all.
        size: (rows, columns) of the image.
    """
    weights = _weights(*size)[mask]
    own, others = weights[:, mask], weights[:, ~mask]
    total = sparse.diags(np.asarray(weights.sum(1)).ravel())
    options = {"permc_spec": "MMD_AT_PLUS_A", "options": {"SymmetricMode": True}}
    found: np.ndarray = splu((total - own).tocsc(), **options).solve(others @ values[~mask])
    return found


@lru_cache(maxsize=4)
def _weights(rows: int, columns: int) -> Any:
    """Returns the (pixels, pixels) weights of each pixel's neighbours, as a sparse matrix."""
    number = np.arange(rows * columns).reshape(rows, columns)
    first, second, values = [], [], []
    for down, right, weight in _BESIDE:
        one = number[: rows - down, max(-right, 0) : columns - max(right, 0)].ravel()
        first.append(one)
        second.append(one + down * columns + right)
        values.append(np.full(len(one), weight))
    pixels = rows * columns
    half = sparse.coo_array(
        (np.concatenate(values), (np.concatenate(first), np.concatenate(second))),
        shape=(pixels, pixels),
    )
    return (half + half.T).tocsr()
