"""One side of a tile of pairs: images on the device, and the row profiles of their maps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from casn_plugin.attention import scale_maps
from casn_plugin.encoding import Ahead, Encoding, Encodings, part_scales
from casn_plugin.ranking.closed_form import Direction, PairForm
from casn_plugin.ranking.compute import Arithmetic

Align = Callable[[Tensor], Tensor]
"""Maps row profiles, (..., H), to aligned ones that are compared as they are."""


class Scratch:
    """Memory for the maps of some pairs, and for α and the channel weights that they are sums by.

    Args:
        arithmetic: where, in which numbers, and how much.

    Example:
        >>> Scratch(Arithmetic(torch.device("cpu"), torch.float32)).maps.take((2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.maps, self.weights = arithmetic.buffer(), arithmetic.buffer()
        self._numbers = arithmetic.buffer()

    def numbers(self, along: Tensor) -> Tensor:
        """Returns directions as what is multiplied: α as 0 or 1, until the next ones."""
        if along.dtype != torch.bool:
            return along
        return self._numbers.take(along.shape).copy_(along.view(torch.int8))


class _Parts(NamedTuple):
    """What maps are made of besides, where the features are normalised parts f_p = g_p / ‖g_p‖."""

    scale: Float[Tensor, "images parts"]  # 1 / (‖g_p‖ HW)
    unit: Float[Tensor, "images parts channels"]  # f_p
    own: Float[Tensor, "images parts positions"]  # f_p times A, scaled


@dataclass(frozen=True)
class Side:
    """Some images on the device: all that their attention maps are made of.

    :meth:`of` makes it from an encoding.

    Attributes:
        features: their features.
        keys: what the pair classifier looks at, see :mod:`casn_plugin.ranking.closed_form`.
        maps: the basis or the activations, rounded where operands are.
        size: (height, width) of the maps.
        parts: what is needed besides where the features are normalised parts.
    """

    features: Float[Tensor, "images dim"]
    keys: Float[Tensor, "images keys"]
    maps: Float[Tensor, "images channels positions"]
    size: tuple[int, int]
    parts: _Parts | None

    @classmethod
    def of(cls, images: Encoding, keys: Tensor, arithmetic: Arithmetic) -> "Side":
        """Returns images, which are on the device, as one side of tiles.

        Args:
            images: their encoding.
            keys: their keys.
            arithmetic: in which numbers.

        Example:
            >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
            >>> here = Arithmetic(torch.device("cpu"), torch.float32)
            >>> side = Side.of(images, images.features, here)
            >>> side.profiles(Direction(torch.ones(3, 1, 4)), Scratch(here), lambda x: x).shape
            torch.Size([3, 1, 6])
        """
        maps = images.maps.to(arithmetic.dtype)
        scale = part_scales(maps, images.parts) if images.parts else None
        if arithmetic.precision is not None:
            greatest = torch.linalg.vector_norm(maps, torch.inf, (1, 2, 3), keepdim=True)
            maps = maps / greatest.clamp(min=1e-30)
        operand = arithmetic.operand(maps.flatten(2)).contiguous()  # as products are fast
        parts = None
        if scale is not None:
            if arithmetic.precision is not None:
                scale = scale / scale.amax(1, keepdim=True)
            unit = images.features.unflatten(1, (maps.shape[1], images.parts))
            parts = _Parts(
                scale.to(operand.dtype),
                unit.transpose(1, 2).to(operand.dtype).contiguous(),
                torch.bmm((unit * scale[:, None]).mT.to(operand.dtype), operand),
            )
        return cls(images.features, keys, operand, (maps.shape[2], maps.shape[3]), parts)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.features)

    def __getitem__(self, rows: slice) -> "Side":
        """Returns some of the images."""
        parts = None if self.parts is None else _Parts(*(each[rows] for each in self.parts))
        return Side(self.features[rows], self.keys[rows], self.maps[rows], self.size, parts)

    def attention(
        self, direction: Direction, scratch: Scratch
    ) -> Float[Tensor, "images positions others"]:
        """Returns Σ_k w_k A_k of each image for each of its directions, before the ReLU.

        Args:
            direction: of the pairs of each image, the channels of a part together.
            scratch: where the result lies until the next one.
        """
        maps = self._maps_of(direction.along, scratch)
        if direction.less is not None:
            maps.baddbmm_(self._own[..., None], direction.less[:, None], alpha=-1)
        if direction.nowhere is not None:
            maps.masked_fill_(direction.nowhere[:, None], 0)
        return maps

    def profiles(
        self, direction: Direction, scratch: Scratch, align: Align
    ) -> Float[Tensor, "images others height"]:
        """Returns the row profiles of the maps: the largest value of each row, scaled to [0, 1].

        Args:
            direction: of the pairs of each image, the channels of a part together.
            scratch: where the maps of some images lie meanwhile.
            align: what is done to the profiles.
        """
        others, width = direction.along.shape[1], self.maps.shape[2]
        if self.parts is not None or direction.along.dtype == torch.bool:
            width = max(self.maps.shape[1:])  # weights, or α as numbers, take memory too
        profiles = self.features.new_empty(len(self), others, self.size[0])
        for some in scratch.maps.portions(len(self), each=others * width):
            maps = self[some].attention(direction.portion(some), scratch)
            profiles[some] = maps.unflatten(1, self.size).amax(2).mT
        # what is made of profiles is smaller: in larger portions, less time goes to Python
        for some in scratch.maps.portions(len(self), each=others * self.maps.shape[2]):
            profiles[some] = align(self._scaled(profiles[some]))
        return profiles

    def listed_profiles(
        self, rows: Int[Tensor, " pairs"], direction: Direction
    ) -> Float[Tensor, "pairs height"]:
        """Returns the row profiles of listed images, one for each direction.

        Args:
            rows: images of this side; equal ones stand together, their maps are one product.
            direction: of each pair, the channels of a part together.
        """
        weights = direction.along.to(self.maps.dtype)
        if self.parts is not None:  # as in _maps_of
            alpha = weights.unflatten(1, (self.parts.scale.shape[1], -1))
            weights = torch.bmm(self.parts.scale[rows, None], alpha)[:, 0]
            units = self.parts.unit.index_select(0, rows).flatten(0, 1)
        maps = weights.new_empty(len(rows), self.maps.shape[2])
        which, counts = rows.unique_consecutive(return_counts=True)
        for row, to, some in zip(
            which.tolist(),
            maps.split(counts.tolist()),
            weights.split(counts.tolist()),
            strict=True,
        ):
            torch.mm(some, self.maps[row], out=to)
        if self.parts is not None:
            onto_own = torch.bmm(units[:, None], alpha.flatten(0, 1)[..., None])
            own = self.parts.own.index_select(0, rows)
            maps -= torch.bmm(onto_own.view(len(own), 1, -1), own)[:, 0]
        if direction.less is not None:
            maps -= self._own.index_select(0, rows) * direction.less[:, None]
        if direction.nowhere is not None:
            maps[direction.nowhere] = 0
        return self._scaled(maps.unflatten(1, self.size).amax(2))

    def _maps_of(self, along: Shaped[Tensor, "#images others dim"], scratch: Scratch) -> Tensor:
        """Returns the maps along directions in the features, of each image or the same for all.

        Where the features are normalised parts, w = Σ_p (α_p − f_p (f_p·α_p)) / (‖g_p‖ HW) are the
        channel weights of α.
        """
        images, channels, positions = self.maps.shape
        others = along.shape[1]
        maps = scratch.maps.take((images, positions, others))
        along = along.expand(images, -1, -1)
        if self.parts is None:
            return self._sum(scratch.numbers(along), out=maps)
        scale, unit, own = self.parts
        weights = scratch.weights.take((images, others, channels))
        onto_own = []
        for part, its in enumerate(along.split(channels, 2)):
            its = scratch.numbers(its)
            if part:
                weights.addcmul_(its, scale[:, part, None, None])
            else:
                torch.mul(its, scale[:, :1, None], out=weights)
            onto_own.append(torch.bmm(unit[:, part, None], its.mT))
        return self._sum(weights, out=maps).baddbmm_(own.mT, torch.cat(onto_own, 1), alpha=-1)

    def _sum(self, weights: Float[Tensor, "images others channels"], out: Tensor) -> Tensor:
        """Returns Σ_k w_k A_k, (images, positions, others); one other goes by rows, as is fast."""
        if weights.shape[1] == 1:
            torch.bmm(weights, self.maps, out=out.mT)
            return out
        return torch.bmm(self.maps.mT, weights.mT, out=out)

    @cached_property
    def _own(self) -> Float[Tensor, "images positions"]:
        """The map of each image along its own key, of which directions take some away."""
        scratch = Scratch(Arithmetic(self.maps.device, self.maps.dtype))
        return self._maps_of(self.keys.to(self.maps.dtype)[:, None], scratch)[..., 0]

    def _scaled(self, rows: Float[Tensor, "*pairs height"]) -> Float[Tensor, "*pairs height"]:
        """Returns profiles in [0, 1] from the greatest values of the rows of maps."""
        return scale_maps(rows.relu_().to(self.features.dtype)[..., None])[..., 0]


class Images:
    """Queries or gallery images where they lie; some at a time come to the device.

    Args:
        encodings: the images.
        form: the pair classifier that looks at them.
        arithmetic: where to, and in which numbers.
        is_query: they are the first images of their pairs; the last ones asked for stay there.

    Example:
        >>> from casn_plugin.ranking.closed_form import pair_form
        >>> arithmetic = Arithmetic(torch.device("cpu"), torch.float32)
        >>> form = pair_form(torch.nn.Linear(4, 2), arithmetic, dim=4)
        >>> encoding = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> len(Images(encoding, form, arithmetic, is_query=True).side(slice(0, 2)))
        2
    """

    def __init__(
        self, encodings: Encodings, form: PairForm, arithmetic: Arithmetic, *, is_query: bool
    ) -> None:
        self._encodings, self._form, self._arithmetic = encodings, form, arithmetic
        self._is_query = is_query
        self._held: tuple[slice, Side] | None = None

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._encodings)

    @property
    def resident(self) -> bool:
        """Whether the maps are on the device already, just as they are needed."""
        return (
            isinstance(self._encodings, Encoding)
            and self._encodings.maps.device == self._arithmetic.device
            and self._encodings.maps.dtype == self._arithmetic.products
            and self._encodings.maps.is_contiguous()
            and self._arithmetic.precision is None
        )

    def expect(self, rows: Int[Tensor, " images"]) -> None:
        """Says which images come to the device next, in their order."""
        if isinstance(self._encodings, Ahead):
            self._encodings.expect(rows)

    def side(self, rows: slice | Tensor) -> Side:
        """Returns some of the images on the device; queries by a slice.

        Raises:
            ValueError: features that are not finite.
        """
        if self._held is not None and self._held[0] == rows:
            return self._held[1]
        self._held = None
        images = self._encodings[rows].to(self._arithmetic.device)
        keys = self._form.keys(_finite(images.features), is_query=self._is_query)
        side = Side.of(images, keys, self._arithmetic)
        if self._is_query and isinstance(rows, slice):
            self._held = rows, side
        return side

    def features(self, rows: slice | None = None, *, unit: bool) -> Float[Tensor, "images dim"]:
        """Returns features on the device, as they are compared.

        Args:
            rows: which; by default all.
            unit: of unit length.

        Raises:
            ValueError: features that are not finite.
        """
        features = self._encodings.features_of(slice(0, len(self)) if rows is None else rows)
        return as_compared(_finite(features.to(self._arithmetic.device)), unit=unit)


def map_bytes(images: Encoding, arithmetic: Arithmetic) -> tuple[int, int, int]:
    """Returns the bytes that a pair's profiles take, a listed pair's maps, and an image's side.

    The gallery's maps are taken to lie in memory as those of `images`, the queries, do.

    Example:
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> map_bytes(images, Arithmetic(torch.device("cpu"), torch.float32))
        (80, 1248, 256)
    """
    size, (channels, height, width) = arithmetic.products.itemsize, images.maps.shape[1:]
    of_pair = (3 * height + 2) * arithmetic.dtype.itemsize
    of_listed = size * (height * width + (2 * channels if images.parts else 0)) + 200 * height
    of_image = size * (channels * height * width + 4 * images.features.shape[1])
    copied = arithmetic.precision is not None or not images.maps.is_contiguous()
    return of_pair, of_listed, of_image * (2 if copied else 1)


def as_compared(features: Float[Tensor, "images dim"], *, unit: bool) -> Tensor:
    """Returns features of unit length, or as they are."""
    return F.normalize(features, dim=1) if unit else features


def _finite(features: Tensor) -> Tensor:
    """Returns features, or raises ValueError where they are none."""
    if not features.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinity")
    return features
