"""Who came where: ranked lists of queries, by both distances and by features alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from casn_plugin.doors import check_count, check_matrix
from casn_plugin.evaluation import precisions
from casn_plugin.identities import UNKNOWN, Ids
from casn_plugin.positions import (
    Counted,
    Entries,
    comparable,
    counts,
    in_order,
    in_places,
    order_of,
    positions,
)

_MEMORY = 64 * 2**20


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
        place = in_places(fused, entries, standing)
        near, tied = _nearest(fused, entries, standing.ordered, topk)
        truth, equal = _first_match(fused, entries)
        shown = np.column_stack([near, truth])
        ranks, alike = _ranks(features, entries, shown)
        for row in np.flatnonzero(tied | equal | alike).tolist():
            shown[row], ranks[row] = _by_ordering(fused[row], features[row], entries, row, topk)
        there = shown >= 0
        shown, ranks = np.where(there, shown, 0), np.where(there, ranks, 0)
        found.ap[rows], *_ = precisions(place, entries.match)
        found.truth_rank[rows] = np.where(there[:, -1], place[:, 0], 0)
        found.feature_ranks[rows], found.truth_feature_rank[rows] = ranks[:, :-1], ranks[:, -1]
        known = counted.q_pids[rows, None]
        right = there & (counted.g_pids[shown] == known) & (known != UNKNOWN)
        found.right[rows] = right[:, :-1]
        every = np.where(there, counted.columns[shown], -1)
        found.nearest[rows], found.truth[rows] = every[:, :-1], every[:, -1]
    return found


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
    junk = entries.junk_among(row, len(fused))
    order, by_features = (order_of(distances, junk) for distances in (fused, features))
    ranks = np.zeros(len(fused), np.int64)
    ranks[by_features] = np.arange(1, len(by_features) + 1)
    shown = np.full(topk + 1, -1)
    shown[: min(topk, len(order))] = order[:topk]
    matches = np.isin(order, entries.same[row, entries.match[row]])
    if matches.any():
        shown[-1] = order[matches.argmax()]
    return shown, ranks[shown]
