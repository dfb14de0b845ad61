"""How good rankings (CMC, mAP, mINP, who came where), pairs (ROC AUC) and attention maps are.

A match's position in a ranking is 1 + the number of valid gallery entries nearer than it, which
is found by its value alone: no order of the whole gallery is made, only sorted distances.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Bool, Float, Float32, Float64, Int64, Integer
from torch import Tensor
from tqdm import tqdm

from casn_plugin.attention import scale_maps


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


def evaluate_rank(
    distmat: Float[Tensor, "queries galleries"],
    q_pids: Integer[np.ndarray, "queries"] | Integer[Tensor, "queries"],
    g_pids: Integer[np.ndarray, "galleries"] | Integer[Tensor, "galleries"],
    q_camids: Integer[np.ndarray, "queries"] | Integer[Tensor, "queries"],
    g_camids: Integer[np.ndarray, "galleries"] | Integer[Tensor, "galleries"],
    *,
    max_rank: int = 50,
    max_memory: int = 256 * 2**20,
    progress: bool = False,
) -> Evaluation:
    """Returns CMC, mAP and mINP, the first two equal to those of torchreid's ``evaluate_rank``.

    Gallery entries of the query's own pid and camid are junk and left out; a query without any
    other entry of its pid does not count. Where a match ties with another person's entry, the
    order is that of ``np.argsort``, as in torchreid (in float32 for dtypes that NumPy lacks).

    Args:
        distmat: distances of any float dtype on any device, where the work is done.
        q_pids: identities of the queries.
        g_pids: identities of the gallery.
        q_camids: cameras of the queries.
        g_camids: cameras of the gallery.
        max_rank: length of the CMC, cut to the size of the gallery.
        max_memory: bytes that the tensors of a block of queries may take.
        progress: show a progress bar on a terminal.

    Raises:
        TypeError: distances that are no float tensor, pids or camids that are no integers.
        ValueError: unlike shapes, `max_rank` or `max_memory` below 1, or no query with a match.

    Example:
        >>> distmat, camids = torch.tensor([[0.0, 0.1, 0.2]]), np.array([1, 1, 2])
        >>> found = evaluate_rank(distmat, np.array([7]), np.array([7, 8, 7]), camids[:1], camids)
        >>> found.cmc.tolist(), found.mean_ap, found.mean_inp
        ([0.0, 1.0, 1.0], 0.5, 0.5)
    """
    _check_float("distmat", distmat)
    if distmat.ndim != 2:
        raise ValueError(f"distmat must be (queries, galleries), got {tuple(distmat.shape)}")
    for name, value in (("max_rank", max_rank), ("max_memory", max_memory)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    distmat, (queries, galleries) = distmat.detach(), distmat.shape
    q_pids, q_camids = _ids("q_pids", q_pids, queries), _ids("q_camids", q_camids, queries)
    g_pids, g_camids = _ids("g_pids", g_pids, galleries), _ids("g_camids", g_camids, galleries)

    by_pid = g_pids.argsort(kind="stable")
    start = np.searchsorted(g_pids, q_pids, "left", by_pid)
    end = np.searchsorted(g_pids, q_pids, "right", by_pid)
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
            match = present & (g_camids[same] != q_camids[rows, None])
            positions, unsure = _positions(distmat[rows], same, present, match)
            numbers = match.sum(1)
            for row in unsure.nonzero()[0]:
                query = top + row
                junk = (g_pids == q_pids[query]) & (g_camids == q_camids[query])
                place = _sorted_positions(distmat[query], g_pids == q_pids[query], junk)
                positions[row, : len(place)] = place
            valid = numbers.nonzero()[0]
            numbers, positions = numbers[valid], positions[valid]
            precision = np.where(slots < numbers[:, None], (slots + 1) / positions, 0)
            ap[top + valid] = precision.sum(1) / numbers
            inp[top + valid] = precision[np.arange(len(valid)), numbers - 1]
            first_match[top + valid] = positions[:, 0] - 1
            bar.update(len(at))

    found = first_match[first_match >= 0]
    if not len(found):
        raise ValueError(
            f"none of the {queries} queries has a match: expected a gallery entry of its pid from "
            "another camera"
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


def ranked_lists(
    feature_distmat: Float[Tensor, "queries galleries"],
    fused_distmat: Float[Tensor, "queries galleries"],
    q_pids: Integer[np.ndarray, "queries"] | Integer[Tensor, "queries"],
    g_pids: Integer[np.ndarray, "galleries"] | Integer[Tensor, "galleries"],
    q_camids: Integer[np.ndarray, "queries"] | Integer[Tensor, "queries"],
    g_camids: Integer[np.ndarray, "galleries"] | Integer[Tensor, "galleries"],
    *,
    topk: int = 10,
) -> RankedLists:
    """Returns each query's nearest entries, where features alone put them, and the truth.

    Entries at one distance come in the order of ``np.argsort``, as in torchreid.

    Args:
        feature_distmat: distances of the features alone.
        fused_distmat: distances of features and attention, of the same pairs.
        q_pids: identities of the queries.
        g_pids: identities of the gallery.
        q_camids: cameras of the queries.
        g_camids: cameras of the gallery.
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
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    _check_float("feature_distmat", feature_distmat)
    ap = evaluate_rank(fused_distmat, q_pids, g_pids, q_camids, g_camids).ap
    if feature_distmat.shape != fused_distmat.shape:
        raise ValueError(
            "expected two matrices of one shape, got "
            f"{tuple(feature_distmat.shape)} and {tuple(fused_distmat.shape)}"
        )
    queries, galleries = fused_distmat.shape
    q_pids, q_camids = _ids("q_pids", q_pids, queries), _ids("q_camids", q_camids, queries)
    g_pids, g_camids = _ids("g_pids", g_pids, galleries), _ids("g_camids", g_camids, galleries)
    topk = min(topk, galleries)
    nearest, feature_ranks = np.full((queries, topk), -1), np.zeros((queries, topk), np.int64)
    right = np.zeros((queries, topk), bool)
    truth, (truth_rank, truth_feature_rank) = np.full(queries, -1), np.zeros((2, queries), np.int64)
    for query in range(queries):
        same = g_pids == q_pids[query]
        junk = same & (g_camids == q_camids[query])
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


def verification_auc(
    scores: Float[Tensor, "queries galleries"], same: Bool[Tensor, "queries galleries"]
) -> float:
    """Returns the ROC AUC of pair scores: 1 = all positives score higher, 0.5 = chance.

    It is NaN where positives or negatives are missing. Ties count half.

    Example:
        >>> verification_auc(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[True, False, False]]))
        1.0
    """
    positives, negatives = scores[same], _sorted(scores[~same])
    if not len(positives) or not len(negatives):
        return float("nan")
    below = int(torch.searchsorted(negatives, positives).sum())
    not_above = int(torch.searchsorted(negatives, positives, right=True).sum())
    return (below + not_above) / 2 / len(positives) / len(negatives)


@dataclass(frozen=True)
class AttentionQuality:
    """How well each attention map covers the person, as :func:`attention_quality` finds it.

    All are in [0, 1], one value an image, NaN where the map is blank or no person is seen;
    ``nanmean()`` averages the others.

    Attributes:
        energy: share of the map's sum that lies on the person.
        iou: intersection over union of the person and what the map attends.
        pointing: 1 where the map's peak lies on the person, 0 elsewhere (the pointing game).
        coverage: share of the body's rows that the map attends.
    """

    energy: Float[Tensor, " images"]
    iou: Float[Tensor, " images"]
    pointing: Float[Tensor, " images"]
    coverage: Float[Tensor, " images"]


def attention_quality(
    maps: Float[Tensor, "images height width"],
    masks: Float[Tensor, "images rows columns"] | Bool[Tensor, "images rows columns"],
    *,
    threshold: float = 0.5,
    row_threshold: float = 0.2,
) -> AttentionQuality:
    """Returns how well attention maps cover the people that the masks show.

    Maps are resized to the masks (bilinear, half-pixel centres) and scaled to [0, 1] by their
    own maximum. The peak is the centre of the highest cell before that, the first of equal ones.

    Args:
        maps: attention maps >= 0 of any resolution.
        masks: 1 or True where the person is seen, 0 or False elsewhere. What lies between counts
            in `energy` as a share of the pixel, elsewhere as the person from 0.5 on.
        threshold: share of the map's maximum above which a pixel is attended, for `iou`.
        row_threshold: t, the share of the map's maximum above which a row's largest value must
            lie for the row to be attended, for `coverage`.

    Raises:
        ValueError: unlike numbers of maps and masks, maps or masks without a cell, values that are
            negative or not finite, masks above 1, or thresholds outside [0, 1).

    Example:
        >>> maps = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
        >>> person = torch.tensor([[[True, False], [True, False], [True, False]]])
        >>> quality = attention_quality(maps, person, threshold=0.4)
        >>> quality.energy.item(), quality.iou.item(), quality.pointing.item()
        (0.5, 0.5, 0.0)
        >>> quality.coverage.item()
        1.0
    """
    for name, value in (("threshold", threshold), ("row_threshold", row_threshold)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if maps.ndim != 3 or masks.ndim != 3 or len(maps) != len(masks):
        raise ValueError(
            "expected maps of shape (N, H, W) and masks of shape (N, rows, columns), got "
            f"{tuple(maps.shape)} and {tuple(masks.shape)}"
        )
    maps = maps.detach()
    masks = masks.to(maps.device, torch.promote_types(maps.dtype, torch.float32))
    for name, values, most in (("maps", maps, float("inf")), ("masks", masks, 1.0)):
        if len(values) and not values.numel():
            raise ValueError(f"{name} must have at least one cell, got {tuple(values.shape)}")
        if not bool(((values >= 0) & (values <= most) & values.isfinite()).all()):
            limits = "finite and >= 0" if most > 1 else "in [0, 1]"
            raise ValueError(f"{name} must be {limits}")
    height, width = maps.shape[1:]
    rows, columns = masks.shape[1:]
    maps = maps.to(masks.dtype)
    peak = maps.flatten(1).argmax(1)
    row, column = peak // width, peak % width
    row, column = (2 * row + 1) * rows // (2 * height), (2 * column + 1) * columns // (2 * width)
    resized = F.interpolate(
        maps[:, None], size=(rows, columns), mode="bilinear", align_corners=False
    )
    maps, person = scale_maps(resized[:, 0]), masks >= 0.5
    attended, body = maps > threshold, person.any(2)
    shares = (
        (maps * masks).sum((1, 2)) / maps.sum((1, 2)),
        (attended & person).sum((1, 2)) / (attended | person).sum((1, 2)),
        person[torch.arange(len(maps), device=maps.device), row, column].to(masks.dtype),
        ((maps.amax(2) > row_threshold) & body).sum(1) / body.sum(1),
    )
    blank = (maps.amax((1, 2)) <= 0) | ~body.any(1)
    return AttentionQuality(
        *(share.to(masks.dtype).masked_fill(blank, torch.nan) for share in shares)
    )


@dataclass(frozen=True)
class AttentionConsistency:
    """How alike attention is on images of one person, as :func:`attention_consistency` finds it.

    Attributes:
        same: mean distance of pairs of one identity.
        different: mean distance of pairs of two identities.
        auc: ROC AUC of telling them apart by the distance; 0.5 = chance.
    """

    same: float
    different: float
    auc: float


def attention_consistency(
    distances: Float[Tensor, "*pairs"], same: Bool[Tensor, "*pairs"]
) -> AttentionConsistency:
    """Returns how far aligned profiles of same and of different identities lie apart.

    Args:
        distances: of pairs of any shape, e.g. of :func:`casn_plugin.attention_distmat` or
            :func:`casn_plugin.attention.attention_distance`.
        same: whether each pair shows one identity.

    Returns:
        NaN where pairs of the one kind or the other are missing.

    Raises:
        ValueError: unlike shapes, or distances that are negative or NaN.

    Example:
        >>> attention_consistency(torch.tensor([0.5, 2.0, 1.0]), torch.tensor([True, False, False]))
        AttentionConsistency(same=0.5, different=1.5, auc=1.0)
    """
    if distances.shape != same.shape:
        raise ValueError(
            f"expected as many distances as pairs, got {tuple(distances.shape)} and "
            f"{tuple(same.shape)}"
        )
    distances = distances.detach()
    if not bool((distances >= 0).all()):
        raise ValueError("distances must be >= 0 and not NaN")
    return AttentionConsistency(
        same=distances[same].double().mean().item(),
        different=distances[~same].double().mean().item(),
        auc=verification_auc(-distances.reshape(1, -1), same.reshape(1, -1)),
    )


def _sorted(values: Tensor) -> Tensor:
    """Returns values sorted along the last dimension, NaN last."""
    if values.is_cuda:
        return values.sort().values
    return torch.from_numpy(np.sort(values))  # several times faster than PyTorch on the CPU


def _check_float(name: str, distmat: Tensor) -> None:
    """Raises TypeError unless distances are a float tensor."""
    if not isinstance(distmat, Tensor) or not distmat.is_floating_point():
        got = distmat.dtype if isinstance(distmat, Tensor) else type(distmat).__name__
        raise TypeError(f"{name} must be a float tensor, got {got}")


def _ids(name: str, ids: np.ndarray | Tensor, length: int) -> Int64[np.ndarray, "images"]:
    """Returns pids or camids as an array of int64, or raises TypeError or ValueError."""
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.shape != (length,):
        raise ValueError(
            f"{name} must be of shape ({length},) to fit distmat, got shape {array.shape}"
        )
    return array.astype(np.int64)


def _positions(
    distmat: Float[Tensor, "queries galleries"],
    same: Int64[np.ndarray, "queries slots"],
    present: Bool[np.ndarray, "queries slots"],
    match: Bool[np.ndarray, "queries slots"],
) -> tuple[Int64[np.ndarray, "queries slots"], Bool[np.ndarray, "queries"]]:
    """Returns the positions of each query's matches, from 1, and for which queries to sort instead.

    Those are the queries with a match that ties with a non-match, or is infinite or NaN.

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
    near = near.where(real & (near < torch.inf), torch.inf)  # NaN becomes inf too
    matches = near.where(matching, torch.inf)
    unsure = (matching & (matches == torch.inf)).any(1)
    near, matches = near.sort(1).values, matches.sort(1).values

    ordered = _sorted(distmat)
    ordered = ordered.where(~ordered.isnan(), torch.inf)
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
