"""Where gallery entries stand in the ranking of a query, found by counting: nothing is ordered.

A match's position is 1 + the number of entries nearer than it that are no junk, which is found by
its value alone, in sorted distances. Where entries tie, the order is that of ``np.argsort``, as in
torchreid, and only then that row is ordered.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from casn_plugin.identities import UNKNOWN, Ids, as_ids


class Entries(NamedTuple):
    """The gallery entries of the pid of each of some queries, padded.

    Attributes:
        same: which they are.
        present: which of them are no padding.
        match: which are no junk either.
    """

    same: Int64[np.ndarray, "queries slots"]
    present: Bool[np.ndarray, "queries slots"]
    match: Bool[np.ndarray, "queries slots"]

    @property
    def junk(self) -> Bool[np.ndarray, "queries slots"]:
        """Which are left out of the ranking."""
        found: np.ndarray = self.present & ~self.match
        return found

    def junk_among(self, row: int, number: int) -> Bool[np.ndarray, " counted"]:
        """Returns which of so many entries are left out of one query's ranking."""
        junk = np.zeros(number, dtype=bool)
        junk[self.same[row, self.junk[row]]] = True
        return junk


class Counted:
    """Which gallery entries count, and as what, for each query.

    Args:
        shape: number of queries and of gallery entries.
        q_pids: identities of the queries.
        g_pids: identities of the gallery.
        q_camids: cameras of the queries.
        g_camids: cameras of the gallery.
        cross_camera: entries of the query's own camera are no matches.
        junk_pids: entries of these identities count for no query.

    Attributes:
        columns: gallery rows of the entries that count, by which all else numbers them.
        g_pids: their identities.

    Raises:
        TypeError, ValueError: as :func:`as_ids`.

    Example:
        >>> counted = Counted((1, 3), [7], [7, 8, 7], [1], [1, 1, 2], True, ())
        >>> counted.entries(slice(0, 1)).match
        array([[False,  True]])
    """

    def __init__(
        self,
        shape: tuple[int, int],
        q_pids: Ids,
        g_pids: Ids,
        q_camids: Ids | None,
        g_camids: Ids | None,
        cross_camera: bool,
        junk_pids: Sequence[int],
    ) -> None:
        self.queries, galleries = shape
        self.q_pids = as_ids("q_pids", q_pids, self.queries)
        own = as_ids("q_camids", q_camids, self.queries)
        g_pids = as_ids("g_pids", g_pids, galleries)
        g_camids = as_ids("g_camids", g_camids, galleries)
        self.columns = np.flatnonzero(~np.isin(g_pids, as_ids("junk_pids", junk_pids)))
        self.g_pids, self._g_camids = g_pids[self.columns], g_camids[self.columns]
        self._all = len(self.columns) == galleries
        # a query's own camera is one that no gallery entry has, where cameras do not matter
        own = own if cross_camera else np.full_like(own, UNKNOWN)
        self._own = np.where(own == UNKNOWN, UNKNOWN - 1, own)
        self._by_pid = self.g_pids.argsort(kind="stable")
        self._start = np.searchsorted(self.g_pids, self.q_pids, "left", self._by_pid)
        end = np.searchsorted(self.g_pids, self.q_pids, "right", self._by_pid)
        self._end = np.where(self.q_pids == UNKNOWN, self._start, end)
        self._slots = np.arange(max(1, (self._end - self._start).max(initial=0)))

    def __len__(self) -> int:
        """Returns the number of gallery entries that count."""
        return len(self.columns)

    def blocks(self, max_memory: int) -> list[slice]:
        """Returns the queries in blocks whose tensors take so many bytes; none without entries."""
        size = max(1, max_memory // max(1, 24 * len(self) + 200 * len(self._slots)))
        stop = self.queries if len(self) else 0
        return [slice(top, min(top + size, stop)) for top in range(0, stop, size)]

    def distances(
        self, distmat: Float[Tensor, "queries galleries"], rows: slice
    ) -> Float[Tensor, "some counted"]:
        """Returns the distances of some of the queries to the entries that count."""
        if self._all:
            return distmat[rows]
        return distmat[rows].index_select(1, torch.from_numpy(self.columns).to(distmat.device))

    def entries(self, rows: slice) -> Entries:
        """Returns the entries of the pids of some of the queries."""
        at = self._start[rows, None] + self._slots
        present = at < self._end[rows, None]
        same = self._by_pid[np.where(present, at, 0)]
        return Entries(same, present, present & (self._g_camids[same] != self._own[rows, None]))


class Found(NamedTuple):
    """Where the matches of some queries stand.

    Attributes:
        positions: from 1, ascending; of a query with fewer matches, followed by anything.
        unsure: queries with a match that ties with another entry, or is infinite: to be ordered.
        ordered: all distances, sorted.
    """

    positions: Int64[np.ndarray, "queries slots"]
    unsure: Bool[np.ndarray, "queries"]
    ordered: Float[Tensor, "queries counted"]


def positions(distmat: Float[Tensor, "queries counted"], entries: Entries) -> Found:
    """Returns where the matches of some queries stand.

    Args:
        distmat: their distances to the entries that count.
        entries: which of them are of their pid.

    Example:
        >>> counted = Counted((1, 3), [7], [7, 8, 7], [1], [1, 1, 2], True, ())
        >>> positions(torch.tensor([[0.0, 0.1, 0.2]]), counted.entries(slice(0, 1))).positions
        array([[2, 3]])
    """
    device, distmat = distmat.device, comparable(distmat)
    near = distmat.gather(1, torch.from_numpy(entries.same).to(device))
    near = near.where(torch.from_numpy(entries.present).to(device), torch.inf)
    matching = torch.from_numpy(entries.match).to(device)
    matches = near.where(matching, torch.inf)
    unsure = (matching & (matches == torch.inf)).any(1)
    near, matches = near.sort(1).values, matches.sort(1).values

    ordered = in_order(distmat)
    below, upto = counts(ordered, matches)
    same_below, same_upto = counts(near, matches)

    tied = (upto - below != same_upto - same_below) & (matches < torch.inf)
    place = below - same_below + torch.arange(1, near.shape[1] + 1, device=device)
    return Found(place.cpu().numpy(), (unsure | tied.any(1)).cpu().numpy(), ordered)


def comparable(distmat: Float[Tensor, "queries counted"]) -> Tensor:
    """Returns distances that can be searched: contiguous, of 32 bits or more.

    Example:
        >>> comparable(torch.rand(1, 2).half()).dtype
        torch.float32
    """
    return (distmat if distmat.element_size() >= 4 else distmat.float()).contiguous()


def counts(
    ordered: Float[Tensor, "queries counted"], values: Float[Tensor, "queries some"]
) -> tuple[Int64[Tensor, "queries some"], Int64[Tensor, "queries some"]]:
    """Returns how many sorted values of a row are less than others, and how many at most these.

    Example:
        >>> counts(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([[2.0]]))
        (tensor([[1]]), tensor([[3]]))
    """
    below = torch.searchsorted(ordered, values)
    return below, torch.searchsorted(ordered, values, right=True)


def in_order(values: Tensor) -> Tensor:
    """Returns values sorted along the last dimension.

    Example:
        >>> in_order(torch.tensor([2.0, 1.0]))
        tensor([1., 2.])
    """
    if values.is_cuda:
        return values.sort().values
    if values.dtype == torch.bfloat16:  # unknown to NumPy; float32 holds every value of it
        return in_order(values.float()).to(values.dtype)
    return torch.from_numpy(np.sort(values))  # several times faster than PyTorch on the CPU


def order_of(
    distances: Float[Tensor, "counted"], junk: Bool[np.ndarray, "counted"]
) -> Int64[np.ndarray, "kept"]:
    """Returns one query's entries without junk, nearest first, as torchreid orders them.

    Example:
        >>> order_of(torch.tensor([0.2, 0.0, 0.1]), np.array([False, True, False]))
        array([2, 0])
    """
    known = distances.dtype in (torch.float16, torch.float32, torch.float64)
    row = (distances if known else distances.float()).detach().cpu().contiguous()
    order = np.argsort(row.numpy())
    kept: np.ndarray = order[~junk[order]]
    return kept


def in_places(
    distmat: Float[Tensor, "queries counted"], entries: Entries, found: Found
) -> Int64[np.ndarray, "queries slots"]:
    """Returns where matches stand; where that is not sure, by ordering the row.

    Args:
        distmat: as for :func:`positions`.
        entries: likewise.
        found: what it has found.

    Example:
        >>> counted = Counted((1, 3), [7], [7, 8, 7], None, None, True, ())
        >>> distmat, entries = torch.tensor([[0.0, 0.0, 0.2]]), counted.entries(slice(0, 1))
        >>> in_places(distmat, entries, positions(distmat, entries))
        array([[1, 3]])
    """
    place = found.positions.copy()
    for row in np.flatnonzero(found.unsure).tolist():
        match = np.zeros(distmat.shape[1], dtype=bool)
        match[entries.same[row, entries.match[row]]] = True
        order = order_of(distmat[row], entries.junk_among(row, match.size))
        here = np.flatnonzero(match[order]) + 1
        place[row, : len(here)] = here
    return place
