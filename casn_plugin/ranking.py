"""Attention-fused ranking of every query-gallery pair, without a backward pass per pair.

The indicator α of all pairs (Eq. 4) is one matrix product over the hidden units of the pair
classifier; the attention map of each image of each pair is ReLU(Bᵀα), a second one over the basis
that :mod:`casn_plugin.encoding` computes once per image. Tensors in, tensors out.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from casn_plugin.attention import (
    ROW_THRESHOLD,
    PairScorer,
    align_profiles,
    attention_distance,
    indicator,
    scale_maps,
)
from casn_plugin.doors import check_share
from casn_plugin.encoding import Encoding, Encodings, part_scales
from casn_plugin.hooks import evaluating, place_of, unwrapped

Normalization = Literal["unit", "query", "global"]
"""How distances are "normalized" before they are summed: see :func:`fuse_distmats`."""

FeatureDistances = Callable[[Tensor, Tensor], Tensor]
"""Maps (Q, D) and (G, D) features to the (Q, G) matrix of their distances."""

_Pairs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Listed pairs: rows of the query and of the gallery, feature and attention distances."""


@dataclass(frozen=True)
class Compute:
    """With what the pairs are worked on: what a machine has, not what is computed.

    Attributes:
        max_memory: bytes that the tensors of a tile may take on the device, images brought there
            included; by default 256 MiB on the CPU and 4 GiB on CUDA. Where it is too small for
            anything, one pair is worked on at a time.
        precision: float16 or bfloat16 rounds the operands of both matrix products (weights of
            the pair classifier, maps), each scaled to a maximum of 1, and multiplies in it where
            the device can (CUDA). An approximation; by default nothing is rounded.
        distributed: every process of ``torch.distributed``'s group calls the function with the
            same arguments, takes a share of the gallery, and gets the whole result: the same, bit
            for bit, for any number of processes with as many threads each. Where one fails, all
            do.
        progress: show a progress bar on a terminal.

    Raises:
        TypeError: a `precision` that is no half precision.
        ValueError: `max_memory` below 1, or `distributed` without a process group.

    Example:
        >>> Compute(max_memory=2**20).precision is None
        True
    """

    max_memory: int | None = None
    precision: torch.dtype | None = None
    distributed: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what can't be."""
        if self.max_memory is not None:
            _at_least_one("max_memory", self.max_memory)
        if self.precision not in (None, torch.float16, torch.bfloat16):
            raise TypeError(
                f"precision must be torch.float16 or torch.bfloat16, got {self.precision}"
            )
        if self.distributed and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("distributed ranking needs torch.distributed.init_process_group()")


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
        compute: with what the pairs are worked on.

    Raises:
        ValueError: an unknown normalization or one that does not go with `shortlist`, `shortlist`
            below 1, a weight that is negative or infinite.

    Example:
        >>> RankingOptions(shortlist=100).normalization
        'unit'
    """

    normalization: Normalization = "unit"
    attention_weight: float = 0.1
    shortlist: int | None = None
    gallery_dir: str | None = None
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        """Raises ValueError for what can't be."""
        _check_normalization(self.normalization)
        _check_weight(self.attention_weight)
        if self.shortlist is not None:
            _at_least_one("shortlist", self.shortlist)
            if self.normalization != "unit":
                raise ValueError(
                    f"shortlist needs normalization='unit', got {self.normalization!r}: the other "
                    "readings scale by the distances of all pairs"
                )


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


@dataclass(frozen=True)
class Ranking:
    """The nearest gallery images of each query, nearest first.

    Attributes:
        indices: rows of the gallery.
        distances: fused distances, ascending along each row.
        feature_distances: l2 distances of the unit-length features of these pairs.
        attention_distances: their attention distances.
        scored: number of pairs whose attention was compared to find them.
    """

    indices: Int[Tensor, "queries topk"]
    distances: Float[Tensor, "queries topk"]
    feature_distances: Float[Tensor, "queries topk"]
    attention_distances: Float[Tensor, "queries topk"]
    scored: int


def attention_distmat(
    model: nn.Module,
    query: Encoding,
    gallery: Encodings,
    *,
    row_threshold: float = ROW_THRESHOLD,
    unit: bool = False,
    shortlist: int | None = None,
    compute: Compute | None = None,
) -> Float[Tensor, "queries galleries"]:
    """Returns the attention distance ‖M*_m1 − M*_m2‖₂ of every pair (paper, Eq. 5 and Section 4).

    Exact for every pair, in the dtype of the features, and without a backward pass through the
    backbone, unless `shortlist` or `compute` asks for less. The query is the first image of a pair:
    f⁻ = f_query − f_gallery. Pairs are worked on in tiles; only their distances leave a tile.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs; tiles are computed where its
            parameters are.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery: an encoding, or a :class:`~casn_plugin.index.GalleryIndex`, which
            is read from disk block by block.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        unit: compare aligned profiles of unit length.
        shortlist: compare only each query's so many nearest by features; all others get the
            greatest distance that there is, so they follow in the order of the features. An
            approximation.
        compute: with what the pairs are worked on.

    Returns:
        Distances >= 0, on the device of the queries.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, features in half precision.
        ValueError: unlike feature or map sizes, no pair classifier, t outside [0, 1), shortlist
            below 1, features that are not finite.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> attention_distmat(model, images[:1], images).shape
        torch.Size([1, 3])
    """
    ranker = _Ranker(model, query, gallery, row_threshold, unit, compute)
    if shortlist is not None:
        _at_least_one("shortlist", shortlist)
    if not len(query) or not len(gallery):
        return query.features.new_empty(len(query), len(gallery))
    with ranker.working():
        if shortlist is not None:
            listed = ranker.nearest(shortlist)
            pairs = ranker.gathered([ranker.listed(*each) for each in ranker.share(*listed)])
            greatest = 2**0.5 if unit else query.maps.shape[2] ** 0.5
            distmat = query.features.new_full((len(query), len(gallery)), greatest)
            rows, columns, _, distances = (each.to(distmat.device) for each in pairs)
            distmat[rows, columns] = distances
            return distmat
        if _is_affine(ranker.pair_classifier):  # one α for all pairs: O(Q + G)
            return ranker.of_one_indicator()
        return ranker.every_pair(ranker.distances, "Comparing attention")


def rank_gallery(
    model: nn.Module,
    query: Encoding,
    gallery: Encodings,
    *,
    topk: int = 10,
    exact: bool = True,
    row_threshold: float = ROW_THRESHOLD,
    attention_weight: float = 0.1,
    compute: Compute | None = None,
) -> Ranking:
    """Returns each query's topk nearest gallery images by fused distance (paper, Section 4).

    The fused distance is that of :func:`fuse_distmats` with normalization "unit": ‖f_q − f_g‖₂ of
    unit-length features plus `attention_weight` times the attention distance of unit-length
    profiles. It needs no other pair, so the (Q, G) matrices are never held; and as attention
    distances are >= 0, the feature distance is a lower bound: a pair whose features alone are
    further apart than the topk-th best fused distance of the query needs no attention.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery: an encoding or an index.
        topk: images to return for each query, at most as many as the gallery has.
        exact: the topk nearest of the whole gallery. False: each query's topk nearest by
            features, re-ranked; an approximation.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        attention_weight: weight of the attention distance, >= 0; the features have weight 1.
        compute: with what the pairs are worked on.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, features in half precision.
        ValueError: unlike feature or map sizes, an empty gallery, no pair classifier, t outside
            [0, 1), topk below 1, a weight that is negative or infinite, features that are not
            finite.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> images = Encoding(torch.rand(5, 4), basis=torch.rand(5, 4, 6, 2))
        >>> rank_gallery(model, images[:2], images, topk=3).indices[:, 0]
        tensor([0, 1])
    """
    _check_weight(attention_weight)
    if not len(gallery):
        raise ValueError("the gallery is empty")
    topk = min(_at_least_one("topk", topk), len(gallery))
    ranker = _Ranker(model, query, gallery, row_threshold, True, compute)

    def fused(pairs: _Pairs) -> Tensor:
        return pairs[2] + attention_weight * pairs[3]

    def best(parts: list[_Pairs]) -> _Pairs:
        """Returns the topk nearest pairs of each query: by query, distance, gallery row."""
        pairs = _cat(parts)
        order = pairs[1].argsort(stable=True)
        order = order[fused(pairs)[order].argsort(stable=True)]
        order = order[pairs[0][order].argsort(stable=True)]
        rows = pairs[0][order]
        places = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        order = order[places < topk]
        return pairs[0][order], pairs[1][order], pairs[2][order], pairs[3][order]

    with ranker.working():
        nearest = ranker.nearest(topk)
        parts = ranker.gathered([ranker.listed(*each) for each in ranker.share(*nearest)])
        pairs, scored = best([parts]), len(parts[0])
        if exact:
            bound = fused(pairs).view(len(query), topk).amax(1)
            found: list[_Pairs] = []
            within = 0
            for block, rows, columns in ranker.within(bound, *pairs[:2]):
                within += len(rows)
                found = [best([*found, ranker.listed(block, rows, columns)])]
            pairs = best(
                [pairs, ranker.gathered(found)] if found or ranker.distributed else [pairs]
            )
            scored += sum(ranker.everyones(within))
    shape, device = (len(query), topk), query.features.device
    _, indices, features, attention = (each.view(shape).to(device) for each in pairs)
    return Ranking(indices, fused(pairs).view(shape).to(device), features, attention, scored)


def pair_attention(
    model: nn.Module, first: Encoding, second: Encoding
) -> tuple[Float[Tensor, "pairs height width"], Float[Tensor, "pairs height width"]]:
    """Returns the attention maps M1 and M2 of pairs: row i of both encodings (Section 3.2.2).

    The maps are >= 0 and unscaled.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        first: the first images (queries), as ``model.encode`` gives them.
        second: the second images, as many.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, or features in half precision.
        ValueError: unlike numbers of images, feature or map sizes, or no pair classifier.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> pair_attention(model, images, images)[0].shape
        torch.Size([3, 6, 2])
    """
    pair_classifier, device = _pair_classifier(model, first, second)
    if len(first) != len(second):
        raise ValueError(
            f"expected as many first as second images, got {len(first)}, {len(second)}"
        )
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        evaluating(pair_classifier),
    ):
        first, second = first.to(device), second.to(device)
        alpha = indicator(pair_classifier, first.features - second.features)[:, None]
        size = first.maps.shape[2:]
        images = _Images(first), _Images(second)
        alpha = _by_part(alpha, images[0].parts)
        one, two = (each.maps_of(alpha).relu_()[..., 0].unflatten(1, size) for each in images)
        return one, two


def same_identity_logits(
    model: nn.Module, query: Encoding, gallery: Encodings, *, compute: Compute | None = None
) -> Float[Tensor, "queries galleries"]:
    """Returns z1 − z0 of every pair: above 0 where the pair classifier says "same identity".

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery: an encoding or an index.
        compute: with what the pairs are worked on.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, or features in half precision.
        ValueError: unlike feature or map sizes, or no pair classifier.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> same_identity_logits(model, images, images).shape
        torch.Size([3, 3])
    """
    ranker = _Ranker(model, query, gallery, compute=compute)
    with ranker.working():
        return ranker.every_pair(ranker.same_identity, "Classifying pairs")


def indicator_flips(
    model: nn.Module,
    query: Encoding,
    gallery: Encodings,
    *,
    compute: Compute | None = None,
) -> tuple[int, int]:
    """Returns how many values of α (Eq. 4) rounding has flipped, and how many there are.

    α is compared with that of the same features and pair classifier in float64, over all pairs.
    It flips where a gradient ∂z1/∂f⁻ or a hidden unit is within rounding of zero.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries, as ``model.encode`` gives them.
        gallery: the gallery: an encoding or an index.
        compute: with what the pairs are worked on.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, or features in half precision.
        ValueError: unlike feature or map sizes, or no pair classifier.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> indicator_flips(model, images, images)
        (0, 36)
    """
    ranker = _Ranker(model, query, gallery, compute=compute)
    exact = copy.deepcopy(ranker.pair_classifier).double()

    def flips(first: "_Images", second: "_Images", of_pairs: "_Indicator") -> Tensor:
        alpha = of_pairs(first.key[:, None], second.key[None]).bool()
        differences = first.features.double()[:, None] - second.features.double()[None]
        truth = _by_part(indicator(exact, differences.flatten(0, 1)), ranker.parts).view(
            alpha.shape
        )
        return (alpha != truth.bool()).sum(2).to(first.features.dtype)

    with ranker.working():
        counts = ranker.every_pair(flips, "Counting flips")
    return int(counts.sum(dtype=torch.float64)), counts.numel() * query.features.shape[1]


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
        ValueError: unlike shapes or an unknown normalization.

    Example:
        >>> fuse_distmats(torch.tensor([[1.0, 3.0]]), torch.tensor([[8.0, 4.0]]),
        ...               normalization="query", attention_weight=0.5)
        tensor([[0.5000, 1.0000]])
    """
    if feature_distmat.shape != attention_distmat.shape:
        raise ValueError(
            "expected two matrices of one shape, got "
            f"{tuple(feature_distmat.shape)} and {tuple(attention_distmat.shape)}"
        )
    _check_normalization(normalization)
    if normalization != "unit" and feature_distmat.numel():
        dims = (1,) if normalization == "query" else (0, 1)
        feature_distmat = _min_max(feature_distmat, dims)
        attention_distmat = _min_max(attention_distmat, dims)
    return feature_distmat + attention_weight * attention_distmat


def fused_distmats(
    model: nn.Module,
    query: Encoding,
    gallery: Encodings,
    *,
    row_threshold: float = ROW_THRESHOLD,
    options: RankingOptions | None = None,
    feature_distances: FeatureDistances = torch.cdist,
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
    options = RankingOptions() if options is None else options
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
    features = feature_distances(qf, gf)
    fused = fuse_distmats(
        features,
        attention,
        normalization=options.normalization,
        attention_weight=options.attention_weight,
    )
    return Distmats(features, attention, fused)


class _OtherProcessError(RuntimeError):
    """Another process of the group has failed."""


@dataclass(frozen=True)
class _Failure:
    """What a process that fails sends to the others."""

    message: str


class _Images:
    """One side of a tile of pairs, on the device: all that its maps are made of."""

    def __init__(
        self, images: Encoding, key: Tensor | None = None, precision: torch.dtype | None = None
    ) -> None:
        self.features = images.features
        self.key = images.features if key is None else key
        maps = images.maps.to(self.features.dtype)
        self.size = maps.shape[2:]
        self.parts = images.parts
        if self.parts:
            scale = part_scales(maps, self.parts)
        if precision is not None:
            greatest = torch.linalg.vector_norm(maps, torch.inf, (1, 2, 3), keepdim=True)
            maps = maps / greatest.clamp(min=1e-30)
        self.maps = _rounded(maps.flatten(2).transpose(1, 2), self.features.dtype, precision)
        if self.parts:
            if precision is not None:
                scale = scale / scale.amax(1, keepdim=True)
            unit = self.features.unflatten(1, (maps.shape[1], self.parts))
            self.scale = scale.to(self.maps.dtype)
            self.unit = unit.transpose(1, 2).to(self.maps.dtype).contiguous()
            self.own = torch.bmm(self.maps, (unit * scale[:, None]).to(self.maps.dtype))

    def __getitem__(self, rows: slice) -> "_Images":
        """Returns some of the images."""
        some = copy.copy(self)
        for name in ("features", "key", "maps", "scale", "unit", "own"):
            if hasattr(self, name):
                setattr(some, name, getattr(self, name)[rows])
        return some

    def __len__(self) -> int:
        return len(self.features)

    def maps_of(
        self, alpha: Float[Tensor, "images others dim"], out: Tensor | None = None
    ) -> Float[Tensor, "images positions others"]:
        """Returns Σ_k w_k A_k of each image for each of its indicators α, before the ReLU.

        Where the features are normalised parts, the values of α run over the channels of a part
        first. w = Σ_p (α_p − f_p (f_p·α_p)) / (‖g_p‖ HW); f_p times A is :attr:`own`.
        """
        if not self.parts:
            return torch.bmm(self.maps, alpha.transpose(1, 2), out=out)
        alpha = alpha.unflatten(2, (self.parts, -1))
        weights = alpha[:, :, 0] * self.scale[:, :1, None]
        along = []
        for part in range(self.parts):
            if part:
                weights.addcmul_(alpha[:, :, part], self.scale[:, part, None, None])
            along.append(torch.bmm(self.unit[:, part, None], alpha[:, :, part].transpose(1, 2)))
        maps = torch.bmm(self.maps, weights.transpose(1, 2), out=out)
        return maps.baddbmm_(self.own, torch.cat(along, 1), alpha=-1)

    def profiles_of(
        self, alpha: Float[Tensor, "images others dim"], out: Tensor | None = None
    ) -> Float[Tensor, "images others height"]:
        """Returns the row profiles of the maps: the largest value of each row, scaled to [0, 1]."""
        rows = self.maps_of(alpha, out).unflatten(1, self.size).amax(2)
        return self._scaled(rows.transpose(1, 2))

    def profiles_of_listed(
        self, rows: Int[Tensor, " pairs"], alpha: Float[Tensor, "pairs dim"]
    ) -> Float[Tensor, "pairs height"]:
        """Returns the row profiles of listed images, one for each α; equal rows stand together."""
        weights = alpha
        if self.parts:
            alpha = alpha.unflatten(1, (self.parts, -1))
            weights = torch.bmm(self.scale[rows, None], alpha)[:, 0]
            units = self.unit.index_select(0, rows).flatten(0, 1)
        maps = weights.new_empty(len(rows), self.maps.shape[1])
        which, counts = rows.unique_consecutive(return_counts=True)
        for row, to, some in zip(
            which.tolist(),
            maps.split(counts.tolist()),
            weights.split(counts.tolist()),
            strict=True,
        ):
            torch.mm(some, self.maps[row].T, out=to)
        if self.parts:
            along = torch.bmm(units[:, None], alpha.flatten(0, 1)[..., None])
            own = self.own.index_select(0, rows)
            maps -= torch.bmm(own, along.view(len(rows), self.parts, 1))[..., 0]
        return self._scaled(maps.unflatten(1, self.size).amax(2))

    def _scaled(self, rows: Float[Tensor, "*pairs height"]) -> Float[Tensor, "*pairs height"]:
        """Returns profiles in [0, 1] from the greatest values of the rows of maps."""
        return scale_maps(rows.relu().to(self.features.dtype)[..., None])[..., 0]


class _Indicator:
    """The indicator α (Eq. 4) of the pairs of some queries and some gallery images.

    Of a two-layer ReLU classifier it is [gate · (w2[1] W1) > 0] with gate = [W1 f1 + b1 > W1 f2].
    Hidden units whose gate is the same for all these pairs go into a constant: a trained
    classifier has many. Any other classifier is differentiated.
    """

    def __init__(self, ranker: "_Ranker", first: Tensor, second: Tensor) -> None:
        self.ranker = ranker
        if ranker.towards_same is None:
            return
        always = first.amin(0) > second.amax(0)
        if ranker.precision is not None:
            always = torch.zeros_like(always)  # a sum of rounded weights would be rounded again
        never = first.amax(0) <= second.amin(0)
        self.varying = (~(always | never)).nonzero()[:, 0]
        constant = always.to(ranker.dtype)[None] @ ranker.towards_same
        self.weights = torch.cat([ranker.towards_same[self.varying], constant])

    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """Returns α of pairs of keys, (..., D), 0 or 1, in a buffer that the next call reuses."""
        ranker, shape = self.ranker, torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
        if ranker.towards_same is None:
            alpha = indicator(ranker.pair_classifier, (first - second).flatten(0, -2))
            return _by_part(alpha, ranker.parts).to(ranker.dtype).view(*shape, -1)
        gates = ranker.buffer("gates", (*shape, len(self.weights)))
        torch.gt(
            first.index_select(-1, self.varying),
            second.index_select(-1, self.varying),
            out=gates[..., :-1],
        )
        gates[..., -1] = 1
        alpha = ranker.buffer("alpha", (shape.numel(), self.weights.shape[1]))
        torch.mm(gates.flatten(0, -2), self.weights, out=alpha)
        return alpha.gt_(0).view(*shape, -1)


class _Ranker:
    """Works through the pairs of queries and gallery images in blocks and tiles of bounded size.

    The grid of tiles depends on the sizes alone, so however many processes share the blocks of
    the gallery, each tile is computed by the same operations on the same numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        query: Encoding,
        gallery: Encodings,
        row_threshold: float = ROW_THRESHOLD,
        unit: bool = False,
        compute: Compute | None = None,
    ) -> None:
        compute = Compute() if compute is None else compute
        precision, max_memory = compute.precision, compute.max_memory
        check_share("row_threshold", row_threshold)
        self.pair_classifier, self.device = _pair_classifier(model, query, gallery)
        self.query, self.gallery = query, gallery
        self.row_threshold, self.unit, self.precision = row_threshold, unit, precision
        self.distributed, self.progress = compute.distributed, compute.progress
        features = query.features
        cuda = self.device.type == "cuda"
        self.dtype = precision if precision is not None and cuda else features.dtype
        self.parts = query.parts
        self.towards_same = None
        self.layers = _linear_layers(self.pair_classifier)
        if self.layers:
            first, last = self.layers
            weights = last.weight.detach()[1, :, None] * first.weight.detach()
            weights = _by_part(weights.to(features.dtype), self.parts)
            if precision is not None:
                weights = weights / weights.abs().max().clamp(min=1e-30)
            self.towards_same = _rounded(weights, features.dtype, precision)
        self._set_grid(max_memory)
        self._buffers: dict[str, Tensor] = {}
        self._panel: tuple[slice, _Images] | None = None

    def _set_grid(self, max_memory: int | None) -> None:
        if max_memory is None:
            max_memory = 2**32 if self.device.type == "cuda" else 2**28
        max_memory = min(max_memory, 2**60)
        features, maps = self.query.features, self.query.maps
        dim, channels = features.shape[1], maps.shape[1]
        positions = maps.shape[2] * maps.shape[3]
        hidden = self.layers[0].out_features if self.layers else 2 * dim
        size = self.dtype.itemsize
        per_pair = size * (dim + hidden + positions) + 100 * maps.shape[2]
        per_pair += 2 * size * channels if self.parts else 0
        per_pair += 0 if self.layers else 2 * features.element_size() * dim
        here = all(
            isinstance(images, Encoding)
            and images.maps.device == self.device
            and images.maps.dtype == self.dtype
            and self.precision is None
            for images in (self.query, self.gallery)
        )
        per_image = size * (channels * positions + 4 * dim) * (2 if self.precision else 1)
        images = max_memory // 2 // per_image  # images that can be brought to the device
        pairs = max_memory // per_pair if here else max_memory // 2 // per_pair
        columns = int(pairs**0.5) if here else min(int(pairs**0.5), images // 2)
        columns = columns // 16 * 16 if columns > 16 else columns
        self.columns = max(min(columns, len(self.gallery)), 1)
        panel = len(self.query) if here else max(images - self.columns, 1)
        self.rows = max(min(pairs // self.columns, len(self.query), panel), 1)
        self.panel_size = max(panel // self.rows, 1) * self.rows
        self.listed_pairs = max(pairs // 4, 1)  # each needs more: what it is made of is copied
        self.compared_rows = max(max_memory // (64 * self.columns + 16 * dim), 1)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """No gradients, no autocast, the pair classifier in eval mode, buffers freed at the end.

        An exception in one process is raised in all: it goes out with what they gather next.
        """
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(self.device.type, enabled=False),
                evaluating(self.pair_classifier),
            ):
                yield
        except Exception as error:
            if self.distributed and not isinstance(error, _OtherProcessError):
                everyones: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(everyones, _Failure(repr(error)))
            raise
        finally:
            self._buffers, self._panel = {}, None

    def buffer(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Returns a tensor of a shape whose memory is used again: fresh memory costs time."""
        numel = torch.Size(shape).numel()
        if name not in self._buffers or self._buffers[name].numel() < numel:
            self._buffers[name] = torch.empty(numel, dtype=self.dtype, device=self.device)
        return self._buffers[name][:numel].view(shape)

    def images(self, images: Encoding, *, is_query: bool) -> _Images:
        """Returns one side of a tile on the device."""
        images = images.to(self.device)
        key = _finite(images.features)
        if self.layers:
            bias = self.layers[0].bias if is_query else None
            key = F.linear(key, self.layers[0].weight.to(key.dtype))
            key = key if bias is None else key + bias.to(key.dtype)
        return _Images(images, key, self.precision)

    def panels(self) -> list[slice]:
        """Returns the queries in portions that the device may hold."""
        return [
            slice(start, min(start + self.panel_size, len(self.query)))
            for start in range(0, len(self.query), self.panel_size)
        ]

    def panel(self, rows: slice) -> _Images:
        """Returns some queries on the device; the last ones asked for stay there."""
        if self._panel is None or self._panel[0] != rows:
            self._panel = None
            self._panel = rows, self.images(self.query[rows], is_query=True)
        return self._panel[1]

    def blocks(self) -> list[slice]:
        """Returns this process's share of the gallery."""
        every = [
            slice(start, min(start + self.columns, len(self.gallery)))
            for start in range(0, len(self.gallery), self.columns)
        ]
        if not self.distributed:
            return every
        rank, world = dist.get_rank(), dist.get_world_size()
        return every[rank * len(every) // world : (rank + 1) * len(every) // world]

    def everyones(self, own: Any) -> list[Any]:
        """Returns what every process has, in their order."""
        if not self.distributed:
            return [own]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        for rank, each in enumerate(gathered):
            if isinstance(each, _Failure):
                raise _OtherProcessError(f"process {rank} failed: {each.message}")
        return gathered

    def gathered(self, parts: list[_Pairs]) -> _Pairs:
        """Returns the listed pairs of all processes."""
        own = tuple(each.cpu() for each in _cat(parts)) if self.distributed else _cat(parts)
        return _cat(self.everyones(own))

    def bar(self, total: int, desc: str) -> Any:
        """Returns a progress bar over pairs."""
        return tqdm(
            total=total, unit="pair", unit_scale=True, leave=False,
            disable=None if self.progress else True, desc=desc,
        )  # fmt: skip

    def every_pair(
        self, function: Callable[[_Images, _Images, _Indicator], Tensor], desc: str
    ) -> Tensor:
        """Returns the (Q, G) matrix of a function of tiles, on the device of the queries."""
        blocks = self.blocks()
        span = slice(blocks[0].start, blocks[-1].stop) if blocks else slice(0, 0)
        own = self.query.features.new_empty(len(self.query), span.stop - span.start)
        with self.bar(own.numel(), desc) as bar:
            for rows in self.panels():
                panel = self.panel(rows)
                for block in blocks:
                    second = self.images(self.gallery[block], is_query=False)
                    of_pairs = _Indicator(self, panel.key, second.key)
                    columns = slice(block.start - span.start, block.stop - span.start)
                    for start in range(0, len(panel), self.rows):
                        first = panel[start : start + self.rows]
                        to = slice(rows.start + start, rows.start + start + len(first))
                        own[to, columns] = function(first, second, of_pairs).to(own.device)
                        bar.update(len(first) * len(second))
        if not self.distributed:
            return own
        return torch.cat(self.everyones(own.cpu()), 1).to(own.device)

    def distances(self, first: _Images, second: _Images, of_pairs: _Indicator) -> Tensor:
        """Returns the attention distances of a tile."""
        alpha = of_pairs(first.key[:, None], second.key[None])
        maps = (len(first), first.maps.shape[1], len(second))
        by_first = first.profiles_of(alpha, self.buffer("maps", maps))
        out = self.buffer("maps", (len(second), maps[1], len(first)))
        by_second = second.profiles_of(alpha.transpose(0, 1), out)
        return self.distance(by_first.contiguous(), by_second.transpose(0, 1).contiguous())

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Returns the distances of row profiles."""
        return attention_distance(first, second, row_threshold=self.row_threshold, unit=self.unit)

    def same_identity(self, first: _Images, second: _Images, _: _Indicator) -> Tensor:
        """Returns z1 − z0 of a tile."""
        if self.layers:
            last = self.layers[1]
            hidden = (first.key[:, None] - second.key[None]).relu_()
            scores: Tensor = hidden @ (last.weight[1] - last.weight[0]).to(hidden.dtype)
            return scores if last.bias is None else scores + (last.bias[1] - last.bias[0])
        differences = first.features[:, None] - second.features[None]
        dtype = place_of(self.pair_classifier, differences).dtype
        scores = self.pair_classifier(differences.flatten(0, 1).to(dtype))
        scores = scores.to(differences.dtype)
        return (scores[:, 1] - scores[:, 0]).view(len(first), len(second))

    def of_one_indicator(self) -> Tensor:
        """Returns the (Q, G) matrix where all pairs have one α: an affine pair classifier."""
        alpha = indicator(self.pair_classifier, self.query.features[:1].to(self.device))
        alpha = _by_part(alpha, self.parts).to(self.dtype)

        def aligned(images: _Images) -> Tensor:
            profiles = images.profiles_of(alpha.expand(len(images), 1, -1))[:, 0]
            profiles = align_profiles(profiles, self.row_threshold)
            return F.normalize(profiles, dim=-1) if self.unit else profiles

        first = torch.cat(
            [
                aligned(self.panel(rows)[start : start + self.rows])
                for rows in self.panels()
                for start in range(0, rows.stop - rows.start, self.rows)
            ]
        )
        own = [
            aligned(self.images(self.gallery[block], is_query=False)).cpu()
            for block in self.blocks()
        ]
        second = torch.cat([each for some in self.everyones(own) for each in some])
        mode = "donot_use_mm_for_euclid_dist"
        distmat = torch.cdist(first, second.to(first.device), compute_mode=mode)
        return distmat.to(self.query.features.device)

    def _compared(self, features: Tensor) -> Tensor:
        """Returns features as they are compared: of unit length where profiles are."""
        features = _finite(features.to(self.device))
        return F.normalize(features, dim=1) if self.unit else features

    def _feature_distances(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields blocks of this process's share, rows of the queries, their l2 distances.

        In float64, which no setting of the matrix products makes coarser.
        """
        for start in range(0, len(self.query), self.compared_rows):
            rows = slice(start, min(start + self.compared_rows, len(self.query)))
            qf = self._compared(self.query.features[rows]).double()
            squares = qf.square().sum(1)[:, None]
            for block in self.blocks():
                gf = self._compared(self.gallery.features_of(block)).double()
                distances = torch.addmm(gf.square().sum(1)[None], qf, gf.T, alpha=-2)
                distances += squares
                yield block, rows, distances.clamp_(min=0).sqrt_()

    def nearest(self, topk: int) -> tuple[Tensor, Tensor]:
        """Returns the pairs of each query with its topk nearest gallery images by features.

        Of images at one distance those that come first, unless FAISS has found them.
        """
        topk = min(topk, len(self.gallery))
        rows = torch.arange(len(self.query), device=self.device)[:, None].expand(-1, topk).flatten()
        if isinstance(self.gallery, Encoding) and not self.distributed:
            qf, gf = (self._compared(each.features) for each in (self.query, self.gallery))
            found = _nearest_by_faiss(qf, gf, topk)
            if found is not None:
                return rows, found.flatten()
        size = (len(self.query), topk)
        nearest = torch.full(size, torch.inf, dtype=torch.float64, device=self.device)
        columns = torch.full(size, -1, device=self.device)
        for block, some, distances in self._feature_distances():
            numbers = torch.arange(block.start, block.stop, device=self.device)
            nearest[some], columns[some] = _least(
                torch.cat([nearest[some], distances], 1),
                torch.cat([columns[some], numbers.expand(len(distances), -1)], 1),
                topk,
            )
        if self.distributed:
            every = self.everyones((nearest.cpu(), columns.cpu()))
            nearest, columns = (torch.cat(each, 1) for each in zip(*every, strict=True))
            columns = _least(nearest, columns, topk)[1]
        return rows, columns.flatten().to(self.device)

    def share(self, rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields the blocks of this process's share, each with those of the pairs in it."""
        order = columns.argsort(stable=True)
        rows, columns = rows[order], columns[order]
        with self.bar(len(rows), "Comparing attention") as bar:
            for block in self.blocks():
                span = columns.new_tensor([block.start, block.stop])
                start, stop = torch.searchsorted(columns, span).tolist()
                if stop > start:
                    yield block, rows[start:stop], columns[start:stop]
                    bar.update(stop - start)

    def within(
        self, bound: Tensor, known_rows: Tensor, known_columns: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields the blocks with the pairs whose features are no further apart than a bound.

        Pairs that are known already are left out.
        """
        bound = bound.to(self.device).double()[:, None] + 1e-6  # of distances rounded to float32
        known_rows, known_columns = known_rows.to(self.device), known_columns.to(self.device)
        total = len(self.query) * sum(block.stop - block.start for block in self.blocks())
        with self.bar(total, "Searching") as bar:
            for block, some, distances in self._feature_distances():
                known = (known_columns >= block.start) & (known_columns < block.stop)
                known &= (known_rows >= some.start) & (known_rows < some.stop)
                near = distances <= bound[some]
                near[known_rows[known] - some.start, known_columns[known] - block.start] = False
                columns, rows = near.T.nonzero(as_tuple=True)
                if len(rows):
                    yield block, rows + some.start, columns + block.start
                bar.update(near.numel())

    def listed(self, block: slice, rows: Tensor, columns: Tensor) -> _Pairs:
        """Returns the distances of some pairs of the queries and one block of the gallery.

        Pairs are sorted by gallery image, so that the maps of each image are one product.
        """
        rows, columns = rows.to(self.device), columns.to(self.device)
        second = self.images(self.gallery[block], is_query=False)
        found: list[_Pairs] = []
        for queries in self.panels():
            inside = (rows >= queries.start) & (rows < queries.stop)
            if not inside.any():
                continue
            panel = self.panel(queries)
            of_pairs = _Indicator(self, panel.key, second.key)
            qf, gf = self._compared(panel.features), self._compared(second.features)
            for i, j in zip(
                rows[inside].split(self.listed_pairs),
                columns[inside].split(self.listed_pairs),
                strict=True,
            ):
                mine, its = i - queries.start, j - block.start
                alpha = of_pairs(panel.key.index_select(0, mine), second.key.index_select(0, its))
                by_second = second.profiles_of_listed(its, alpha)
                order = mine.argsort(stable=True)
                by_first = torch.empty_like(by_second)
                by_first[order] = panel.profiles_of_listed(
                    mine[order], alpha.index_select(0, order)
                )
                features = (qf.index_select(0, mine) - gf.index_select(0, its)).norm(dim=1)
                found.append((i, j, features, self.distance(by_first, by_second)))
        return _cat(found)


def _by_part(values: Tensor, parts: int) -> Tensor:
    """Returns (..., D) values of features with the channels of a part together, if any."""
    return values.unflatten(-1, (-1, parts)).transpose(-2, -1).flatten(-2) if parts else values


def _cat(parts: list[_Pairs]) -> _Pairs:
    """Returns several lists of pairs as one."""
    if not parts:
        nothing = torch.empty(0)
        return nothing.long(), nothing.long(), nothing, nothing
    first, second, third, fourth = (torch.cat(each) for each in zip(*parts, strict=True))
    return first, second, third, fourth


def _least(distances: Tensor, columns: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Returns the topk least distances of each row and their columns; the first where they tie."""
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :topk], columns.gather(1, order[:, :topk])


def _finite(features: Tensor) -> Tensor:
    """Returns features, or raises ValueError where they are none."""
    if not features.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinity")
    return features


def _nearest_by_faiss(qf: Tensor, gf: Tensor, topk: int) -> Tensor | None:
    """Returns the nearest rows of gf of each row of qf by FAISS; None where it cannot be used."""
    if qf.device.type != "cpu" or qf.dtype != torch.float32:
        return None
    try:
        import faiss
    except ImportError:
        return None
    _, nearest = faiss.knn(qf.contiguous().numpy(), gf.contiguous().numpy(), topk)
    return torch.from_numpy(nearest)


def _rounded(operand: Tensor, dtype: torch.dtype, precision: torch.dtype | None) -> Tensor:
    """Returns the operand of a matrix product: rounded to a precision where one is given.

    It comes in that precision on CUDA, and in `dtype` elsewhere: few CPUs multiply halves.
    """
    if precision is None:
        return operand.to(dtype)
    operand = operand.to(precision)
    return operand if operand.device.type == "cuda" else operand.to(dtype)


def _check_normalization(normalization: str) -> None:
    if normalization not in ("unit", "query", "global"):
        raise ValueError(
            f"normalization must be 'unit', 'query' or 'global', got {normalization!r}"
        )


def _check_weight(attention_weight: float) -> None:
    if not 0 <= attention_weight < float("inf"):
        raise ValueError(f"attention_weight must be >= 0 and finite, got {attention_weight}")


def _at_least_one(name: str, value: int) -> int:
    """Returns a count, or raises ValueError."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _pair_classifier(
    model: nn.Module, query: Encoding, gallery: Encodings
) -> tuple[nn.Module, torch.device]:
    """Returns the pair classifier of a model and its device, the arguments being sound."""
    kind, gallery = type(gallery).__name__, gallery[:1]
    if not isinstance(query, Encoding) or not isinstance(gallery, Encoding):
        raise TypeError(
            "query and gallery must be what model.encode gives, got "
            f"{type(query).__name__} and {kind}"
        )
    if (query.basis is None) != (gallery.basis is None):
        raise TypeError("query and gallery must be encoded by one model, got unlike encodings")
    if query.maps.shape[1:] != gallery.maps.shape[1:] or (
        query.features.shape[1] != gallery.features.shape[1]
    ):
        raise ValueError(
            "query and gallery must be encoded by one model at one image size, got maps of "
            f"{tuple(query.maps.shape[1:])} and {tuple(gallery.maps.shape[1:])}"
        )
    wrapped = unwrapped(model)
    pair_classifier = getattr(wrapped, "pair_classifier", None)
    if not isinstance(pair_classifier, nn.Module):
        raise ValueError(f"{type(wrapped).__name__} has no pair_classifier; is it a CASN?")
    if query.features.dtype != gallery.features.dtype or query.features.dtype.itemsize < 4:
        raise TypeError(
            "query and gallery must have features of one dtype, float32 or wider, got "
            f"{query.features.dtype} and {gallery.features.dtype}"
        )
    return pair_classifier, place_of(pair_classifier, query.features).device


def _layers(pair_classifier: PairScorer) -> list[nn.Module]:
    """Returns the layers of a plain sequence; none where anything else may happen in it."""
    if type(pair_classifier) is nn.Linear:
        layers: list[nn.Module] = [pair_classifier]
    elif (
        isinstance(pair_classifier, nn.Sequential)
        and type(pair_classifier).forward is nn.Sequential.forward
    ):
        layers = list(pair_classifier)
    else:
        return []
    every = [*layers, pair_classifier]
    changed = any(
        each._forward_hooks
        or each._forward_pre_hooks
        or each._backward_hooks
        or each._backward_pre_hooks
        or "forward" in vars(each)
        for each in every
    )
    return [] if changed else layers


def _linear_layers(pair_classifier: PairScorer) -> tuple[nn.Linear, nn.Linear] | None:
    """Returns the two layers of a Linear, ReLU, Linear classifier; None for any other."""
    layers = _layers(pair_classifier)
    if [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Linear]:
        return layers[0], layers[2]  # type: ignore[return-value]
    return None


def _is_affine(pair_classifier: PairScorer) -> bool:
    layers = _layers(pair_classifier)
    return bool(layers) and all(type(layer) is nn.Linear for layer in layers)


def _min_max(distmat: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Returns distances scaled to [0, 1] over some dimensions; constant ones become zero."""
    least = distmat.amin(dims, keepdim=True)
    spread = distmat.amax(dims, keepdim=True) - least
    return (distmat - least) / torch.where(spread > 0, spread, 1.0)
