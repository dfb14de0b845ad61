"""How a layer's tensor is a map (B, C, H, W), and how the map is put back into the tensor.

A convolution gives maps as they are, Swin gives (B, H, W, C), a ViT (B, N, C) tokens, some of
which are no patches. Whatever else there is, is read by a function of the user.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Reshape = Callable[[Tensor], Tensor]
"""Maps a layer's tensor to (B, C, H, W), as pytorch-grad-cam's reshape_transform does."""

_MOST_PREFIX = 16  # class, distilled and register tokens of any ViT


@dataclass(frozen=True)
class Layout:
    """Where the channels and the positions of a map are in a layer's tensor.

    Attributes:
        kind: "channels first" (B, C, H, W), "channels last" (B, H, W, C), "tokens" (B, N, C) with
            the positions row by row, or "reshape".
        prefix: how many tokens before the patches are none: class, distilled and register tokens.
        stride: rows and columns of the image for each row and column of the map, of tokens.
        reshape: the user's function; it may move and leave out values, and make none.

    Example:
        >>> layout, tokens = Layout("tokens", 1, (16.0, 16.0)), torch.rand(2, 9, 5)
        >>> maps = layout.map_of(tokens, (64, 32))
        >>> maps.shape, torch.equal(layout.put_back(tokens, maps), tokens)
        (torch.Size([2, 5, 4, 2]), True)
    """

    kind: Literal["channels first", "channels last", "tokens", "reshape"] = "channels first"
    prefix: int = 0
    stride: tuple[float, float] = (1.0, 1.0)
    reshape: Reshape | None = None

    def map_of(self, value: Tensor, size: tuple[int, int]) -> Float[Tensor, "b c h w"]:
        """Returns the (B, C, H, W) map that a layer's tensor is.

        Args:
            value: what the layer takes or gives.
            size: (rows, columns) of the images.

        Raises:
            ValueError: a tensor of another rank, tokens that are no grid of this size, or a
                reshape that gives no such map.
        """
        if self.kind == "reshape":
            return self._reshaped(value)
        rank = 3 if self.kind == "tokens" else 4
        if value.ndim != rank:
            shape = {"tokens": "(B, N, C)", "channels last": "(B, H, W, C)"}
            raise ValueError(
                "the tapped layer must give a map of shape "
                f"{shape.get(self.kind, '(B, C, H, W)')}, but gave {tuple(value.shape)}"
            )
        if self.kind == "tokens":
            grid = self._grid(value.shape[1] - self.prefix, size)
            patches: Tensor = value[:, self.prefix :].transpose(1, 2)
            return patches.unflatten(2, grid)  # type: ignore[no-any-return]
        return value.permute(0, 3, 1, 2) if self.kind == "channels last" else value

    def put_back(self, value: Tensor, maps: Float[Tensor, "b c h w"]) -> Tensor:
        """Returns a layer's tensor with another map in it; all else in it stays."""
        if self.kind == "channels first":
            return maps
        if self.kind == "channels last":
            return maps.permute(0, 2, 3, 1)
        if self.kind == "tokens":
            patches = maps.flatten(2).transpose(1, 2)
            return torch.cat([value[:, : self.prefix], patches], 1) if self.prefix else patches
        places = self._reshaped(_numbered(value[:1]))[0].flatten().round().long()
        return value.flatten(1).index_copy(1, places, maps.flatten(1)).view_as(value)

    def _grid(self, number: int, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the rows and columns of so many patches of an image."""
        rows, columns = (
            {math.floor(side / step), math.ceil(side / step)}
            for side, step in zip(size, self.stride, strict=True)
        )
        for height in rows:
            for width in columns:
                if height * width == number:
                    return height, width
        raise ValueError(
            f"{number} tokens are no map of an image of {size[0]}x{size[1]} by patches of "
            f"{self.stride[0]:g}x{self.stride[1]:g}: say how they are read, with "
            "reshape=function(tokens) -> (B, C, H, W)"
        )

    def _reshaped(self, value: Tensor) -> Tensor:
        """Returns what the user's function makes of a tensor, if it is a map."""
        assert self.reshape is not None
        maps = self.reshape(value)
        if not isinstance(maps, Tensor) or maps.ndim != 4 or len(maps) != len(value):
            came = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            raise ValueError(
                f"reshape must give a map of shape (B, C, H, W), got {came} of a tensor of shape "
                f"{tuple(value.shape)}"
            )
        return maps


def by_reshape(reshape: Reshape, value: Tensor) -> Layout:
    """Returns the layout that a user's function reads.

    Args:
        reshape: the function.
        value: a tensor of the layer.

    Raises:
        ValueError: it does more than to move or leave out values: what it makes could then not
            be put back into the network.

    Example:
        >>> by_reshape(lambda x: x[:, 1:].mT.unflatten(2, (4, 2)), torch.rand(2, 9, 5)).kind
        'reshape'
    """
    layout = Layout("reshape", reshape=reshape)
    length = value[0].numel()
    numbers = _numbered(value[:1])
    places = layout.map_of(numbers, (1, 1)).double().flatten(1)
    noise = torch.randn(2, *value.shape[1:], dtype=numbers.dtype, device=value.device)
    moved = layout.map_of(noise, (1, 1)).flatten(1)
    known = ((places == places.round()) & (places >= 0) & (places < length)).all()
    if (
        not known
        or len(places.unique()) != places.numel()
        or not torch.equal(moved, noise.flatten(1)[:, places[0].long()].to(moved.dtype))
    ):
        raise ValueError(
            "reshape must only move values or leave some out, each image by itself: it computes "
            "new ones, or repeats them"
        )
    return layout


def _numbered(value: Tensor) -> Tensor:
    """Returns a tensor of the same shape that holds the place of each value in its image."""
    places = torch.arange(value[0].numel(), dtype=torch.float64, device=value.device)
    return places.view_as(value[0]).expand_as(value)


def token_grid(number: int, size: tuple[int, int], hint: int | None = None) -> Layout | None:
    """Returns how tokens are a map of the shape of the image, or None where they are none.

    Args:
        number: N, patches and others.
        size: (rows, columns) of the image.
        hint: how many the network says are no patches.

    Example:
        >>> token_grid(197, (224, 224)), token_grid(195, (224, 224))
        (Layout(kind='tokens', prefix=1, stride=(16.0, 16.0), reshape=None), None)
    """
    rows, columns = size
    for prefix in ([] if hint is None else [hint]) + list(range(_MOST_PREFIX)):
        patches = number - prefix
        height = round(math.sqrt(patches * rows / columns)) if patches > 0 else 0
        if height > 1 and patches % height == 0 and _of_one_shape(height, patches // height, size):
            return Layout("tokens", prefix, (rows / height, columns / (patches // height)))
    return None


def _of_one_shape(height: int, width: int, size: tuple[int, int]) -> bool:
    """Returns whether square patches of the image can be a map of so many rows and columns."""
    return height * size[1] == width * size[0] and size[0] % height == 0


def layout_by_gradient(gradients: Tensor) -> Layout | None:
    """Returns the layout that the gradient of a head with average pooling proves, or None.

    It is the same at all positions, and another for each channel.

    Args:
        gradients: of a random sum of the features with respect to the tensor, 4-D.

    Example:
        >>> pooled = torch.rand(2, 1, 1, 5).expand(2, 4, 3, 5)
        >>> layout_by_gradient(pooled).kind, layout_by_gradient(torch.rand(2, 4, 3, 5))
        ('channels last', None)
    """
    tolerance = 100 * torch.finfo(gradients.dtype).eps * gradients.abs().max()

    def constant(dims: tuple[int, int]) -> bool:
        spread = gradients.amax(dims) - gradients.amin(dims)
        return bool((spread <= tolerance).all())

    first, last = constant((2, 3)), constant((1, 2))
    if first == last:
        return None
    return Layout("channels first" if first else "channels last")


def layouts_by_size(shape: torch.Size, size: tuple[int, int]) -> list[Layout]:
    """Returns the layouts by which a 4-D tensor has the proportions of the image.

    Example:
        >>> [each.kind for each in layouts_by_size(torch.Size([2, 8, 4, 768]), (256, 128))]
        ['channels last']
    """
    found = []
    for kind, height, width in (
        ("channels first", shape[2], shape[3]),
        ("channels last", shape[1], shape[2]),
    ):
        # unpadded convolutions lose a row or two at the rims
        wide, high = height * size[1] / size[0] - width, width * size[0] / size[1] - height
        alike = abs(wide) <= 1.5 or abs(high) <= 1.5
        if alike and height <= size[0] and width <= size[1]:
            found.append(Layout(kind))  # type: ignore[arg-type]
    return found
