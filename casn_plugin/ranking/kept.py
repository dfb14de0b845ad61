"""How an index keeps images: maps as they are, rounded, in 8 bits, or none; each with checksums."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from casn_plugin.encoding import Encoding
from casn_plugin.ranking.manifest import (
    DTYPES,
    EIGHT_BITS,
    Common,
    Manifest,
    dtype_name,
    same_images,
    size_of,
)

PARTS = {"features": ("features",), "maps": ("maps", "scales")}
"""What is read, and compared with its checksum, at a time, and the tensors that it is made of."""


@dataclass(frozen=True)
class Kept:
    """Images as a shard keeps them. :meth:`of` makes them from an encoding.

    Attributes:
        kind: what maps are, "basis" or "activations".
        features: the features.
        maps: maps; None where only features are kept.
        scales: what maps in 8 bits are times; None where they are kept in a float dtype.

    Example:
        >>> images = Encoding(torch.rand(2, 4), basis=torch.randn(2, 4, 6, 3))
        >>> kept = Kept.of(images, Manifest(model="0" * 64, dtype="int8"))
        >>> kept.maps.dtype, kept.scales.shape
        (torch.int8, torch.Size([2, 4]))
        >>> bool((kept.encoding(slice(0, 2)).maps - images.maps).abs().max() < 0.02)
        True
    """

    kind: str
    features: Float[Tensor, "images dim"]
    maps: Tensor | None = None
    scales: Float[Tensor, "images channels"] | None = None

    @classmethod
    def of(cls, encoding: Encoding, manifest: Manifest) -> "Kept":
        """Returns images as an index keeps them.

        Args:
            encoding: the images.
            manifest: of the index: says how.

        Raises:
            TypeError: features or maps of a dtype that no index keeps.
            ValueError: features or maps that are not finite, maps too large for the index's dtype,
                or an image's so small that they lose their digits in it.
        """
        _check_kept("features", encoding.features)
        kind = "basis" if encoding.basis is not None else "activations"
        features = encoding.features.detach().cpu().contiguous()
        if not manifest.maps:
            return cls(kind, features)
        _check_kept("maps", encoding.maps)
        maps, scales = encoding.maps.detach(), None
        if manifest.dtype == EIGHT_BITS:
            maps, scales = _in_eight_bits(maps)
            finite = scales.isfinite()
        else:
            maps = maps if manifest.dtype is None else maps.to(getattr(torch, manifest.dtype))
            finite = maps.isfinite()
        if not finite.all():
            raise ValueError(
                f"expected finite maps that torch.{manifest.dtype} can hold, got values up to "
                f"{encoding.maps.abs().max():.3g}"
            )
        maps = maps.cpu().contiguous()
        found = cls(kind, features, maps, None if scales is None else scales.cpu())
        if manifest.dtype is not None:
            _check_digits(encoding.maps.detach().cpu(), found, manifest.dtype)
        return found

    @classmethod
    def cat(cls, some: "Sequence[Kept]") -> "Kept":
        """Returns several, of which at least one is there and all are of one kind, as one.

        Raises:
            ValueError: images of unlike kinds, sizes or dtypes.
        """
        for each in some:
            same_images(some[0].images, each.images)
        every = [each.tensors for each in some]
        joined = {name: torch.cat([each[name] for each in every]) for name in every[0]}
        return cls(some[0].kind, **joined)

    @classmethod
    def none(cls, images: Common) -> "Kept":
        """Returns no images of those that have this in common.

        Example:
            >>> common = {"kind": "basis", "features": ["float32", 4], "maps": ["int8", 4, 6, 3]}
            >>> Kept.none(common).encoding(slice(0)).maps.shape
            torch.Size([0, 4, 6, 3])
        """
        features, maps = (
            size and torch.empty(0, *size[1:], dtype=getattr(torch, size[0]))
            for size in (images["features"], images["maps"])
        )
        if maps is None:
            return cls(images["kind"], features)
        scales = torch.empty(0, maps.shape[1]) if maps.dtype == torch.int8 else None
        return cls(images["kind"], features, maps, scales)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        every = {"features": self.features, "maps": self.maps, "scales": self.scales}
        return {name: each for name, each in every.items() if each is not None}

    @property
    def images(self) -> Common:
        """What the images have in common."""
        maps = None if self.maps is None else size_of(self.maps)
        return {"kind": self.kind, "features": size_of(self.features), "maps": maps}

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.features)

    def encoding(self, rows: slice | Tensor) -> Encoding:
        """Returns the encoding of some of the images, of which maps are kept."""
        assert self.maps is not None  # for the type checker: the caller has seen to it
        features, maps, *scales = (_picked(each, rows) for each in self.tensors.values())
        if scales:  # in one new block of memory, which costs more than the product
            maps = maps.to(torch.float32).mul_(scales[0][..., None, None]).to(features.dtype)
        return Encoding(features, **{self.kind: maps})

    def checksums(self, part: str, rows: Iterable[int]) -> UInt8[np.ndarray, "rows 32"]:
        """Returns a SHA-256 of a part (of :data:`PARTS`) of each of some images."""
        tensors = [each for name, each in self.tensors.items() if name in PARTS[part]]
        columns = [each.view(len(each), -1).view(torch.uint8).numpy() for each in tensors]
        digests = []
        for row in rows:
            found = hashlib.sha256()
            for column in columns:
                found.update(column[row].data)
            digests.append(found.digest())
        return np.frombuffer(bytearray(b"".join(digests)), np.uint8).reshape(-1, 32)


def _picked(values: Tensor, rows: slice | Tensor) -> Tensor:
    """Returns some of the rows; a slice of them is a view."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


def _in_eight_bits(
    maps: Float[Tensor, "images channels height width"],
) -> tuple[Int8[Tensor, "images channels height width"], Float[Tensor, "images channels"]]:
    """Returns maps as multiples of a scale for each channel of each image; zero stays zero."""
    maps = maps if maps.element_size() >= 4 else maps.float()
    scales = (maps.abs().amax((2, 3)) / 127).float()
    steps = maps / torch.where(scales > 0, scales, 1.0)[..., None, None]
    return steps.round_().clamp_(-127, 127).to(torch.int8), scales


def _check_digits(
    maps: Float[Tensor, "images channels height width"], kept: Kept, dtype: str
) -> None:
    """Raises ValueError for an image whose maps are read back otherwise, by more than rounding.

    A map is compared by its shape: its own maximum says how many digits it needs.
    """
    eight_bits = dtype == EIGHT_BITS
    read = torch.finfo(kept.features.dtype if eight_bits else getattr(torch, dtype))
    least = max(read.tiny, 127 * torch.finfo(torch.float32).tiny) if eight_bits else read.tiny
    values = maps.flatten(1)
    most = torch.maximum(values.amax(1), -values.amin(1)).double()
    rows = ((most > 0) & ((most < least) | (most > read.max))).nonzero()[:, 0]
    most, step = most[rows], 1 / 127 if eight_bits else read.eps
    off = (kept.encoding(rows).maps.double() - maps[rows].double()).flatten(1).abs().amax(1)
    lost = most[~(off <= step * most)]
    if len(lost):
        raise ValueError(
            f"expected maps that torch.{dtype} can hold to its digits, got values up to "
            f"{float(lost[0]):.3g} in {len(lost)} of {len(maps)} images: an index of dtype=None "
            "keeps maps as they are"
        )


def _check_kept(name: str, values: Tensor) -> None:
    """Raises an error for values that an index does not keep."""
    if dtype_name(values.dtype) not in DTYPES:
        raise TypeError(f"{name} must be of one of the dtypes {DTYPES}, got {values.dtype}")
    finite = values.isfinite()
    if not finite.all():
        raise ValueError(
            f"{name} must be finite, but {int((~finite).sum())} of {values.numel()} values are not"
        )
