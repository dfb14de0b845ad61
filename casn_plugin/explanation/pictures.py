"""Pictures as arrays: attention over images, one image of a pair, a mosaic of pairs, data URIs."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor

from casn_plugin.attention import (
    ROW_THRESHOLD,
    align_profiles,
    attended_span,
    row_profiles,
    scale_maps,
)
from casn_plugin.doors import check_lengths, check_size, check_tensor, check_weight

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the field's green and red, of unlike lightness; never the only sign: words and broken lines too
RIGHT, WRONG = "#00875A", "#D7301F"


def overlay(
    pictures: Float[np.ndarray, "batch rows columns 3"],
    maps: Float[Tensor, "batch height width"],
    opacity: float = 0.6,
) -> Float[np.ndarray, "batch rows columns 3"]:
    """Returns pictures with their attention maps laid over them, RGB in [0, 1].

    Each map is scaled to its own maximum. Where it is low the picture shows as it is, and where
    it is high the colours of the perceptually uniform "inferno" cover it up to `opacity`.

    Args:
        pictures: RGB in [0, 1].
        maps: attention maps >= 0 of any resolution; what is not finite counts as none.
        opacity: of the colours where attention is highest, in [0, 1].

    Example:
        >>> overlay(np.full((1, 4, 4, 3), 0.5), torch.zeros(1, 2, 2))[0, 0, 0].tolist()
        [0.5, 0.5, 0.5]
    """
    from matplotlib import colormaps

    _check_pictures("pictures", pictures)
    check_lengths(pictures=pictures, maps=check_tensor("maps", maps, "batch height width"))
    if not 0 <= check_weight("opacity", opacity) <= 1:
        raise ValueError(f"opacity must lie in [0, 1], got {opacity}")
    rows, columns = pictures.shape[1:3]
    finite = maps.detach().float().cpu().nan_to_num(0, posinf=0)
    resized = F.interpolate(finite[:, None], size=(rows, columns), mode="bilinear")[:, 0]
    strength = scale_maps(resized).numpy()
    colours = colormaps["inferno"](strength)[..., :3]
    cover = opacity * strength[..., None]
    return np.asarray((1 - cover) * pictures + cover * colours, dtype=np.float64)


@dataclass(frozen=True, eq=False, repr=False)
class AttendedImage:
    """One image of a pair, and where the model looked in it for that pair.

    H and W are the rows and columns of the attention map.

    Attributes:
        picture: the image as RGB in [0, 1], (rows, columns, 3).
        attention: (H, W) its Siamese attention M, >= 0.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.

    Example:
        >>> attention = torch.tensor([[0.0, 0.1], [1.0, 0.5], [0.0, 0.5]])
        >>> image = AttendedImage(np.zeros((6, 4, 3)), attention)
        >>> image.profile, image.span, image
        (tensor([0.1000, 1.0000, 0.5000]), (1, 2), AttendedImage(rows 2 to 3 of 3))
    """

    picture: Float[np.ndarray, "rows columns 3"]
    attention: Float[Tensor, "height width"]
    row_threshold: float = ROW_THRESHOLD

    @property
    def profile(self) -> Float[Tensor, " height"]:
        """The row maxima M_m of the map scaled to [0, 1]."""
        return row_profiles(self.attention)

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last attended row; all rows of a blank map."""
        first, last = attended_span(self.profile, self.row_threshold)
        return int(first), int(last)

    @property
    def aligned(self) -> Float[Tensor, " height"]:
        """The attended rows M*_m, stretched to the map's height (paper, Eq. 5)."""
        return align_profiles(self.profile, self.row_threshold)

    @property
    def overlaid(self) -> Float[np.ndarray, "rows columns 3"]:
        """The picture with its attention laid over it."""
        (overlaid,) = overlay(self.picture[None], self.attention[None])
        return np.asarray(overlaid)

    def describe(self) -> str:
        """Returns the attended rows in words, counted from 1."""
        first, last = self.span
        rows = f"rows {first + 1} to {last + 1}" if self.attention.any() else "none"
        return f"{rows} of {len(self.attention)}"

    def __repr__(self) -> str:
        """Returns the attended rows on a line."""
        return f"AttendedImage({self.describe()})"


def pair_mosaic(
    first_pictures: Float[np.ndarray, "pairs rows columns 3"],
    second_pictures: Float[np.ndarray, "pairs rows columns 3"],
    first_maps: Float[Tensor, "pairs height width"],
    second_maps: Float[Tensor, "pairs height width"],
    same: Sequence[bool | None],
) -> Float[np.ndarray, "all_rows all_columns 3"]:
    """Returns one RGB picture in [0, 1] of pairs and their attention, a pair a row.

    Without text and without matplotlib's layout, so it is quick: for TensorBoard. From left to
    right: first picture, its attention, the second picture's attention, second picture. The
    frame of the last two is green where both show one identity, red and broken where they show
    two, and missing where that is not known.

    Args:
        first_pictures: RGB in [0, 1].
        second_pictures: the same for the second images.
        first_maps: attention of the first images in their pairs, >= 0.
        second_maps: that of the second images.
        same: whether each pair shows one identity; None where that is not known.

    Example:
        >>> pictures, maps = np.full((2, 16, 8, 3), 0.5), torch.rand(2, 4, 2)
        >>> pair_mosaic(pictures, pictures, maps, maps, [True, False]).shape
        (44, 52, 3)
    """
    from matplotlib.colors import to_rgb

    _check_pictures("first_pictures", first_pictures)
    _check_pictures("second_pictures", second_pictures)
    if first_pictures.shape != second_pictures.shape or len(same) != len(first_pictures):
        raise ValueError(
            f"expected as many first as second pictures of one size, and as many verdicts, got "
            f"{first_pictures.shape}, {second_pictures.shape} and {len(same)}"
        )
    _, rows, columns = first_pictures.shape[:3]
    edge = max(2, rows // 48)  # of the frames, and between pictures
    panels = (
        first_pictures,
        overlay(first_pictures, first_maps),
        overlay(second_pictures, second_maps),
        second_pictures,
    )
    height, width = rows + 2 * edge, columns + 2 * edge
    gap = 2 * edge  # between the two persons
    mosaic = np.ones((len(same) * (height + edge), 4 * width + gap, 3))
    for i, right in enumerate(same):
        for j, panel in enumerate(panels):
            top, left = i * (height + edge), j * width + (gap if j > 1 else 0)
            tile = mosaic[top : top + height, left : left + width]
            if j > 1 and right is not None:
                tile[:] = to_rgb(RIGHT if right else WRONG)
                if not right:  # broken lines: told apart without seeing colours
                    tile[np.arange(height) // (4 * edge) % 2 == 1] = 1
            tile[edge:-edge, edge:-edge] = panel[i]
    return mosaic


def colour_key(rows: int = 8, columns: int = 96) -> Float[np.ndarray, "rows columns 3"]:
    """Returns a strip with the colours of attention over grey, from none to the strongest.

    Example:
        >>> colour_key()[0, 0].tolist()
        [0.55, 0.55, 0.55]
    """
    check_size("size", (rows, columns))
    strip = np.full((1, rows, columns, 3), 0.55)
    (key,) = overlay(strip, torch.linspace(0, 1, columns).expand(1, rows, columns))
    return np.asarray(key)


def verdict(same: bool | None) -> str:
    """Returns the words, with a sign, for whether two pictures show one identity.

    Example:
        >>> verdict(True)
        '✓ same person'
    """
    if same is None:
        return "? not known"
    return "\N{CHECK MARK} same person" if same else "\N{BALLOT X} other person"


def _check_pictures(name: str, pictures: Any) -> None:
    """Raises TypeError or ValueError for what is no batch of RGB pictures."""
    if not isinstance(pictures, np.ndarray) or pictures.dtype.kind != "f":
        came = pictures.dtype if isinstance(pictures, np.ndarray) else type(pictures).__name__
        raise TypeError(f"{name} must be an array of floats, got {came}")
    if pictures.ndim != 4 or pictures.shape[3] != 3 or 0 in pictures.shape[1:]:
        raise ValueError(f"{name} must be of shape (batch, rows, columns, 3), got {pictures.shape}")


def jpeg_uri(picture: Float[np.ndarray, "rows columns 3"]) -> str:
    """Returns an RGB picture in [0, 1] as a data URI of a JPEG.

    Example:
        >>> jpeg_uri(np.zeros((8, 4, 3)))[:23]
        'data:image/jpeg;base64,'
    """
    stream = io.BytesIO()
    image = PIL.Image.fromarray((255 * picture).round().astype(np.uint8))
    image.save(stream, format="jpeg", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def png_uri(figure: "Figure", **options: Any) -> str:
    """Returns a figure as a data URI of a PNG; `options` are those of ``savefig``.

    Example:
        >>> from matplotlib.figure import Figure
        >>> png_uri(Figure(figsize=(1, 1)), dpi=10)[:22]
        'data:image/png;base64,'
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png", **options)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
