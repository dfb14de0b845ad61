"""One test set: ranked by features, by attention and by both fused, and how well."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from casn_plugin.attention import ROW_THRESHOLD
from casn_plugin.doors import check_count, check_weight
from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.evaluation import (
    RANKINGS,
    RankedLists,
    check_results,
    evaluate_rank,
    ranked_lists,
    verification_auc,
)
from casn_plugin.identities import Ids, pairs_by_identity
from casn_plugin.ranking import (
    FeatureDistances,
    RankingOptions,
    fused_distmats,
    same_identity_logits,
)

Rerank = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Maps query-gallery, query-query and gallery-gallery distances to re-ranked (Q, G) distances."""


class LabelledEncodings(NamedTuple):
    """The images of a query or of a gallery.

    Attributes:
        encoding: what ranking needs of them, in memory or in an index.
        pids: their identities.
        camids: their cameras.
    """

    encoding: Encodings
    pids: Ids
    camids: Ids


@dataclass(frozen=True)
class FeatureMetric:
    """How features alone are compared, and what of it is fused.

    Attributes:
        distances: gives the distances of features; by default l2.
        normalize: compare features of unit length.
        squared: `distances` gives squared l2 distances, as torchreid's "euclidean" does: what is
            fused is their root.
    """

    distances: FeatureDistances = torch.cdist
    normalize: bool = False
    squared: bool = False

    def alone(
        self, qf: Float[Tensor, "queries dim"], gf: Float[Tensor, "galleries dim"]
    ) -> Float[Tensor, "queries galleries"]:
        """Returns the distances by which features alone rank."""
        if self.normalize:
            qf, gf = F.normalize(qf, dim=1), F.normalize(gf, dim=1)
        return self.distances(qf, gf)

    def fused(
        self, qf: Float[Tensor, "queries dim"], gf: Float[Tensor, "galleries dim"]
    ) -> Float[Tensor, "queries galleries"]:
        """Returns the distances that are fused with those of attention."""
        distmat = self.alone(qf, gf)
        return distmat.clamp(min=0).sqrt() if self.squared else distmat


@dataclass(frozen=True)
class Retrieval:
    """How a test set was ranked, as :func:`retrieve` finds it.

    Attributes:
        results: "features", "attention" and "fused", each with "mAP" and "mINP" (shares) and
            "cmc" (a list of shares); "auc" of the pair classifier.
        ranked: who came where in the fused ranking.
        distmats: the (Q, G) distances of the three.
    """

    results: dict[str, Any]
    ranked: RankedLists
    distmats: dict[str, Tensor]


def retrieve(
    model: nn.Module,
    query: LabelledEncodings,
    gallery: LabelledEncodings,
    *,
    options: RankingOptions | None = None,
    row_threshold: float = ROW_THRESHOLD,
    metric: FeatureMetric | None = None,
    rerank: Rerank | None = None,
) -> Retrieval:
    """Returns how a test set is ranked by features, attention and both, and how well.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries.
        gallery: the gallery.
        options: how distances of features and of attention become one ranking.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        metric: how features are compared.
        rerank: re-ranks all three (Zhong et al., CVPR 2017).

    Raises:
        TypeError: as :func:`casn_plugin.attention_distmat` and `evaluate_rank`.
        ValueError: likewise; or a shortlist that is to be re-ranked.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(4, 4), basis=torch.rand(4, 4, 6, 2))
        >>> query = LabelledEncodings(images[:2], [7, 8], [0, 0])
        >>> found = retrieve(model, query, LabelledEncodings(images, [8, 7, 7, 8], [1] * 4))
        >>> list(found.results)
        ['features', 'attention', 'fused', 'auc']
    """
    for name, images in (("query", query), ("gallery", gallery)):
        if not isinstance(images, LabelledEncodings):
            raise TypeError(f"{name} must be LabelledEncodings, got {type(images).__name__}")
    options = RankingOptions() if options is None else options
    metric = FeatureMetric() if metric is None else metric
    distmats = _distmats(model, query.encoding, gallery.encoding, options, row_threshold, metric)
    if rerank is not None:
        if options.shortlist is not None:
            raise ValueError("re-ranking needs the distances of all pairs: shortlist must be None")
        # what is fused is normalised over queries and gallery together: re-ranking compares
        # distances of all three matrices
        parts = [part.encoding[: len(part.encoding)] for part in (query, gallery)]
        every, first = Encoding.cat(parts), len(parts[0])
        squares = _distmats(model, every, every, options, row_threshold, metric)
        distmats = {name: _reranked(squares[name], first, rerank) for name in distmats}
    ids = query.pids, gallery.pids, query.camids, gallery.camids
    results: dict[str, Any] = {}
    for name, distmat in distmats.items():
        found = evaluate_rank(distmat, *ids, **options.counting)
        results[name] = {
            "mAP": found.mean_ap, "mINP": found.mean_inp, "cmc": found.cmc.tolist()
        }  # fmt: skip
    same, counted = pairs_by_identity(*ids, **options.counting)
    queries = query.encoding[: len(query.encoding)]
    logits = same_identity_logits(model, queries, gallery.encoding, compute=options.compute)
    results["auc"] = verification_auc(logits.cpu()[counted], same[counted])
    ranked = ranked_lists(distmats["features"], distmats["fused"], *ids, **options.counting)
    return Retrieval(results, ranked, distmats)


def _distmats(
    model: nn.Module,
    query: Encodings,
    gallery: Encodings,
    options: RankingOptions,
    row_threshold: float,
    metric: FeatureMetric,
) -> dict[str, Tensor]:
    """Returns the (Q, G) matrices of features alone, attention alone and both fused."""
    images = query[: len(query)]
    unit = options.normalization == "unit"
    to_fuse = FeatureMetric(metric.distances, metric.normalize and not unit, metric.squared)
    _, attention, fused = fused_distmats(
        model,
        images,
        gallery,
        row_threshold=row_threshold,
        options=options,
        feature_distances=to_fuse.fused,
    )
    features = metric.alone(images.features, gallery.features_of(slice(0, len(gallery))))
    return dict(zip(RANKINGS, (features, attention, fused), strict=True))


def _reranked(distmat: Tensor, queries: int, rerank: Rerank) -> Tensor:
    """Returns the (Q, G) part of the distances of all images, re-ranked."""
    square = (distmat + distmat.T) / 2
    parts = square[:queries, queries:], square[:queries, :queries], square[queries:, queries:]
    return torch.from_numpy(rerank(*(part.numpy() for part in parts)))


def side_by_side(results: Mapping[str, Any], ranks: Sequence[int] = (1, 5, 10, 20)) -> str:
    """Returns the three rankings of an evaluation as a table in percent.

    Args:
        results: "features", "attention" and "fused", each with "mAP", "cmc" and maybe "mINP", as
            shares; "auc" of the pair classifier.
        ranks: of the CMC, as far as it goes.

    Raises:
        TypeError: no dictionary, or ranks that are no integers.
        ValueError: figures that are missing, or ranks below 1.

    Example:
        >>> figures = {"mAP": 0.5, "cmc": [0.25, 1.0]}
        >>> print(side_by_side(dict.fromkeys(RANKINGS, figures) | {"auc": 0.9}))
        ** Results **
                    features  attention      fused
        mAP            50.0%      50.0%      50.0%
        Rank-1         25.0%      25.0%      25.0%
        Pair classifier: AUC 0.900 (0.5 is chance)
    """
    check_results(results)
    check_weight("auc", results.get("auc"))
    for rank in ranks:
        check_count("ranks", rank)
    rows = {
        name: [results[kind][name] for kind in RANKINGS]
        for name in ("mAP", "mINP")
        if name in results["fused"]
    }
    for rank in ranks:
        if rank <= min(len(results[kind]["cmc"]) for kind in RANKINGS):
            rows[f"Rank-{rank}"] = [results[kind]["cmc"][rank - 1] for kind in RANKINGS]
    lines = ["** Results **", " " * 9 + "".join(f"{kind:>11}" for kind in RANKINGS)]
    lines += [
        f"{name:<9}" + "".join(f"{share:>11.1%}" for share in shares)
        for name, shares in rows.items()
    ]
    return "\n".join([*lines, f"Pair classifier: AUC {results['auc']:.3f} (0.5 is chance)"])
