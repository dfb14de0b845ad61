"""Ranked lists explained: who was found, who stood in the way, and where the model looked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
from jaxtyping import Float
from torch import nn
from tqdm import tqdm

from casn_plugin.attention import ROW_THRESHOLD
from casn_plugin.doors import check_share
from casn_plugin.evidence import Evidence, evidence_of
from casn_plugin.explanation.figures import Drawn, plot_ranking
from casn_plugin.explanation.pair import PairExplanation, explain_pairs
from casn_plugin.explanation.pictures import verdict
from casn_plugin.identities import UNKNOWN, same_person
from casn_plugin.loading import Encoded, encode_loader, image_loader, read_item
from casn_plugin.model import as_casn
from casn_plugin.ranked import RankedLists, ranked_lists
from casn_plugin.ranking import RankingOptions, fused_distmats

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Match:
    """One gallery image in a ranked list.

    Attributes:
        pair: the query and this image, explained.
        row: the image's row in the gallery.
        pid: its identity, -1 where it is unknown.
        camid: its camera, -1 where it is unknown.
        rank: where it stands in the fused ranking, from 1.
        feature_rank: where it stands by features alone, from 1.
    """

    pair: PairExplanation
    row: int
    pid: int
    camid: int
    rank: int
    feature_rank: int

    @property
    def right(self) -> bool | None:
        """Whether it shows the query's identity; None where that is not known."""
        return self.pair.same

    def __repr__(self) -> str:
        """Returns identity and ranks on a line."""
        return (
            f"Match(pid={self.pid}, camid={self.camid}, right={self.right}, rank={self.rank}, "
            f"feature_rank={self.feature_rank})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class RankingExplanation(Drawn):
    """A query and its ranked list, as :func:`explain_ranking` finds it.

    Attributes:
        query: the query's row.
        picture: its picture as RGB in [0, 1].
        pid: its identity.
        camid: its camera.
        ap: average precision of its fused ranking in (0, 1]; NaN without a match.
        matches: the nearest gallery images, in order.
        truth: the right image that stands first, where it is none of `matches`; else None.
        evidence: what attention is evidence of.
    """

    query: int
    picture: Float[np.ndarray, "rows columns 3"]
    pid: int
    camid: int
    ap: float
    matches: tuple[Match, ...]
    truth: Match | None
    evidence: Evidence

    @property
    def found(self) -> Match | None:
        """The right image that stands first; None where there is none."""
        return next((match for match in self._shown() if match.right), None)

    @property
    def failed(self) -> bool:
        """Whether another identity stands at rank 1, although there is a right image."""
        return self.found is not None and self.found.rank > 1

    def headline(self) -> str:
        """Returns who was searched for and how it went, in a sentence."""
        found = self.found
        outcome = (
            "nobody to be found" if found is None else f"found at rank {found.rank}"
            if found.rank == 1 else f"wrong at rank 1, found at rank {found.rank}"
        )  # fmt: skip
        who = "Somebody unknown" if self.pid == UNKNOWN else f"Person {self.pid}"
        if self.pid == UNKNOWN:
            outcome = "who it is, is not known"
        return f"{who}{'' if self.camid == UNKNOWN else f' of camera {self.camid}'}: {outcome}"

    def plot(self) -> "Figure":
        """Returns a figure of the query, its matches and the attention of each pair."""
        shown = self._shown()
        captions = [
            f"rank {match.rank}\n(features: {match.feature_rank})\n{match.pair.in_short}"
            for match in shown
        ]
        return plot_ranking(
            self.picture,
            [(match.pair.first, match.pair.second) for match in shown],
            [match.right for match in shown],
            captions,
            headline=self.headline(),
            apart=0 if self.truth is None else 1,
            evidence=self.evidence,
        )

    def describe(self) -> str:
        """Returns the ranked list in words."""
        words = [
            f"rank {match.rank} (by features {match.feature_rank}): {verdict(match.right)[2:]}"
            for match in self._shown()
        ]
        listed = "; ".join(words) or "Nothing to compare with"
        return f"{self.headline()}. {listed}. Evidence: {self.evidence}."

    def _shown(self) -> list[Match]:
        """Returns the matches and the truth that stands apart."""
        return [*self.matches, *([] if self.truth is None else [self.truth])]

    def __repr__(self) -> str:
        """Returns who was searched for and how it went."""
        return f"RankingExplanation({self.headline()!r}, ap={self.ap:.3f})"


class ExplainedRankings(Sequence[RankingExplanation]):
    """All queries of a data set, ranked; each explained when it is asked for.

    ``explained[i]`` encodes query i and its nearest images anew, so it takes milliseconds, and
    nothing but the lists is kept.

    Args:
        model: the CASN.
        query: the queries: a data set whose items :func:`casn_plugin.loading.read_item` reads,
            such as dictionaries with "img" (normalised), "pid" and "camid".
        gallery: the gallery, likewise.
        ranked: their ranked lists.
        topk: matches to explain for each query.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.

    Raises:
        TypeError: a model that is no CASN.
        ValueError: topk below 1, or lists of another number of queries or a longer gallery.

    Attributes:
        ranked: :class:`~casn_plugin.ranked.RankedLists`; `failures`, `best` and `worst` of
            it pick queries.
        row_threshold: t.
    """

    def __init__(
        self,
        model: nn.Module,
        query: Any,
        gallery: Any,
        ranked: RankedLists,
        *,
        topk: int = 5,
        row_threshold: float = ROW_THRESHOLD,
    ) -> None:
        if topk < 1:
            raise ValueError(f"topk must be at least 1, got {topk}")
        if len(ranked) != len(query):
            raise ValueError(f"got ranked lists of {len(ranked)} queries for {len(query)} queries")
        if ranked.nearest.max(initial=-1) >= len(gallery):
            raise ValueError(f"got ranked lists of a gallery longer than {len(gallery)} images")
        self.model = as_casn(model)
        self.ranked = ranked
        self.topk = topk
        self._query = query
        self._gallery = gallery
        self.row_threshold = row_threshold

    def __len__(self) -> int:
        """Returns the number of queries."""
        return len(self.ranked)

    @overload
    def __getitem__(self, query: SupportsIndex) -> RankingExplanation: ...

    @overload
    def __getitem__(self, query: slice) -> list[RankingExplanation]: ...

    def __getitem__(
        self, query: SupportsIndex | slice
    ) -> RankingExplanation | list[RankingExplanation]:
        """Returns the :class:`RankingExplanation` of a query (or several, of a slice)."""
        if isinstance(query, slice):
            return [self[row] for row in range(*query.indices(len(self)))]
        return self._explain(range(len(self))[query])

    @property
    def evidence(self) -> Evidence:
        """What attention is evidence of."""
        return evidence_of(self.model.pair_classifier)

    def failures(self, number: int | None = None) -> Iterator[RankingExplanation]:
        """Yields the queries that are wrong at rank 1, the worst first."""
        return (self[row] for row in self.ranked.failures(number))

    def worst(self, number: int | None = None) -> Iterator[RankingExplanation]:
        """Yields the queries with the lowest average precision, the lowest first."""
        return (self[row] for row in self.ranked.worst(number))

    def best(self, number: int | None = None) -> Iterator[RankingExplanation]:
        """Yields the queries with the highest average precision, the highest first."""
        return (self[row] for row in self.ranked.best(number))

    def _explain(self, row: int) -> RankingExplanation:
        """Returns a query's ranked list, the truth apart where it is not in it."""
        ranked = self.ranked
        columns = np.flatnonzero(ranked.nearest[row, : self.topk] >= 0).tolist()
        shown = [
            (int(ranked.nearest[row, i]), i + 1, int(ranked.feature_ranks[row, i])) for i in columns
        ]
        truth = int(ranked.truth[row])
        if truth >= 0 and not ranked.right[row, columns].any():
            shown.append((truth, int(ranked.truth_rank[row]), int(ranked.truth_feature_rank[row])))
        item = read_item(self._query[row])
        items = [read_item(self._gallery[match]) for match, _, _ in shown]
        pairs = explain_pairs(
            self.model,
            item.img,
            [each.img for each in items],
            [same_person(item.pid, each.pid) for each in items],
            self.row_threshold,
        )
        matches = [
            Match(pair, match, each.pid, each.camid, *ranks)
            for pair, each, (match, *ranks) in zip(pairs, items, shown, strict=True)
        ]
        return RankingExplanation(
            query=row,
            picture=self.model.preprocessing.pictures(item.img[None])[0],
            pid=item.pid,
            camid=item.camid,
            ap=float(ranked.ap[row]),
            matches=tuple(matches[: len(columns)]),
            truth=matches[-1] if len(matches) > len(columns) else None,
            evidence=self.evidence,
        )


def explain_ranking(
    model: nn.Module,
    query: Any,
    gallery: Any,
    *,
    topk: int = 5,
    row_threshold: float = ROW_THRESHOLD,
    ranking: RankingOptions | None = None,
) -> ExplainedRankings:
    """Returns the ranked lists of all queries, each explained when it is asked for.

    Ranked by the fused distance of :func:`casn_plugin.ranking.fused_distmats`. Junk (gallery
    images of the query's own identity and camera) is left out. Identities and cameras may be
    unknown (-1 or None): such pictures are listed without a verdict.

    Args:
        model: a CASN, or one in nn.DataParallel.
        query: the queries: one of torchreid's test loaders, whose data set is gone through in its
            own order; another loader of images and, where there are, pids and camids; or a
            sequence of (image, pid, camid), as a torchreid data set's `query` and `gallery` lists
            have them. Images may be all that :func:`explain_pair` takes.
        gallery: the gallery, likewise.
        topk: matches to explain for each query.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        ranking: how distances of features and of attention become one ranking; its `gallery_dir`
            is not used.

    Raises:
        TypeError: a model that is no CASN or in half precision, or data of another form.
        ValueError: no queries, an empty gallery, topk below 1; and as :func:`explain_pair`.

    Example:
        >>> from casn_plugin import CASN
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, 8))
        >>> model = CASN(net, forward=lambda net, imgs: (None, net(imgs).mean((2, 3))))
        >>> import torch
        >>> imgs = torch.rand(3, 3, 64, 32)
        >>> explained = explain_ranking(
        ...     model, [(imgs[0], 7, 0)], [(imgs[1], 8, 1), (imgs[2], 7, 1)], topk=2)
        >>> sorted(match.pid for match in explained[0].matches)
        [7, 8]
    """
    casn = as_casn(model)
    check_share("row_threshold", row_threshold)
    ranking = RankingOptions() if ranking is None else ranking
    query = image_loader("query", query, casn.preprocessing)
    gallery = image_loader("gallery", gallery, casn.preprocessing)

    def encoded(loader: Any, name: str) -> Encoded:
        hidden = None if ranking.compute.progress else True
        return encode_loader(casn, tqdm(loader, name, leave=False, disable=hidden))

    first, second = encoded(query, "Encoding query"), encoded(gallery, "Encoding gallery")
    features, _, fused = fused_distmats(
        casn,
        first.encoding,
        second.encoding,
        row_threshold=row_threshold,
        options=ranking,
    )
    ids = first.pids, second.pids, first.camids, second.camids
    ranked = ranked_lists(features, fused, *ids, topk=topk, **ranking.counting)
    return ExplainedRankings(
        casn,
        query.dataset,
        gallery.dataset,
        ranked,
        topk=topk,
        row_threshold=row_threshold,
    )
