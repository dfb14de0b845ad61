"""Distances of features and of attention, "normalized and summed for final ranking" (Section 4)."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from casn_plugin.attention import ROW_THRESHOLD
from casn_plugin.doors import (
    check_choice,
    check_count,
    check_kind,
    check_matrix,
    check_settings,
    check_weight,
)
from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.identities import as_ids
from casn_plugin.ranking.compute import Compute
from casn_plugin.ranking.distances import attention_distmat

Normalization = Literal["unit", "query", "global"]
"""How distances are "normalized" before they are summed: see :func:`fuse_distmats`."""

_READINGS = ("unit", "query", "global")

FeatureDistances = Callable[[Tensor, Tensor], Tensor]
"""Maps (Q, D) and (G, D) features to the (Q, G) matrix of their distances."""


class Counting(TypedDict):
    """What counts as a match: arguments of :func:`casn_plugin.evaluation.evaluate_rank`."""

    cross_camera: bool
    junk_pids: tuple[int, ...]


@dataclass(frozen=True)
class RankingOptions:
    """How distances of features and of attention become one ranking (paper, Section 4).

    Attributes:
        normalization: how the two distances are normalised before they are summed, "unit",
            "query" or "global": see :func:`fuse_distmats`.
        attention_weight: weight of the attention distance, >= 0; the features have weight 1.
        shortlist: compare the attention of each query's so many nearest by features only, an
            approximation for long galleries: see :func:`attention_distmat`. Only with
            normalization "unit": the other readings scale by the distances of all pairs.
        gallery_dir: keep the encodings of a gallery in a temporary folder made there instead of
            in memory: a :class:`GalleryIndex`, read block by block.
        cross_camera: pictures of the query's own camera are no matches. False: they are, as where
            there is one camera; the query itself must then not be in the gallery.
        junk_pids: gallery pictures of these identities are left out, as Market-1501's -1.
        compute: with what the pairs are worked on.

    Raises:
        TypeError: identities that are no integers, a folder that is no path.
        ValueError: an unknown normalization or one that does not go with `shortlist`, `shortlist`
            below 1, a weight that is negative or infinite, another `cross_camera` than True, False.

    Example:
        >>> RankingOptions(shortlist=100).normalization
        'unit'
    """

    normalization: Normalization = "unit"
    attention_weight: float = 0.1
    shortlist: int | None = None
    gallery_dir: str | os.PathLike[str] | None = None
    cross_camera: bool = True
    junk_pids: tuple[int, ...] = ()
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        """Raises ValueError for what can't be."""
        check_choice("normalization", self.normalization, _READINGS)
        check_weight("attention_weight", self.attention_weight)
        as_ids("junk_pids", self.junk_pids)
        check_kind("compute", self.compute, Compute)
        check_choice("cross_camera", self.cross_camera, (True, False))
        if self.gallery_dir is not None:
            check_kind("gallery_dir", self.gallery_dir, str, os.PathLike)
        if self.shortlist is not None:
            check_count("shortlist", self.shortlist)
            if self.normalization != "unit":
                raise ValueError(
                    f"shortlist needs normalization='unit', got {self.normalization!r}: the other "
                    "readings scale by the distances of all pairs"
                )

    @property
    def counting(self) -> Counting:
        """What counts as a match."""
        return {"cross_camera": self.cross_camera, "junk_pids": self.junk_pids}


class Distmats(NamedTuple):
    """The (Q, G) matrices that a ranking is made of, as :func:`fused_distmats` gives them.

    Attributes:
        features: distances of the features, as they are fused.
        attention: attention distances.
        fused: both, normalised and summed.
    """

    features: Float[Tensor, "queries galleries"]
    attention: Float[Tensor, "queries galleries"]
    fused: Float[Tensor, "queries galleries"]


def fuse_distmats(
    feature_distmat: Float[Tensor, "queries galleries"],
    attention_distmat: Float[Tensor, "queries galleries"],
    *,
    normalization: Normalization = "unit",
    attention_weight: float = 0.1,
) -> Float[Tensor, "queries galleries"]:
    """Returns the two distances, "normalized and summed for final ranking" (paper, Section 4).

    Args:
        feature_distmat: l2 distances of the features.
        attention_distmat: attention distances of the same pairs.
        normalization: how the paper's "normalized" is read. "unit": the vectors were, so both
            matrices hold distances of unit-length vectors and are summed as they are; "query":
            each matrix is scaled to [0, 1] by the least and largest value of each row, so that a
            ranking depends on no other query; "global": by those of the whole matrix. A constant
            row or matrix becomes zero.
        attention_weight: weight of the attention distance; the features have weight 1.

    Raises:
        TypeError: distances that are no float tensors.
        ValueError: unlike shapes, NaN, an unknown normalization, infinite distances with another
            than "unit", or a weight that is negative or infinite.

    Example:
        >>> fuse_distmats(torch.tensor([[1.0, 3.0]]), torch.tensor([[8.0, 4.0]]),
        ...               normalization="query", attention_weight=0.5)
        tensor([[0.5000, 1.0000]])
    """
    check_matrix("feature_distmat", feature_distmat)
    check_matrix("attention_distmat", attention_distmat)
    if feature_distmat.shape != attention_distmat.shape:
        raise ValueError(
            "expected two matrices of one shape, got "
            f"{tuple(feature_distmat.shape)} and {tuple(attention_distmat.shape)}"
        )
    check_choice("normalization", normalization, _READINGS)
    check_weight("attention_weight", attention_weight)
    if normalization != "unit" and feature_distmat.numel():
        for each in (feature_distmat, attention_distmat):
            if each.isinf().any():
                raise ValueError(
                    f"normalization={normalization!r} scales by the largest distance: expected "
                    "finite ones, got infinity"
                )
        dims = (1,) if normalization == "query" else (0, 1)
        feature_distmat = _min_max(feature_distmat, dims)
        attention_distmat = _min_max(attention_distmat, dims)
    if attention_weight == 0:  # of infinite distances too
        return feature_distmat.clone()
    return feature_distmat + attention_weight * attention_distmat


def l2_distances(
    qf: Float[Tensor, "queries dim"], gf: Float[Tensor, "galleries dim"]
) -> Float[Tensor, "queries galleries"]:
    """Returns the l2 distances of features, computed in float64: what is equal is at 0.

    Of products in float32, a picture of unit length may be 7·10⁻⁴ from itself.

    Args:
        qf: features of the queries.
        gf: features of the gallery.

    Example:
        >>> l2_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[5.]])
    """
    return torch.cdist(qf.double(), gf.double()).to(qf.dtype)


def fused_distmats(
    model: nn.Module,
    query: Encoding,
    gallery: Encodings,
    *,
    row_threshold: float = ROW_THRESHOLD,
    options: RankingOptions | None = None,
    feature_distances: FeatureDistances = l2_distances,
) -> Distmats:
    """Returns the distances of features, of attention and of both fused, of all pairs (Section 4).

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery: an encoding or an index.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        options: how distances become one ranking. With normalization "unit" features and
            profiles are of unit length.
        feature_distances: gives the distances of features; by default l2.

    Raises:
        TypeError: as :func:`attention_distmat`.
        ValueError: as :func:`attention_distmat`.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> fused_distmats(model, images[:1], images).fused.shape
        torch.Size([1, 3])
    """
    options = check_settings("options", options, RankingOptions)
    unit = options.normalization == "unit"
    attention = attention_distmat(
        model,
        query,
        gallery,
        row_threshold=row_threshold,
        unit=unit,
        shortlist=options.shortlist,
        compute=options.compute,
    )
    qf, gf = query.features, gallery.features_of(slice(0, len(gallery)))
    if unit:
        qf, gf = F.normalize(qf, dim=1), F.normalize(gf, dim=1)
    features = feature_distances(qf, gf.to(qf.device))
    fused = fuse_distmats(
        features,
        attention,
        normalization=options.normalization,
        attention_weight=options.attention_weight,
    )
    return Distmats(features, attention, fused)


def _min_max(distmat: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Returns distances scaled to [0, 1] over some dimensions; constant ones become zero."""
    least = distmat.amin(dims, keepdim=True)
    spread = distmat.amax(dims, keepdim=True) - least
    return (distmat - least) / torch.where(spread > 0, spread, 1.0)
