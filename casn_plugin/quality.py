"""How good attention maps are: against person masks, and on images of one person."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float
from torch import Tensor

from casn_plugin.attention import ROW_THRESHOLD, scale_maps
from casn_plugin.doors import check_same, check_share, check_tensor
from casn_plugin.evaluation import verification_auc


@dataclass(frozen=True)
class AttentionQuality:
    """How well each attention map covers the person, as :func:`attention_quality` finds it.

    All are in [0, 1], one value an image, NaN where the map is blank or no person is seen;
    ``nanmean()`` averages the others.

    Attributes:
        energy: share of the map's sum that lies on the person.
        iou: intersection over union of the person and what the map attends.
        pointing: 1 where the map's peak lies on the person, 0 elsewhere (the pointing game).
        coverage: share of the body's rows that the map attends.
    """

    energy: Float[Tensor, " images"]
    iou: Float[Tensor, " images"]
    pointing: Float[Tensor, " images"]
    coverage: Float[Tensor, " images"]


def attention_quality(
    maps: Float[Tensor, "images height width"],
    masks: Float[Tensor, "images rows columns"] | Bool[Tensor, "images rows columns"],
    *,
    pixel_threshold: float = 0.5,
    row_threshold: float = ROW_THRESHOLD,
) -> AttentionQuality:
    """Returns how well attention maps cover the people that the masks show.

    Maps are resized to the masks (bilinear, half-pixel centres) and scaled to [0, 1] by their
    own maximum. The peak is the centre of the highest cell before that, the first of equal ones.

    Args:
        maps: attention maps >= 0 of any resolution.
        masks: 1 or True where the person is seen, 0 or False elsewhere. What lies between counts
            in `energy` as a share of the pixel, elsewhere as the person from 0.5 on.
        pixel_threshold: share of the map's maximum above which a pixel is attended, for `iou`.
        row_threshold: t, the share of the map's maximum above which a row's largest value must
            lie for the row to be attended, for `coverage`.

    Raises:
        ValueError: unlike numbers of maps and masks, maps or masks without a cell, values that are
            negative or not finite, masks above 1, or thresholds outside [0, 1).

    Example:
        >>> maps = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
        >>> person = torch.tensor([[[True, False], [True, False], [True, False]]])
        >>> quality = attention_quality(maps, person, pixel_threshold=0.4)
        >>> quality.energy.item(), quality.iou.item(), quality.pointing.item()
        (0.5, 0.5, 0.0)
        >>> quality.coverage.item()
        1.0
    """
    check_share("pixel_threshold", pixel_threshold)
    check_share("row_threshold", row_threshold)
    check_tensor("maps", maps, "*images")
    if not isinstance(masks, Tensor) or masks.is_complex() or masks.layout != torch.strided:
        raise TypeError(
            f"masks must be a dense tensor of bool or float, got {type(masks).__name__}"
        )
    if maps.ndim != 3 or masks.ndim != 3 or len(maps) != len(masks):
        raise ValueError(
            "expected maps of shape (N, H, W) and masks of shape (N, rows, columns), got "
            f"{tuple(maps.shape)} and {tuple(masks.shape)}"
        )
    maps = maps.detach()
    masks = masks.to(maps.device, torch.promote_types(maps.dtype, torch.float32))
    for name, values, most in (("maps", maps, float("inf")), ("masks", masks, 1.0)):
        if len(values) and not values.numel():
            raise ValueError(f"{name} must have at least one cell, got {tuple(values.shape)}")
        if not bool(((values >= 0) & (values <= most) & values.isfinite()).all()):
            limits = "finite and >= 0" if most > 1 else "in [0, 1]"
            raise ValueError(f"{name} must be {limits}")
    height, width = maps.shape[1:]
    rows, columns = masks.shape[1:]
    maps = maps.to(masks.dtype)
    peak = maps.flatten(1).argmax(1)
    row, column = peak // width, peak % width
    row, column = (2 * row + 1) * rows // (2 * height), (2 * column + 1) * columns // (2 * width)
    resized = F.interpolate(
        maps[:, None], size=(rows, columns), mode="bilinear", align_corners=False
    )
    maps, person = scale_maps(resized[:, 0]), masks >= 0.5
    attended, body = maps > pixel_threshold, person.any(2)
    shares = (
        (maps * masks).sum((1, 2)) / maps.sum((1, 2)),
        (attended & person).sum((1, 2)) / (attended | person).sum((1, 2)),
        person[torch.arange(len(maps), device=maps.device), row, column].to(masks.dtype),
        ((maps.amax(2) > row_threshold) & body).sum(1) / body.sum(1),
    )
    blank = (maps.amax((1, 2)) <= 0) | ~body.any(1)
    return AttentionQuality(
        *(share.to(masks.dtype).masked_fill(blank, torch.nan) for share in shares)
    )


@dataclass(frozen=True)
class AttentionConsistency:
    """How alike attention is on images of one person, as :func:`attention_consistency` finds it.

    Attributes:
        same: mean distance of pairs of one identity.
        different: mean distance of pairs of two identities.
        auc: ROC AUC of telling them apart by the distance; 0.5 = chance.
    """

    same: float
    different: float
    auc: float


def attention_consistency(
    distances: Float[Tensor, "*pairs"], same: Bool[Tensor, "*pairs"]
) -> AttentionConsistency:
    """Returns how far aligned profiles of same and of different identities lie apart.

    Args:
        distances: of pairs of any shape, e.g. of :func:`casn_plugin.attention_distmat` or
            :func:`casn_plugin.attention.attention_distance`.
        same: whether each pair shows one identity.

    Returns:
        NaN where pairs of the one kind or the other are missing.

    Raises:
        ValueError: unlike shapes, or distances that are negative or NaN.

    Example:
        >>> attention_consistency(torch.tensor([0.5, 2.0, 1.0]), torch.tensor([True, False, False]))
        AttentionConsistency(same=0.5, different=1.5, auc=1.0)
    """
    check_tensor("distances", distances, "*pairs")
    check_same("same", same, distances.shape)
    distances = distances.detach()
    if not bool((distances >= 0).all()):
        raise ValueError("distances must be >= 0 and not NaN")
    return AttentionConsistency(
        same=distances[same].double().mean().item(),
        different=distances[~same].double().mean().item(),
        auc=verification_auc(-distances, same),
    )
