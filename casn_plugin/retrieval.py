"""One test set: ranked by features, by attention and by both fused, and how well."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn

from casn_plugin.attention import ROW_THRESHOLD
from casn_plugin.calibration import Calibration, calibrate, true_accept_rates
from casn_plugin.doors import check_count, check_fraction, check_kind, check_ranks, check_seed
from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.evaluation import (
    evaluate_rank,
    verification_auc,
)
from casn_plugin.evidence import evidence_of
from casn_plugin.identities import Ids, as_ids, pairs_by_identity
from casn_plugin.ranked import RankedLists, ranked_lists
from casn_plugin.ranking import (
    FeatureDistances,
    RankingOptions,
    Reciprocity,
    feature_neighbourhood,
    fused_distmats,
    fused_neighbourhood,
    l2_distances,
    pair_classifier_of,
    pair_scores,
    rerank,
    rerank_neighbourhood,
)

RANKINGS = ("features", "attention", "fused")
"""The three rankings that an evaluation shows side by side."""


def check_results(results: Any, rankings: Sequence[str] = RANKINGS) -> None:
    """Finds out whether results have the figures of some rankings, all of them the same.

    Args:
        results: a dictionary, as one data set has in ``engine.results``.
        rankings: which must be in it.

    Raises:
        TypeError: no dictionary, or rankings that are none; figures that are no numbers.
        ValueError: a ranking that is missing or lacks "mAP", a non-empty "cmc" or what the others
            have; figures outside [0, 1]. NaN is none, but where a test set may have no value: in
            the AUC and in the rates of pairs of two people, "TAR@...".

    Example:
        >>> check_results({"fused": {"mAP": 0.5, "cmc": [0.4, 0.8]}}, ["fused"])
    """
    check_kind("results", results, Mapping)
    missing = sorted(set(rankings) - set(results))
    if missing:
        raise ValueError(f"results must be of one data set in engine.results, lack {missing}")
    figures = {name: check_kind(f"results[{name!r}]", results[name], Mapping) for name in rankings}
    wanted = {"mAP", "cmc"}.union(*figures.values())
    for name, of_one in figures.items():
        if wanted - set(of_one):
            raise ValueError(f"results[{name!r}] lack {sorted(wanted - set(of_one), key=str)}")
        cmc = of_one["cmc"]
        if not isinstance(cmc, Sequence | np.ndarray) or isinstance(cmc, str) or not len(cmc):
            raise ValueError(f"results[{name!r}]['cmc'] must be one share or more, got {cmc!r:.80}")
        for key in of_one:
            for share in cmc if key == "cmc" else (of_one[key],):
                if not (str(key).startswith("TAR@") and _is_nan(share)):
                    check_fraction(f"results[{name!r}][{key!r}]", share)
    if results.get("auc") is not None and not _is_nan(results["auc"]):
        check_fraction("results['auc']", results["auc"])


def _is_nan(figure: Any) -> bool:
    """Returns whether a figure has no value."""
    return isinstance(figure, float | np.floating) and bool(np.isnan(figure))


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

    distances: FeatureDistances = l2_distances
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
        results: "features", "attention" and "fused", each with "mAP" and "mINP" (shares), "cmc"
            (a list of shares), "TAR@1%" and "TAR@0.1%" (the shares of matches that pass where 1 %
            and 0.1 % of the pairs of two people do, NaN where no distance lets so few pass); "auc"
            of the pair classifier or the similarity, NaN where no pair shows two people, and
            "evidence", which of them it was.
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
    reciprocity: Reciprocity | None = None,
) -> Retrieval:
    """Returns how a test set is ranked by features, attention and both, and how well.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries.
        gallery: the gallery.
        options: how distances of features and of attention become one ranking.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        metric: how features are compared.
        reciprocity: re-rank by features and by both (Zhong et al., CVPR 2017). Neighbours by
            attention alone would take all pairs of all images: it keeps its ranking.

    Raises:
        TypeError: as :func:`casn_plugin.attention_distmat` and `evaluate_rank`.
        ValueError: likewise.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(4, 4), basis=torch.rand(4, 4, 6, 2))
        >>> query = LabelledEncodings(images[:2], [7, 8], [0, 0])
        >>> found = retrieve(model, query, LabelledEncodings(images, [8, 7, 7, 8], [1] * 4))
        >>> list(found.results)
        ['features', 'attention', 'fused', 'auc', 'evidence']
    """
    for name, images in (("query", query), ("gallery", gallery)):
        if not isinstance(images, LabelledEncodings):
            raise TypeError(f"{name} must be LabelledEncodings, got {type(images).__name__}")
    options = RankingOptions() if options is None else options
    metric = FeatureMetric() if metric is None else metric
    encodings = query.encoding, gallery.encoding
    distmats = _distmats(model, *encodings, options, row_threshold, metric)
    if reciprocity is not None:
        distmats |= _reranked(
            model, *encodings, distmats, options, row_threshold, metric, reciprocity
        )
    ids = query.pids, gallery.pids, query.camids, gallery.camids
    results: dict[str, Any] = {}
    same, counted = pairs_by_identity(*ids, **options.counting)
    for name, distmat in distmats.items():
        found = evaluate_rank(distmat, *ids, **options.counting)
        results[name] = {
            "mAP": found.mean_ap, "mINP": found.mean_inp, "cmc": found.cmc.tolist(),
            **true_accept_rates(distmat.cpu()[counted], same[counted]),
        }  # fmt: skip
    queries = query.encoding[: len(query.encoding)]
    scores = pair_scores(model, queries, gallery.encoding, compute=options.compute)
    results["auc"] = verification_auc(scores.cpu()[counted], same[counted])
    results["evidence"] = evidence_of(pair_classifier_of(model)).value
    ranked = ranked_lists(distmats["features"], distmats["fused"], *ids, **options.counting)
    return Retrieval(results, ranked, distmats)


def calibrate_gallery(
    model: nn.Module,
    gallery: LabelledEncodings,
    false_alarm_rate: float = 0.001,
    *,
    confidence: float = 0.95,
    images: int = 1000,
    seed: int = 0,
    options: RankingOptions | None = None,
) -> Calibration:
    """Returns from which fused distance on nobody is found, by the pairs of a labelled gallery.

    Each two images are a pair once. Where cameras are known, two of one person in one camera do
    not count: they are alike for other reasons. The threshold holds for
    :func:`casn_plugin.rank_gallery` and ``GalleryIndex.search``.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        gallery: images of people who are in no training set.
        false_alarm_rate: share of the pairs of two people that may pass.
        confidence: of the intervals.
        images: so many images, drawn at random where there are more, are compared with each
            other: n images are n (n − 1) / 2 pairs.
        seed: of the draw.
        options: how distances become one ranking, normalization "unit".

    Raises:
        TypeError: no labelled encodings, a seed that is no integer; as
            :func:`casn_plugin.rank_gallery`.
        ValueError: as :func:`casn_plugin.calibrate`; `images` below 2; a negative seed; another
            normalization, by which a distance depends on the other pairs.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(6, 4), basis=torch.rand(6, 4, 6, 2))
        >>> people = LabelledEncodings(images, [0, 0, 1, 1, 2, 2], [0, 1] * 3)
        >>> found = calibrate_gallery(model, people, 0.1)
        >>> found.positives, found.negatives
        (3, 12)
    """
    if not isinstance(gallery, LabelledEncodings):
        raise TypeError(f"gallery must be LabelledEncodings, got {type(gallery).__name__}")
    options = RankingOptions() if options is None else options
    if options.normalization != "unit":
        raise ValueError(f"normalization must be 'unit', got {options.normalization!r}")
    check_count("images", images, least=2)
    encoding, length = gallery.encoding, len(gallery.encoding)
    pids, camids = as_ids("pids", gallery.pids, length), as_ids("camids", gallery.camids, length)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(check_seed(seed)))
    rows = order[:images].sort().values
    some: Encoding = encoding[:length] if len(rows) == length else encoding[rows]
    pids, camids = pids[rows.numpy()], camids[rows.numpy()]
    same, counted = pairs_by_identity(pids, pids, camids, camids)
    fused = fused_distmats(model, some, some, options=options).fused.cpu()
    counted = counted.triu(1)
    return calibrate(fused[counted], same[counted], false_alarm_rate, confidence=confidence)


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
    _, attention, fused = fused_distmats(
        model,
        images,
        gallery,
        row_threshold=row_threshold,
        options=options,
        feature_distances=_to_fuse(metric, options).fused,
    )
    features = metric.alone(images.features, gallery.features_of(slice(0, len(gallery))))
    return dict(zip(RANKINGS, (features, attention, fused), strict=True))


def _to_fuse(metric: FeatureMetric, options: RankingOptions) -> FeatureMetric:
    """Returns what compares features for the fused distance; unit-length ones come as they are."""
    normalize = metric.normalize and options.normalization != "unit"
    return FeatureMetric(metric.distances, normalize, metric.squared)


# the arguments of _distmats, what it gave, and how to re-rank
def _reranked(
    model: nn.Module,
    query: Encodings,
    gallery: Encodings,
    distmats: Mapping[str, Tensor],
    options: RankingOptions,
    row_threshold: float,
    metric: FeatureMetric,
    reciprocity: Reciprocity,
) -> dict[str, Tensor]:
    """Returns the (Q, G) matrices of features and of both fused, re-ranked."""
    number = reciprocity.needed
    by_features = feature_neighbourhood(query, gallery, distmats["features"], metric.alone, number)
    features = rerank_neighbourhood(by_features, reciprocity)
    if options.normalization != "unit":  # it scales by the distances of all pairs
        every = Encoding.cat([query[: len(query)], gallery[: len(gallery)]])
        square = _distmats(model, every, every, options, row_threshold, metric)["fused"]
        square, first = (square + square.T) / 2, len(query)
        parts = square[:first, first:], square[:first, :first], square[first:, first:]
        return {"features": features, "fused": rerank(*parts, reciprocity)}
    by_both = fused_neighbourhood(
        model,
        query,
        gallery,
        distmats["fused"],
        number=number,
        row_threshold=row_threshold,
        options=options,
        feature_distances=_to_fuse(metric, options).fused,
    )
    return {"features": features, "fused": rerank_neighbourhood(by_both, reciprocity)}


def side_by_side(results: Mapping[str, Any], ranks: Sequence[int] = (1, 5, 10, 20)) -> str:
    """Returns the three rankings of an evaluation as a table in percent.

    Args:
        results: "features", "attention" and "fused", each with "mAP", "cmc" and maybe "mINP",
            "TAR@1%" and "TAR@0.1%", as shares; "auc", and maybe the "evidence" that it is of.
            "-" stands for what has no value.
        ranks: of the CMC, as far as it goes.

    Raises:
        TypeError: as :func:`check_results`; ranks that are no integers.
        ValueError: likewise; no rank, or one below 1.

    Example:
        >>> figures = {"mAP": 0.5, "cmc": [0.25, 1.0]}
        >>> print(side_by_side(dict.fromkeys(RANKINGS, figures) | {"auc": 0.9}))
        ** Results **
                    features  attention      fused
        mAP            50.0%      50.0%      50.0%
        Rank-1         25.0%      25.0%      25.0%
        Evidence: AUC 0.900 (0.5 is chance)
    """
    check_results(results)
    auc = check_kind("results['auc']", results.get("auc"), float, int, np.floating)
    check_ranks(ranks)
    rows = {
        name: [results[kind][name] for kind in RANKINGS]
        for name in ("mAP", "mINP")
        if name in results["fused"]
    }
    for rank in ranks:
        if rank <= min(len(results[kind]["cmc"]) for kind in RANKINGS):
            rows[f"Rank-{rank}"] = [results[kind]["cmc"][rank - 1] for kind in RANKINGS]
    rates = [name for name in results["fused"] if name.startswith("TAR@")]
    rows |= {name: [results[kind][name] for kind in RANKINGS] for name in rates}
    lines = ["** Results **", " " * 9 + "".join(f"{kind:>11}" for kind in RANKINGS)]
    lines += [
        f"{name:<9}" + "".join(f"{'-' if share != share else f'{share:.1%}':>11}" for share in row)
        for name, row in rows.items()
    ]
    if _is_nan(auc):
        lines.append("-: no pair shows two people")
    elif any(_is_nan(share) for row in rows.values() for share in row):
        lines.append("-: no distance lets so few pairs of two people pass")
    evidence = f"Evidence: {results['evidence']}, AUC" if "evidence" in results else "Evidence: AUC"
    how_well = "-" if _is_nan(auc) else f"{auc:.3f} (0.5 is chance)"
    return "\n".join([*lines, f"{evidence} {how_well}"])
