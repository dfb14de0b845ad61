"""How good rankings (CMC, mAP, mINP, who came where) and the scores of pairs (ROC AUC) are.

A match's position in a ranking is 1 + the number of valid gallery entries nearer than it, which
is found by its value alone: no order of the whole gallery is made, only sorted distances.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from casn_plugin.identities import UNKNOWN, Ids, as_ids, have_match


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
    q_pids, q_camids = as_ids("q_pids", q_pids, queries), as_ids("q_camids", q_camids, queries)
    g_pids, g_camids = as_ids("g_pids", g_pids, galleries), as_ids("g_camids", g_camids, galleries)
    kept = np.flatnonzero(~np.isin(g_pids, as_ids("junk_pids", junk_pids)))
    g_pids, g_camids = g_pids[kept], g_camids[kept]
    columns = None if len(kept) == galleries else torch.from_numpy(kept).to(distmat.device)
    galleries = len(kept)
    # a query's own camera is one that no gallery entry has, where cameras do not matter
    own = q_camids if cross_camera else np.full_like(q_camids, UNKNOWN)
    own = np.where(own == UNKNOWN, UNKNOWN - 1, own)

    by_pid = g_pids.argsort(kind="stable")
    start = np.searchsorted(g_pids, q_pids, "left", by_pid)
    end = np.searchsorted(g_pids, q_pids, "right", by_pid)
    end = np.where(q_pids == UNKNOWN, start, end)
    slots = np.arange((end - start).max(initial=0))  # a query's entries of its pid, padded
    ap, inp = np.full(queries, np.nan), np.full(queries, np.nan)
    first_match = np.full(queries, -1)
    block_size = max(1, max_memory // max(1, 24 * galleries + 200 * len(slots)))
    stop = queries if len(slots) else 0
    bar = tqdm(
        total=stop, unit="query", leave=False,
        disable=None if progress else True, desc="Evaluating",
    )  # fmt: skip
    with bar:
        for top in range(0, stop, block_size):
            rows = slice(top, top + block_size)
            at = start[rows, None] + slots
            present = at < end[rows, None]
            same = by_pid[np.where(present, at, 0)]
            match = present & (g_camids[same] != own[rows, None])
            block = distmat[rows] if columns is None else distmat[rows].index_select(1, columns)
            ap[rows], inp[rows], first_match[rows] = _precisions(block, same, present, match)
            bar.update(len(at))

    found = first_match[first_match >= 0]
    if not len(found):
        raise ValueError(
            f"none of the {queries} queries has a match: expected a gallery entry of its pid"
            + (" from another camera" if cross_camera else "")
        )
    max_rank = min(max_rank, galleries)
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
    q_pids, q_camids = as_ids("q_pids", q_pids, queries), as_ids("q_camids", q_camids, queries)
    g_pids, g_camids = as_ids("g_pids", g_pids, galleries), as_ids("g_camids", g_camids, galleries)
    ids, ap = (q_pids, g_pids, q_camids, g_camids), np.full(queries, np.nan)
    options: Any = {"cross_camera": cross_camera, "junk_pids": junk_pids}
    if have_match(*ids, **options).any():
        ap = evaluate_rank(fused_distmat, *ids, **options).ap
    left_out, unknown = np.isin(g_pids, list(junk_pids)), g_camids == UNKNOWN
    topk = min(topk, galleries)
    nearest, feature_ranks = np.full((queries, topk), -1), np.zeros((queries, topk), np.int64)
    right = np.zeros((queries, topk), bool)
    truth, (truth_rank, truth_feature_rank) = np.full(queries, -1), np.zeros((2, queries), np.int64)
    for query in range(queries):
        same = (g_pids == q_pids[query]) & (g_pids != UNKNOWN)
        junk = left_out | (same & (g_camids == q_camids[query]) & ~unknown & bool(cross_camera))
        order, by_features = (_order(d[query], junk) for d in (fused_distmat, feature_distmat))
        ranks = np.zeros(galleries, np.int64)
        ranks[by_features] = np.arange(1, len(by_features) + 1)
        shown = order[:topk]
        nearest[query, : len(shown)] = shown
        right[query, : len(shown)] = same[shown]
        feature_ranks[query, : len(shown)] = ranks[shown]
        if not np.isnan(ap[query]):
            place = same[order].argmax()
            truth[query], truth_rank[query] = order[place], place + 1
            truth_feature_rank[query] = ranks[order[place]]
    return RankedLists(nearest, right, feature_ranks, truth, truth_rank, truth_feature_rank, ap)


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
    positives, negatives = scores[same], _sorted(scores[~same])
    if not len(positives) or not len(negatives):
        return float("nan")
    below = int(torch.searchsorted(negatives, positives).sum())
    not_above = int(torch.searchsorted(negatives, positives, right=True).sum())
    return (below + not_above) / 2 / len(positives) / len(negatives)


def _sorted(values: Tensor) -> Tensor:
    """Returns values sorted along the last dimension."""
    if values.is_cuda:
        return values.sort().values
    if values.dtype == torch.bfloat16:  # unknown to NumPy; float32 holds every value of it
        return _sorted(values.float()).to(values.dtype)
    return torch.from_numpy(np.sort(values))  # several times faster than PyTorch on the CPU


def _precisions(
    distmat: Float[Tensor, "queries galleries"],
    same: Int64[np.ndarray, "queries slots"],
    present: Bool[np.ndarray, "queries slots"],
    match: Bool[np.ndarray, "queries slots"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns AP, INP and rank of the first match of some queries: NaN, NaN and -1 without one.

    The arguments are those of :func:`_positions`.
    """
    positions, unsure = _positions(distmat, same, present, match)
    for row in unsure.nonzero()[0]:
        of_pid, junk = np.zeros((2, distmat.shape[1]), dtype=bool)
        of_pid[same[row, present[row]]] = True
        junk[same[row, present[row] & ~match[row]]] = True
        place = _sorted_positions(distmat[row], of_pid, junk)
        positions[row, : len(place)] = place
    numbers, slots = match.sum(1), np.arange(match.shape[1])
    precision = np.where(slots < numbers[:, None], (slots + 1) / positions, 0)
    found = numbers > 0
    last = precision[np.arange(len(numbers)), np.maximum(numbers, 1) - 1]
    ap = np.where(found, precision.sum(1) / np.maximum(numbers, 1), np.nan)
    return ap, np.where(found, last, np.nan), np.where(found, positions[:, 0] - 1, -1)


def _positions(
    distmat: Float[Tensor, "queries galleries"],
    same: Int64[np.ndarray, "queries slots"],
    present: Bool[np.ndarray, "queries slots"],
    match: Bool[np.ndarray, "queries slots"],
) -> tuple[Int64[np.ndarray, "queries slots"], Bool[np.ndarray, "queries"]]:
    """Returns the positions of each query's matches, from 1, and for which queries to sort instead.

    Those are the queries with a match that ties with a non-match, or is infinite.

    Args:
        distmat: the distances.
        same: the gallery entries of each query's pid, padded.
        present: which of these are no padding.
        match: which are no junk either.
    """
    device = distmat.device
    real, matching = (torch.from_numpy(mask).to(device) for mask in (present, match))
    distmat = (distmat if distmat.element_size() >= 4 else distmat.float()).contiguous()
    near = distmat.gather(1, torch.from_numpy(same).to(device))
    near = near.where(real, torch.inf)
    matches = near.where(matching, torch.inf)
    unsure = (matching & (matches == torch.inf)).any(1)
    near, matches = near.sort(1).values, matches.sort(1).values

    ordered = _sorted(distmat)
    below = torch.searchsorted(ordered, matches)
    upto = torch.searchsorted(ordered, matches, right=True)
    same_below = torch.searchsorted(near, matches)
    same_upto = torch.searchsorted(near, matches, right=True)

    tied = (upto - below != same_upto - same_below) & (matches < torch.inf)
    positions = below - same_below + torch.arange(1, same.shape[1] + 1, device=device)
    return positions.cpu().numpy(), (unsure | tied.any(1)).cpu().numpy()


def _sorted_positions(
    distances: Float[Tensor, "galleries"],
    same: Bool[np.ndarray, "galleries"],
    junk: Bool[np.ndarray, "galleries"],
) -> Int64[np.ndarray, "matches"]:
    """Returns the positions of one query's matches, from 1, by torchreid's own procedure."""
    return np.flatnonzero(same[_order(distances, junk)]) + 1


def _order(
    distances: Float[Tensor, "galleries"], junk: Bool[np.ndarray, "galleries"]
) -> Int64[np.ndarray, "kept"]:
    """Returns one query's gallery entries without junk, nearest first, as torchreid orders them."""
    known = distances.dtype in (torch.float16, torch.float32, torch.float64)
    row = (distances if known else distances.float()).detach().cpu().contiguous()
    order = np.argsort(row.numpy())
    kept: np.ndarray = order[~junk[order]]
    return kept
