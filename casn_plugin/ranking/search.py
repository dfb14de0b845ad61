"""Top-k search: each query's nearest gallery images by fused distance, without all pairs."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from casn_plugin.attention import ROW_THRESHOLD
from casn_plugin.doors import check_count, check_share, check_weight
from casn_plugin.encoding import Encoding, Encodings
from casn_plugin.evidence import Evidence, evidence_of
from casn_plugin.ranking.candidates import (
    Candidates,
    Compared,
    check_candidates,
    compare,
    listed_pairs,
    nearest,
)
from casn_plugin.ranking.compute import Compute
from casn_plugin.ranking.fused import fuse_distmats
from casn_plugin.ranking.pairs import Pairs, pair_classifier_of


@dataclass(frozen=True)
class Ranking:
    """The nearest gallery images of each query, nearest first.

    Where a query has fewer than topk candidates, rows are -1 and distances infinite at the end.

    Attributes:
        indices: rows of the gallery.
        distances: fused distances, ascending along each row.
        feature_distances: l2 distances of the unit-length features of these pairs.
        attention_distances: their attention distances.
        scored: number of pairs whose attention was compared to find them.
        evidence: what their attention is evidence of.
    """

    indices: Int[Tensor, "queries topk"]
    distances: Float[Tensor, "queries topk"]
    feature_distances: Float[Tensor, "queries topk"]
    attention_distances: Float[Tensor, "queries topk"]
    scored: int
    evidence: Evidence

    def passing(self, threshold: float) -> Bool[Tensor, "queries topk"]:
        """Returns which of these are matches; a query without any: nobody is found.

        Args:
            threshold: distances up to it pass, as :func:`casn_plugin.calibrate` finds it.

        Raises:
            TypeError: no number.
            ValueError: it is negative or not finite.
        """
        check_weight("threshold", threshold)
        return self.distances <= threshold


@dataclass(frozen=True)
class SearchResult:
    """What ``GalleryIndex.search`` finds, for each query nearest first.

    Attributes:
        ranking: rows of the index and the distances.
        names: names of the images found: fewer than topk where there were fewer candidates.
        pids: their identities, -1 where none was given, or where there is no image.
        camids: their cameras, likewise.
        query_attention: attention maps of the query in each pair, >= 0, unscaled.
        gallery_attention: attention maps of the image found in each pair.
        scores: what the evidence says of each pair, NaN where there is no image: z1 − z0 of a
            pair classifier, of a similarity the cosine.

    ``ranking.evidence`` says what attention is evidence of.
    """

    ranking: Ranking
    names: list[list[str]]
    pids: Int64[np.ndarray, "queries topk"]
    camids: Int64[np.ndarray, "queries topk"]
    query_attention: Float[Tensor, "queries topk height width"]
    gallery_attention: Float[Tensor, "queries topk height width"]
    scores: Float[Tensor, "queries topk"]

    @property
    def probabilities(self) -> Float[Tensor, "queries topk"] | None:
        """The pair classifier's probability of "same identity"; None of a similarity."""
        by_similarity = self.ranking.evidence is Evidence.SIMILARITY
        return None if by_similarity else self.scores.sigmoid()

    def matches(self, threshold: float) -> list[list[str]]:
        """Returns the names that pass, for each query; an empty list says: nobody.

        Args:
            threshold: as :meth:`Ranking.passing` takes it.

        Raises:
            TypeError, ValueError: likewise.
        """
        passing = self.ranking.passing(threshold).sum(1).tolist()  # distances ascend
        return [names[:number] for names, number in zip(self.names, passing, strict=True)]


# the arguments of fuse_distmats, and what is searched how
def rank_gallery(
    model: nn.Module,
    query: Encoding,
    gallery: Encodings,
    *,
    topk: int = 10,
    exact: bool = True,
    candidates: Candidates | None = None,
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
            features, re-ranked; an approximation. It says nothing where candidates are given.
        candidates: rows of the gallery to choose from for each query, found by any engine: each
            once, -1 where there are fewer. Attention is compared with these alone, and nothing
            else is read of a gallery that is not in memory. The answer is the topk nearest of
            them; what the engine has missed is missing.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        attention_weight: weight of the attention distance, >= 0; the features have weight 1.
        compute: with what the pairs are worked on.

    Raises:
        TypeError: encodings of unlike kinds or dtypes, features in half precision, candidates
            that are no integers.
        ValueError: unlike feature or map sizes, an empty gallery, no pair classifier, t outside
            [0, 1), topk below 1, a weight that is negative or infinite, features, maps or a pair
            classifier that are not finite, candidates of another number of queries, of rows that
            there are not, or the same twice.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> images = Encoding(torch.rand(5, 4), basis=torch.rand(5, 4, 6, 2))
        >>> rank_gallery(model, images[:2], images, topk=3).indices[:, 0]
        tensor([0, 1])
    """
    check_weight("attention_weight", attention_weight)
    if not len(gallery):
        raise ValueError("the gallery is empty")
    topk = min(check_count("topk", topk), len(gallery))
    check_share("row_threshold", row_threshold)
    if candidates is not None:
        candidates = check_candidates(candidates, len(query), len(gallery))
        topk, exact = min(topk, candidates.shape[1]), False
    pairs = Pairs(model, query, gallery, compute)
    compare_listed = partial(compare, pairs, row_threshold=row_threshold, unit=True)
    best = partial(_best, topk=topk, attention_weight=attention_weight)

    with pairs.working():
        listed = (
            nearest(pairs, topk, unit=True)
            if candidates is None
            else listed_pairs(candidates, pairs.device)
        )
        own = compare_listed(*listed, desc="Comparing attention")
        found = Compared(*pairs.join(*own))
        scored, found = len(found.rows), best(found)
        if exact:
            bound = _fused(found, attention_weight).view(len(query), topk).amax(1)
            own, within = Compared(*(each[:0] for each in found)), 0
            for rows, columns in _within(pairs, bound, found):
                within += len(rows)
                own = best(Compared.cat(own, compare_listed(rows, columns)))
            *others, counts = pairs.join(*own, torch.tensor([within]))
            found, scored = best(Compared.cat(found, Compared(*others))), scored + int(counts.sum())
    table = partial(_table, found.rows, (len(query), topk), device=query.features.device)
    return Ranking(
        table(found.columns, -1),
        table(_fused(found, attention_weight), torch.inf),
        table(found.features, torch.inf),
        table(found.attention, torch.inf),
        scored,
        evidence_of(pair_classifier_of(model)),
    )


def _table(
    rows: Int[Tensor, " pairs"],
    shape: tuple[int, int],
    values: Tensor,
    missing: float | int,
    device: torch.device,
) -> Tensor:
    """Returns values of pairs, which are sorted by query, as a row a query."""
    table = values.new_full(shape, missing)
    table[rows, _places(rows)] = values
    return table.to(device)


def _places(rows: Int[Tensor, " pairs"]) -> Int[Tensor, " pairs"]:
    """Returns the how manieth of its query each pair is, from 0; pairs are sorted by query."""
    return torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)


def _fused(pairs: Compared, attention_weight: float) -> Tensor:
    """Returns the fused distances of listed pairs."""
    return fuse_distmats(
        pairs.features[None], pairs.attention[None], attention_weight=attention_weight
    )[0]


def _best(pairs: Compared, topk: int, attention_weight: float) -> Compared:
    """Returns the topk nearest pairs of each query: by query, fused distance, gallery row."""
    order = pairs.columns.argsort(stable=True)
    order = order[_fused(pairs, attention_weight)[order].argsort(stable=True)]
    order = order[pairs.rows[order].argsort(stable=True)]
    order = order[_places(pairs.rows[order]) < topk]
    return Compared(*(each[order] for each in pairs))


def _within(
    pairs: Pairs, bound: Float[Tensor, " queries"], known: Compared
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the pairs of this process's share whose features are no further apart than a bound.

    Pairs that are known already are left out.
    """
    limit = bound.double()[:, None] + 1e-6  # of distances rounded to float32
    for rows, block, distances in pairs.feature_distances(unit=True, desc="Searching"):
        inside = (known.columns >= block.start) & (known.columns < block.stop)
        inside &= (known.rows >= rows.start) & (known.rows < rows.stop)
        near = distances <= limit[rows]
        near[known.rows[inside] - rows.start, known.columns[inside] - block.start] = False
        columns, queries = near.T.nonzero(as_tuple=True)
        if len(queries):
            yield queries + rows.start, columns + block.start
