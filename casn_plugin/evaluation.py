"""How good rankings (CMC, mAP, mINP) and the scores of pairs (ROC AUC) are.

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
from casn_plugin.identities import Ids
from casn_plugin.positions import (
    Counted,
    in_order,
    in_places,
    positions,
)


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
            place = in_places(block, entries, positions(block, entries))
            ap[rows], inp[rows], first_match[rows] = precisions(place, entries.match)
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


def precisions(
    place: Int64[np.ndarray, "queries slots"], match: Bool[np.ndarray, "queries slots"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns AP, INP and rank of the first match of some queries: NaN, NaN and -1 without one.

    Args:
        place: where the matches of each stand.
        match: as many of each query are true as it has matches.

    Example:
        >>> precisions(np.array([[1, 4]]), np.array([[True, True]]))
        (array([0.75]), array([0.5]), array([0]))
    """
    numbers, slots = match.sum(1), np.arange(match.shape[1])
    precision = np.where(slots < numbers[:, None], (slots + 1) / place, 0)
    found = numbers > 0
    last = precision[np.arange(len(numbers)), np.maximum(numbers, 1) - 1]
    ap = np.where(found, precision.sum(1) / np.maximum(numbers, 1), np.nan)
    return ap, np.where(found, last, np.nan), np.where(found, place[:, 0] - 1, -1)
