"""How good rankings (CMC, mAP, mINP, who came where) and the scores of pairs (ROC AUC) are.

:mod:`casn_plugin.positions` finds where a match stands without ordering the gallery.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from tqdm import tqdm

from casn_plugin.doors import (
    check_count,
    check_finite,
    check_matrix,
    check_same,
    check_tensor,
)
from casn_plugin.identities import UNKNOWN, Ids
from casn_plugin.positions import (
    Counted,
    Entries,
    Found,
    comparable,
    counts,
    in_order,
    order_of,
    positions,
)

_MEMORY = 64 * 2**20


@dataclass(frozen=True)
class Evaluation:
    """How well distances rank the gallery, as :func:`evaluate_rank` finds it.

    Attributes:
        cmc: cumulative matching characteristics in [0, 1]: the share of valid queries with a
            match among the first 1, 2, ... entries.
        mean_ap: mAP in (0, 1].
        mean_inp: mINP in (0, 1] (Ye et al., "Deep learning for person re-identification: a survey
            and outlook"): mean of number of matches / position of the last match.
        ap: average precision of each query in (0, 1], NaN where it has no match.
        first_match: each query's rank of the first match, from 0, or -1 where it has none.
    """

    cmc: Float32[np.ndarray, "ranks"]
    mean_ap: float
    mean_inp: float
    ap: Float64[np.ndarray, "queries"]
    first_match: Int64[np.ndarray, "queries"]


# the first six arguments are torchreid's; the others say what counts, and with what it is counted
def evaluate_rank(
    distmat: Float[Tensor, "queries galleries"],
    q_pids: Ids,
    g_pids: Ids,
    q_camids: Ids | None = None,
    g_camids: Ids | None = None,
    *,
    cross_camera: bool = True,
    junk_pids: Sequence[int] = (),
    max_rank: int = 50,
    max_memory: int = 256 * 2**20,
    progress: bool = False,
) -> Evaluation:
    """Returns CMC, mAP and mINP, the first two equal to those of torchreid's ``evaluate_rank``.

    Gallery entries of the query's own pid and camid are junk and left out; a query without any
    other entry of its pid does not count. Where a match ties with another person's entry, the
    order is that of ``np.argsort``, as in torchreid (in float32 for dtypes that NumPy lacks).

    What is unknown (-1 or None) is the same as nothing else: a query of unknown identity does not
    count, a gallery entry of unknown identity is somebody else, and an unknown camera is no
    query's own.

    Args:
        distmat: distances of any float dtype on any device, where the work is done.
        q_pids: identities of the queries.
        g_pids: identities of the gallery.
        q_camids: cameras of the queries; None: all unknown.
        g_camids: cameras of the gallery; None: all unknown.
        cross_camera: entries of the query's own camera are no matches. False: they are, as where
            there is one camera; the query itself must then not be in the gallery.
        junk_pids: gallery entries of these identities are left out of every ranking; Market-1501
            marks so its boxes with too little of a person, as -1.
        max_rank: length of the CMC, cut to the size of the gallery.
        max_memory: bytes that the tensors of a block of queries may take.
        progress: show a progress bar on a terminal.

    Raises:
        TypeError: distances that are no float tensor, pids or camids that are no integers.
        ValueError: unlike shapes, NaN in distances, pids or camids below -1, `max_rank` or
            `max_memory` below 1, or no query with a match.

    Example:
        >>> distmat, camids = torch.tensor([[0.0, 0.1, 0.2]]), np.array([1, 1, 2])
        >>> found = evaluate_rank(distmat, np.array([7]), np.array([7, 8, 7]), camids[:1], camids)
        >>> found.cmc.tolist(), found.mean_ap, found.mean_inp
        ([0.0, 1.0, 1.0], 0.5, 0.5)
    """
    check_matrix("distmat", distmat)
    check_count("max_rank", max_rank)
    check_count("max_memory", max_memory, most=2**63 - 1)
    distmat, (queries, galleries) = distmat.detach(), distmat.shape
    ids = q_pids, g_pids, q_camids, g_camids
    counted = Counted((queries, galleries), *ids, cross_camera, junk_pids)
    ap, inp = np.full(queries, np.nan), np.full(queries, np.nan)
    first_match = np.full(queries, -1)
    bar = tqdm(
        total=queries, unit="query", leave=False,
        disable=None if progress else True, desc="Evaluating",
    )  # fmt: skip
    with bar:
        for rows in counted.blocks(max_memory):
            block, entries = counted.distances(distmat, rows), counted.entries(rows)
            place = _ordered_where_unsure(block, entries, positions(block, entries))
            ap[rows], inp[rows], first_match[rows] = _precisions(place, entries.match)
            bar.update(len(block))

    found = first_match[first_match >= 0]
    if not len(found):
        raise ValueError(
            f"none of the {queries} queries has a match: expected a gallery entry of its pid"
            + (" from another camera" if cross_camera else "")
        )
    max_rank = min(max_rank, len(counted))
    hits = np.bincount(found, minlength=max_rank)[:max_rank].cumsum()
    return Evaluation(
        cmc=hits.astype(np.float32) / np.float32(len(found)),
        mean_ap=float(np.nanmean(ap)),
        mean_inp=float(np.nanmean(inp)),
        ap=ap,
        first_match=first_match,
    )


@dataclass(frozen=True)
class RankedLists:
    """Who came out where, for every query, as :func:`ranked_lists` finds it.

    Ranks count from 1, in the order by which :func:`evaluate_rank` counts, so `truth_rank` is its
    `first_match` + 1. Junk (gallery entries of the query's own pid and camid) is left out.

    Attributes:
        nearest: gallery row of each query's nearest entries by fused distance, -1 where there
            are no more.
        right: whether these are of the query's identity.
        feature_ranks: at which rank each of them stands by features alone, 0 where there is none.
        truth: gallery row of the right entry that stands first, -1 where there is none.
        truth_rank: its rank by fused distance, 0 where there is none.
        truth_feature_rank: its rank by features alone.
        ap: average precision of each query's fused ranking in (0, 1], NaN without a match.
    """

    nearest: Int64[np.ndarray, "queries topk"]
    right: Bool[np.ndarray, "queries topk"]
    feature_ranks: Int64[np.ndarray, "queries topk"]
    truth: Int64[np.ndarray, "queries"]
    truth_rank: Int64[np.ndarray, "queries"]
    truth_feature_rank: Int64[np.ndarray, "queries"]
    ap: Float64[np.ndarray, "queries"]

    def __len__(self) -> int:
        """Returns the number of queries."""
        return len(self.ap)

    def failures(self, number: int | None = None) -> list[int]:
        """Returns the queries with a match but a wrong entry at rank 1, the worst first."""
        return [query for query in self.worst() if self.truth_rank[query] > 1][:number]

    def worst(self, number: int | None = None) -> list[int]:
        """Returns the queries with a match by average precision, the lowest first."""
        order = np.lexsort((-self.truth_rank, self.ap))
        return [int(query) for query in order if self.truth[query] >= 0][:number]

    def best(self, number: int | None = None) -> list[int]:
        """Returns the queries with a match by average precision, the highest first."""
        return self.worst()[::-1][:number]


# two matrices, and the arguments of evaluate_rank that say what counts
def ranked_lists(
    feature_distmat: Float[Tensor, "queries galleries"],
    fused_distmat: Float[Tensor, "queries galleries"],
    q_pids: Ids,
    g_pids: Ids,
    q_camids: Ids | None = None,
    g_camids: Ids | None = None,
    *,
    cross_camera: bool = True,
    junk_pids: Sequence[int] = (),
    topk: int = 10,
) -> RankedLists:
    """Returns each query's nearest entries, where features alone put them, and the truth.

    Entries at one distance come in the order of ``np.argsort``, as in torchreid. A query of unknown
    identity, or without a match, has a list too.

    Args:
        feature_distmat: distances of the features alone.
        fused_distmat: distances of features and attention, of the same pairs.
        q_pids: identities of the queries.
        g_pids: identities of the gallery.
        q_camids: cameras of the queries; None: all unknown.
        g_camids: cameras of the gallery; None: all unknown.
        cross_camera: as in :func:`evaluate_rank`.
        junk_pids: as in :func:`evaluate_rank`.
        topk: entries to keep for each query, at most as many as the gallery has.

    Raises:
        TypeError: as :func:`evaluate_rank`.
        ValueError: as :func:`evaluate_rank`, matrices of unlike shapes, `topk` below 1.

    Example:
        >>> distmat, camids = torch.tensor([[0.2, 0.1, 0.3]]), np.array([2, 2, 2])
        >>> ids = np.array([7]), np.array([7, 8, 9]), np.array([1]), camids
        >>> found = ranked_lists(distmat, distmat, *ids, topk=2)
        >>> found.nearest.tolist(), found.truth_rank.tolist(), found.failures()
        ([[1, 0]], [2], [0])
    """
    check_count("topk", topk)
    check_matrix("feature_distmat", feature_distmat)
    check_matrix("fused_distmat", fused_distmat)
    if feature_distmat.shape != fused_distmat.shape:
        raise ValueError(
            "expected two matrices of one shape, got "
            f"{tuple(feature_distmat.shape)} and {tuple(fused_distmat.shape)}"
        )
    queries, galleries = fused_distmat.shape
    ids = q_pids, g_pids, q_camids, g_camids
    counted = Counted((queries, galleries), *ids, cross_camera, junk_pids)
    topk = min(topk, galleries)
    found = RankedLists(
        nearest=np.full((queries, topk), -1),
        right=np.zeros((queries, topk), bool),
        feature_ranks=np.zeros((queries, topk), np.int64),
        truth=np.full(queries, -1),
        truth_rank=np.zeros(queries, np.int64),
        truth_feature_rank=np.zeros(queries, np.int64),
        ap=np.full(queries, np.nan),
    )
    for rows in counted.blocks(_MEMORY):
        entries = counted.entries(rows)
        fused, features = (
            counted.distances(distmat.detach(), rows)
            for distmat in (fused_distmat, feature_distmat)
        )
        standing = positions(fused, entries)
        place = _ordered_where_unsure(fused, entries, standing)
        near, tied = _nearest(fused, entries, standing.ordered, topk)
        truth, equal = _first_match(fused, entries)
        shown = np.column_stack([near, truth])
        ranks, alike = _ranks(features, entries, shown)
        for row in np.flatnonzero(tied | equal | alike).tolist():
            shown[row], ranks[row] = _by_ordering(fused[row], features[row], entries, row, topk)
        there = shown >= 0
        shown, ranks = np.where(there, shown, 0), np.where(there, ranks, 0)
        found.ap[rows], *_ = _precisions(place, entries.match)
        found.truth_rank[rows] = np.where(there[:, -1], place[:, 0], 0)
        found.feature_ranks[rows], found.truth_feature_rank[rows] = ranks[:, :-1], ranks[:, -1]
        known = counted.q_pids[rows, None]
        right = there & (counted.g_pids[shown] == known) & (known != UNKNOWN)
        found.right[rows] = right[:, :-1]
        every = np.where(there, counted.columns[shown], -1)
        found.nearest[rows], found.truth[rows] = every[:, :-1], every[:, -1]
    return found


def verification_auc(scores: Float[Tensor, "*pairs"], same: Bool[Tensor, "*pairs"]) -> float:
    """Returns the ROC AUC of pair scores: 1 = all positives score higher, 0.5 = chance.

    It is NaN where positives or negatives are missing. Ties count half.

    Raises:
        TypeError: scores that are no float tensor, or `same` that is none of bool.
        ValueError: unlike shapes, or NaN in the scores.

    Example:
        >>> verification_auc(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[True, False, False]]))
        1.0
    """
    check_finite("scores", check_tensor("scores", scores, "*pairs"))
    check_same("same", same, scores.shape)
    positives, negatives = scores[same], in_order(scores[~same])
    if not len(positives) or not len(negatives):
        return float("nan")
    below = int(torch.searchsorted(negatives, positives).sum())
    not_above = int(torch.searchsorted(negatives, positives, right=True).sum())
    return (below + not_above) / 2 / len(positives) / len(negatives)


def _precisions(
    place: Int64[np.ndarray, "queries slots"], match: Bool[np.ndarray, "queries slots"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns AP, INP and rank of the first match of some queries: NaN, NaN and -1 without one.

    Args:
        place: where the matches of each stand.
        match: as many of each query are true as it has matches.
    """
    numbers, slots = match.sum(1), np.arange(match.shape[1])
    precision = np.where(slots < numbers[:, None], (slots + 1) / place, 0)
    found = numbers > 0
    last = precision[np.arange(len(numbers)), np.maximum(numbers, 1) - 1]
    ap = np.where(found, precision.sum(1) / np.maximum(numbers, 1), np.nan)
    return ap, np.where(found, last, np.nan), np.where(found, place[:, 0] - 1, -1)


def _ordered_where_unsure(
    distmat: Float[Tensor, "queries counted"], entries: Entries, found: Found
) -> Int64[np.ndarray, "queries slots"]:
    """Returns where matches stand; where that is not sure, by ordering the row."""
    place = found.positions.copy()
    for row in np.flatnonzero(found.unsure).tolist():
        match = np.zeros(distmat.shape[1], dtype=bool)
        match[entries.same[row, entries.match[row]]] = True
        here = np.flatnonzero(match[order_of(distmat[row], _junk(entries, row, match.size))]) + 1
        place[row, : len(here)] = here
    return place


def _junk(entries: Entries, row: int, number: int) -> Bool[np.ndarray, " counted"]:
    """Returns which of all entries are junk for a query."""
    junk = np.zeros(number, dtype=bool)
    junk[entries.same[row, entries.junk[row]]] = True
    return junk


def _nearest(
    distmat: Float[Tensor, "queries counted"],
    entries: Entries,
    ordered: Float[Tensor, "queries counted"],
    topk: int,
) -> tuple[Int64[np.ndarray, "queries topk"], Bool[np.ndarray, " queries"]]:
    """Returns each query's nearest entries without junk, -1 where there are no more.

    And for which queries that is not sure, as one of them ties with another entry.
    """
    number, junk = distmat.shape[1], entries.junk
    last = torch.from_numpy(np.minimum(topk + junk.sum(1), number) - 1).to(distmat.device)
    within = comparable(distmat) <= ordered.gather(1, last[:, None])
    places = np.flatnonzero(within.cpu().numpy())  # by query
    rows = np.arange(len(junk))[:, None] * number
    places = np.setdiff1d(places, (rows + entries.same)[junk], assume_unique=True)
    near_values = distmat.reshape(-1)[torch.from_numpy(places).to(distmat.device)]
    values = near_values.double().cpu().numpy()
    order = np.lexsort((values, places // number))
    places, values = places[order], values[order]
    rows, columns = np.divmod(places, number)
    ranks = np.arange(len(rows)) - np.searchsorted(rows, rows)
    tied = (rows[1:] == rows[:-1]) & (values[1:] == values[:-1]) & (ranks[:-1] < topk)
    unsure = np.zeros(len(junk), bool)
    unsure[rows[:-1][tied]] = True
    shown, near = ranks < topk, np.full((len(junk), topk), -1)
    near[rows[shown], ranks[shown]] = columns[shown]
    return near, unsure


def _first_match(
    distmat: Float[Tensor, "queries counted"], entries: Entries
) -> tuple[Int64[np.ndarray, " queries"], Bool[np.ndarray, " queries"]]:
    """Returns the nearest match of each query, -1 without one; and where two are equally near."""
    values = distmat.gather(1, torch.from_numpy(entries.same).to(distmat.device))
    near = np.where(entries.match, values.double().cpu().numpy(), np.inf)
    nearest = (near == near.min(1, keepdims=True)) & entries.match
    rows, place = np.arange(len(near)), nearest.argmax(1)
    found = np.where(nearest[rows, place], entries.same[rows, place], -1)
    return found, nearest.sum(1) > 1


def _ranks(
    distmat: Float[Tensor, "queries counted"],
    entries: Entries,
    columns: Int64[np.ndarray, "queries some"],
) -> tuple[Int64[np.ndarray, "queries some"], Bool[np.ndarray, " queries"]]:
    """Returns the ranks of some entries of each query, none of them junk, from 1.

    And for which queries that is not sure, as one of them ties with another entry or is infinite.
    """
    device, distmat = distmat.device, comparable(distmat)
    there = torch.from_numpy(columns >= 0).to(device)
    values = distmat.gather(1, torch.from_numpy(np.maximum(columns, 0)).to(device))
    junk = distmat.gather(1, torch.from_numpy(entries.same).to(device))
    junk = junk.where(torch.from_numpy(entries.junk).to(device), torch.inf).sort(1).values
    below, upto = counts(in_order(distmat), values)
    junk_below, junk_upto = counts(junk, values)
    alone = upto - below == junk_upto - junk_below + 1
    unsure = (there & ~(alone & (values < torch.inf))).any(1)
    return (below - junk_below + 1).cpu().numpy(), unsure.cpu().numpy()


def _by_ordering(
    fused: Float[Tensor, " counted"],
    features: Float[Tensor, " counted"],
    entries: Entries,
    row: int,
    topk: int,
) -> tuple[Int64[np.ndarray, " some"], Int64[np.ndarray, " some"]]:
    """Returns a query's nearest entries and its first match, -1 each where there is none.

    And the ranks of these by features.
    """
    junk = _junk(entries, row, len(fused))
    order, by_features = (order_of(distances, junk) for distances in (fused, features))
    ranks = np.zeros(len(fused), np.int64)
    ranks[by_features] = np.arange(1, len(by_features) + 1)
    shown = np.full(topk + 1, -1)
    shown[: min(topk, len(order))] = order[:topk]
    matches = np.isin(order, entries.same[row, entries.match[row]])
    if matches.any():
        shown[-1] = order[matches.argmax()]
    return shown, ranks[shown]
