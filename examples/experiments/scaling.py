"""Maps scaled to [0, 1] by their least and greatest value; the package has the greatest alone.

It is no option of the package: the laboratory measures it alone, in training (both losses) and in
ranking. ``--map-scale range`` of protocols.py turns it on.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from casn_plugin import Encoding, IdentificationAttentionLoss, SiameseAttentionLoss
from casn_plugin.attention import (
    attention_distance,
    grad_cam,
    scale_maps,
    soft_mask,
)
from casn_plugin.ranking import pair_attention
from casn_plugin.scores import Logits, identity_scores

CHUNK = 512
"""Pairs whose maps are held at a time."""


def profiles_by_range(maps: Tensor) -> Tensor:
    """Returns the (..., H) row maxima of (..., H, W) maps, scaled by their range.

    Example:
        >>> profiles_by_range(torch.tensor([[1.0, 2.0], [4.0, 1.0], [3.0, 3.0]]))
        tensor([0.0000, 1.0000, 0.5000])
    """
    rows = maps.amax(-1, keepdim=True)
    return scale_maps(rows - rows.amin(-2, keepdim=True))[..., 0]


class IdentificationByRange(IdentificationAttentionLoss):
    """L_ia whose mask is made of maps scaled by their range."""

    def mask(self, imgs: Tensor, pids: Tensor, logits: Logits, activations: Tensor) -> Tensor:
        """Returns the masked images I·(1 − Σ(M)) (paper, Section 3.1.2)."""
        size = imgs.shape[2], imgs.shape[3]
        maps = grad_cam(identity_scores(logits, pids), activations)
        maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        mask = soft_mask(
            maps - maps.amin((-2, -1), keepdim=True),
            size,
            mask_scale=self.mask_scale,
            mask_threshold=self.mask_threshold,
        )[:, None].to(imgs.dtype)
        fill = self.fill.to(mask) if isinstance(self.fill, Tensor) else self.fill
        return imgs * (1 - mask) + fill * mask


class SiameseByRange(SiameseAttentionLoss):
    """L_sa whose profiles are scaled by their range."""

    def profiles(self, maps: Tensor) -> Tensor:
        """Returns profiles scaled by their range."""
        return profiles_by_range(maps)


def distmat_by_range(
    model: nn.Module, query: Encoding, gallery: Encoding, *, row_threshold: float, unit: bool
) -> Tensor:
    """Returns the (Q, G) attention distances of profiles scaled by their range.

    The package's own ranking never holds the maps of all pairs; here they are made, pair by pair.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> distmat_by_range(model, images[:1], images, row_threshold=0.2, unit=False).shape
        torch.Size([1, 3])
    """
    distmat = query.features.new_empty(len(query), len(gallery))
    for row in range(len(query)):
        for start in range(0, len(gallery), CHUNK):
            images = gallery[start : start + CHUNK]
            alike = query[torch.full((len(images),), row)]
            maps = pair_attention(model, alike, images)
            profiles = (profiles_by_range(each) for each in maps)
            distances = attention_distance(*profiles, row_threshold=row_threshold, unit=unit)
            distmat[row, start : start + CHUNK] = distances.to(distmat.device)
    return distmat
