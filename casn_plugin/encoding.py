"""What ranking needs of an image, computed once: its features and its attention basis.

The Siamese attention of a pair depends on the pair through the indicator α alone (Eq. 4), and
linearly: with P the image's pooled Jacobian GAP(∂f/∂A), its map is ReLU(Bᵀα), where the
attention basis B = PᵀA is computed once per image.
"""

import contextlib
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

    Maps in channels-last memory, as :func:`encode_head` gives them, are ranked fastest.
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

    def features_of(self, rows: slice) -> Tensor:
        """Returns the features of some of the images."""
        return self.features[rows]

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
    """A gallery that is read in blocks: an :class:`Encoding`, or an index on disk."""

    def __len__(self) -> int:
        """Returns the number of images."""

    def __getitem__(self, rows: slice, /) -> Encoding:
        """Returns the encoding of some of the images."""

    def features_of(self, rows: slice, /) -> Tensor:
        """Returns their features alone, without reading their maps."""


def encode_head(
    features: Float[Tensor, "images dim"],
    activations: Float[Tensor, "images channels height width"],
    pooled: Tensor | None = None,
    *,
    chunk: int = 32,
) -> Encoding:
    """Returns the encoding of images from their features and maps, still joined by a graph.

    Exact for any head in eval mode. One random vector-Jacobian product tells which of the closed
    forms, if any, the head of the network has: global average pooling (B = A / HW), normalised
    parts (PCB: A is kept), or neither (min(C, D) products with the head's Jacobian).

    Args:
        features: f, computed row by row from `activations` with gradients enabled.
        activations: the map A.
        pooled: (images, channels, 1, 1), where A goes into the head through its mean alone: the
            mean, a tensor of the same graph. The products then stop there, which is faster.
        chunk: products with the Jacobian at a time, where they are needed.

    Raises:
        TypeError: features or activations that are no float tensors.
        ValueError: no image, unlike numbers, other shapes, or features that do not depend on the
            activations.

    Example:
        >>> a = torch.rand(2, 8, 6, 3, requires_grad=True)
        >>> encode_head(a.mean((2, 3)), a).basis.shape
        torch.Size([2, 8, 6, 3])
    """
    check_tensor("features", features, "images dim")
    check_tensor("activations", activations, "images channels height width")
    if not check_lengths(features=features, activations=activations):
        raise ValueError("expected at least one image, got none")
    check_count("chunk", chunk)
    maps, values = activations.detach(), features.detach()
    generator = torch.Generator(features.device).manual_seed(0)
    probe = torch.randn(
        features.shape, generator=generator, device=features.device, dtype=features.dtype
    )
    gradients = None
    if features.requires_grad and activations.requires_grad:
        (gradients,) = torch.autograd.grad(
            features, activations, probe, retain_graph=True, allow_unused=True
        )
    if gradients is None:
        raise ValueError(
            "the features do not depend on the activations: expected features computed, with "
            "gradients enabled, from the very tensor that is given as activations"
        )
    channels, height, width = maps.shape[1:]
    means = maps.mean((2, 3))
    if _close(values, means) and _close(
        gradients, (probe / (height * width))[:, :, None, None].expand_as(gradients)
    ):
        return Encoding(values, basis=_channels_last(maps / (height * width)))
    parts, remainder = divmod(values.shape[1], channels)
    if not remainder and _close(values, part_embedding(maps, parts)):
        weights = _part_weights(values, maps, probe[:, None])[:, 0]
        if _close(gradients.mean((2, 3)), weights):
            return Encoding(values, activations=_channels_last(maps))
    source = activations
    if pooled is not None and pooled.requires_grad and _close(pooled.flatten(1), means):
        (pulled,) = torch.autograd.grad(features, pooled, probe, retain_graph=True)
        if _close(gradients, (pulled / (height * width)).expand_as(gradients)):
            source, maps = pooled, maps / (height * width)
    if channels < values.shape[1]:
        with contextlib.suppress(RuntimeError):  # HACNN's grid_sample has no second derivative
            basis = _basis_by_channel(features, source, maps, chunk)
            return Encoding(values, basis=_channels_last(basis))
    basis = maps.new_empty(*values.shape, height, width)
    unit = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    for start in range(0, values.shape[1], chunk):
        rows = unit[start : start + chunk, None].expand(-1, len(values), -1)
        (jacobian,) = torch.autograd.grad(
            features, source, rows, retain_graph=True, is_grads_batched=True
        )
        basis[:, start : start + chunk] = torch.einsum(
            "dbc,bchw->bdhw", jacobian.mean((3, 4)), maps
        )
    return Encoding(values, basis=_channels_last(basis))


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
    maps = _channels_last((encoding.maps + mirrored.maps.flip(3)) / 2)
    if encoding.parts:
        return Encoding(part_embedding(maps, encoding.parts), activations=maps)
    return Encoding((encoding.features + mirrored.features) / 2, basis=maps)


def _channels_last(maps: Tensor) -> Tensor:
    copied: Tensor = maps.contiguous(memory_format=torch.channels_last)
    return copied


def _basis_by_channel(features: Tensor, source: Tensor, maps: Tensor, chunk: int) -> Tensor:
    """Returns the attention basis by C products P e_k instead of D products Pᵀ e_d.

    v ↦ GAP(Jᵀ v) is linear, so differentiating it once more gives the columns of P.
    """
    cotangent = torch.zeros_like(features, requires_grad=True)
    (pulled,) = torch.autograd.grad(features, source, cotangent, create_graph=True)
    pooled = pulled.mean((2, 3))
    unit = torch.eye(pooled.shape[1], dtype=pooled.dtype, device=pooled.device)
    basis = maps.new_zeros(*features.shape, *maps.shape[2:])
    for start in range(0, pooled.shape[1], chunk):
        columns = unit[start : start + chunk, None].expand(-1, len(features), -1)
        (jacobian,) = torch.autograd.grad(
            pooled, cotangent, columns, retain_graph=True, is_grads_batched=True
        )
        basis += torch.einsum("cbd,bchw->bdhw", jacobian, maps[:, start : start + chunk])
    return basis


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
    pooled: Tensor = F.adaptive_avg_pool2d(activations, (check_count("parts", parts), 1))
    return pooled.squeeze(3)


def _part_weights(
    features: Float[Tensor, "images dim"],
    activations: Float[Tensor, "images channels height width"],
    alpha: Float[Tensor, "images others dim"],
) -> Float[Tensor, "images others channels"]:
    """Returns w = GAP(∂(α, f)/∂A) of normalised parts: Σ_p (α_p − f_p (f_p·α_p)) / (‖g_p‖ HW).

    g_p is the pooled part and f_p = g_p / ‖g_p‖.
    """
    channels = activations.shape[1]
    parts = features.shape[1] // channels
    scale = part_scales(activations, parts)
    unit = features.unflatten(1, (channels, parts))
    alpha = alpha.unflatten(2, (channels, parts))
    along = torch.einsum("nocp,ncp->nop", alpha, unit) * scale[:, None]
    return torch.einsum("nocp,np->noc", alpha, scale) - torch.einsum("nop,ncp->noc", along, unit)


def _close(first: Tensor, second: Tensor) -> bool:
    """Returns whether two tensors agree up to rounding, relative to their largest value."""
    if first.shape != second.shape:
        return False
    tolerance = 100 * torch.finfo(first.dtype).eps
    return bool((first - second).abs().max() <= tolerance * second.abs().max())
