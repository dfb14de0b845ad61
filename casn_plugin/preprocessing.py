"""How pictures become what a model takes: size and colours."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from casn_plugin.doors import check_number, check_size, check_tensor
from casn_plugin.packages import needed
from casn_plugin.picturefiles import read_picture

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Image = Tensor | PIL.Image.Image | str | os.PathLike[str]
"""A normalised (3, rows, columns) tensor as the model takes it, a picture, or its path."""


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become what the model takes, and how that becomes a picture again.

    Attributes:
        size: (rows, columns) that pictures and paths are brought to. Tensors are taken as they
            are.
        mean: what pictures are normalised with, and tensors were: by default ImageNet's.
        std: likewise, positive.

    All three are kept as tuples of Python's own numbers, of whatever they were given as.

    Raises:
        TypeError: a size that is no two integers, mean or std of something else than numbers.
        ValueError: mean or std that are not three finite numbers, a std that is not positive, or
            so small that float32 has no number for black or white.

    Example:
        >>> Preprocessing((4, 2)).load(PIL.Image.new("RGB", (8, 8))).shape
        torch.Size([3, 4, 2])
    """

    size: tuple[int, int]
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Makes plain tuples of what is given; raises TypeError or ValueError for what can't be."""
        object.__setattr__(self, "size", check_size("size", self.size))
        for name in ("mean", "std"):
            given = getattr(self, name)
            listed = given.tolist() if isinstance(given, np.ndarray | Tensor) else given
            if not isinstance(listed, Sequence) or isinstance(listed, str | bytes):
                raise TypeError(f"{name} must be three numbers, got {given!r}")
            object.__setattr__(self, name, tuple(check_number(name, each) for each in listed))
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(
                f"mean and std must be three numbers, std positive, got {self.mean} and {self.std}"
            )
        with np.errstate(all="ignore"):
            mean, std = (np.asarray(each, np.float32) for each in (self.mean, self.std))
            finite = np.isfinite([-mean / std, (1 - mean) / std]).all()
        if not finite:
            raise ValueError(
                "mean and std must make finite numbers of colours in float32, got "
                f"{self.mean} and {self.std}"
            )

    @classmethod
    def of(cls, datamanager: Any) -> "Preprocessing":
        """Returns how a torchreid data manager prepares test images.

        The colours are ImageNet's where it does not say.
        """
        prepared = getattr(datamanager, "transform_te", None)
        size = datamanager.height, datamanager.width
        for transform in reversed(getattr(prepared, "transforms", [prepared])):
            if hasattr(transform, "mean") and hasattr(transform, "std"):
                return cls(size, transform.mean, transform.std)
        return cls(size)

    @property
    def black(self) -> Float[Tensor, " 3"]:
        """What a black pixel is once it is normalised."""
        return -torch.tensor(self.mean) / torch.tensor(self.std)

    def load(self, image: Image) -> Float[Tensor, "3 rows columns"]:
        """Returns a normalised image, upright, and otherwise as torchreid prepares test images.

        Raises:
            TypeError: an image of none of the kinds.
            ValueError: a tensor of another shape, or a picture of values whose range is not
                known, such as floats.
            OSError: a path that is no picture, one of a rare format, or a damaged one.
        """
        with needed():
            from torchvision.transforms import functional as transforms

        if isinstance(image, Tensor):
            return check_tensor("an image", image, "3 rows columns")
        if not isinstance(image, str | os.PathLike | PIL.Image.Image):
            raise TypeError(
                f"an image must be a tensor, a PIL image or a path, got {type(image).__name__}"
            )
        upright = read_picture(image)
        resized = transforms.to_tensor(transforms.resize(upright, list(self.size)))
        normalised: Tensor = transforms.normalize(resized, list(self.mean), list(self.std))
        return normalised

    def pictures(
        self, imgs: Float[Tensor, "images 3 rows columns"]
    ) -> Float[np.ndarray, "images rows columns 3"]:
        """Returns normalised images as RGB pictures in [0, 1], channels last.

        Example:
            >>> Preprocessing((2, 2)).pictures(torch.zeros(1, 3, 2, 2))[0, 0, 0].round(3).tolist()
            [0.485, 0.456, 0.406]
        """
        rgb = imgs.detach().float().cpu() * torch.tensor(self.std)[:, None, None]
        rgb = (rgb + torch.tensor(self.mean)[:, None, None]).clamp(0, 1)
        return np.asarray(rgb.permute(0, 2, 3, 1).numpy(), dtype=np.float64)
