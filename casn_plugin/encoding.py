"""What ranking needs of an image, computed once: its features and its attention basis."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from casn_plugin.doors import check_count, check_lengths, check_tensor


@dataclass(frozen=True)
class Encoding:
    """What ranking needs of N images: their features and what their attention maps are made of.

    Exactly one of `basis` and `activations` is there.

    Attributes:
        features: (N, D) eval features f of the backbone.
        basis: (N, D, H, W) attention basis B = PᵀA: the map of an image is ReLU(Σ_d α_d B_d).
        activations: (N, C, H, W) feature maps A, for features made of D / C normalised parts
            (PCB), whose basis would be larger than A.

    Contiguous maps, as :meth:`CASN.encode` gives them, are ranked fastest; others are copied.
    """

    features: Float[Tensor, "images dim"]
    basis: Float[Tensor, "images dim height width"] | None = None
    activations: Float[Tensor, "images channels height width"] | None = None

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError where not one is given, or where sizes do not fit."""
        check_tensor("features", self.features, "images dim")
        if (self.basis is None) == (self.activations is None):
            raise ValueError("an Encoding must hold either a basis or activations")
        check_tensor("maps", self.maps, "images channels height width")
        check_lengths(features=self.features, maps=self.maps)
        dim, channels = self.features.shape[1], self.maps.shape[1]
        if dim % channels or (self.basis is not None and dim != channels):
            raise ValueError(
                "a basis has a channel for each feature, activations have one for each feature of "
                f"a part: got {dim} features and {channels} channels"
            )

    @property
    def maps(self) -> Tensor:
        """The 4-D tensor: the basis or the activations."""
        maps = self.basis if self.basis is not None else self.activations
        assert maps is not None  # for the type checker: __post_init__ saw to it
        return maps

    @property
    def parts(self) -> int:
        """The number of normalised parts that the features are made of; 0 with a basis."""
        return 0 if self.basis is not None else self.features.shape[1] // self.maps.shape[1]

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.features)

    def __getitem__(self, rows: slice | Tensor) -> "Encoding":
        """Returns the encoding of some of the images."""
        return self._map(lambda tensor: tensor[rows])

    def features_of(self, rows: slice | Tensor) -> Tensor:
        """Returns the features of some of the images."""
        return self.features[rows]

    def expand(self, number: int) -> "Encoding":
        """Returns that of one image so many times, without copies of it.

        Raises:
            ValueError: it is of another number of images.

        Example:
            >>> len(Encoding(torch.rand(1, 4), basis=torch.rand(1, 4, 6, 3)).expand(5))
            5
        """
        if len(self) != 1:
            raise ValueError(f"expected the encoding of one image, got {len(self)}")
        return self._map(lambda tensor: tensor.expand(number, *tensor.shape[1:]))

    def to(self, *args: Any, **kwargs: Any) -> "Encoding":
        """Returns the encoding on another device or in another dtype, as ``Tensor.to`` does."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Encoding":
        return Encoding(
            function(self.features),
            None if self.basis is None else function(self.basis),
            None if self.activations is None else function(self.activations),
        )

    @staticmethod
    def cat(encodings: Sequence["Encoding"]) -> "Encoding":
        """Returns several encodings of one model as one.

        Raises:
            TypeError: something else than encodings.
            ValueError: no encoding, or encodings of unlike kinds, sizes or dtypes.

        Example:
            >>> one = Encoding(torch.rand(2, 4), basis=torch.rand(2, 4, 6, 3))
            >>> len(Encoding.cat([one, one]))
            4
        """
        encodings = list(encodings)
        for each in encodings:
            if not isinstance(each, Encoding):
                raise TypeError(f"expected encodings, got {type(each).__name__}")
        if len({encoding.basis is None for encoding in encodings}) != 1:
            raise ValueError(
                "expected at least one encoding, all with a basis or all with activations"
            )
        sizes = {
            (each.features.shape[1], each.maps.shape[1:], each.features.dtype, each.maps.dtype)
            for each in encodings
        }
        if len(sizes) > 1:
            raise ValueError(f"expected encodings of one model and size, got {len(sizes)} kinds")
        features = torch.cat([each.features for each in encodings])
        maps = torch.cat([each.maps for each in encodings])
        return Encoding(features, **{"activations" if encodings[0].parts else "basis": maps})


@runtime_checkable
class Encodings(Protocol):
    """A gallery that is read in parts: an :class:`Encoding`, an index on disk, or one of pictures.

    Rows are a slice, or a tensor of their numbers.
    """

    def __len__(self) -> int:
        """Returns the number of images."""

    def __getitem__(self, rows: slice | Tensor, /) -> Encoding:
        """Returns the encoding of some of the images."""

    def features_of(self, rows: slice | Tensor, /) -> Tensor:
        """Returns their features alone, without reading their maps."""


@runtime_checkable
class Ahead(Encodings, Protocol):
    """A gallery that works ahead where it is told what comes next."""

    def expect(self, rows: Tensor, /) -> None:
        """Says which images will be asked for next, in their order."""


def with_mirrored(encoding: Encoding, mirrored: Encoding) -> Encoding:
    """Returns the encoding of images averaged with their mirror images, exact for attention too.

    The feature is the mean of both, so the map (α, f) is made of is the sum of both halves: the
    basis is the mean of both bases, the mirror image's flipped back. Normalised parts (PCB) are
    pooled from the mean of both maps and normalised then.

    Args:
        encoding: of the images.
        mirrored: of the same images, flipped from left to right.

    Raises:
        ValueError: encodings of unlike kinds or sizes.

    Example:
        >>> images = Encoding(torch.ones(1, 2), basis=torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]]))
        >>> with_mirrored(images, images).basis
        tensor([[[[2., 2.]],
        <BLANKLINE>
                 [[2., 2.]]]])
    """
    if (encoding.basis is None) != (mirrored.basis is None) or (
        encoding.maps.shape != mirrored.maps.shape
    ):
        raise ValueError(
            "expected encodings of one kind and size, got maps of "
            f"{tuple(encoding.maps.shape)} and {tuple(mirrored.maps.shape)}"
        )
    maps = (encoding.maps + mirrored.maps.flip(3)) / 2
    if encoding.parts:
        return Encoding(part_embedding(maps, encoding.parts), activations=maps)
    return Encoding((encoding.features + mirrored.features) / 2, basis=maps)


def part_embedding(
    activations: Float[Tensor, "images channels height width"], parts: int
) -> Float[Tensor, "images dim"]:
    """Returns PCB's embedding: A pooled into horizontal parts, each of unit length, concatenated.

    Its D = C * parts values run over the parts of a channel first, as torchreid has them.

    Example:
        >>> part_embedding(torch.rand(2, 8, 12, 4), 6).norm(dim=1)
        tensor([2.4495, 2.4495])
    """
    return F.normalize(_parts(activations, parts), dim=1).flatten(1)


def part_scales(
    activations: Float[Tensor, "images channels height width"], parts: int
) -> Float[Tensor, "images parts"]:
    """Returns 1 / (‖g_p‖ HW) of each pooled part g_p, with ‖g_p‖ >= 1e-12 as in ``F.normalize``.

    Example:
        >>> part_scales(torch.ones(1, 4, 6, 2), 3)
        tensor([[0.0417, 0.0417, 0.0417]])
    """
    norms = _parts(activations, parts).norm(dim=1).clamp(min=1e-12)
    scales: Tensor = 1 / (norms * (activations.shape[2] * activations.shape[3]))
    return scales


def _parts(activations: Tensor, parts: int) -> Tensor:
    """Returns A pooled into horizontal parts, (B, C, parts)."""
    check_tensor("activations", activations, "images channels height width")
    check_count("parts", parts, most=2**15)
    pooled: Tensor = F.adaptive_avg_pool2d(activations, (parts, 1))
    return pooled.squeeze(3)
