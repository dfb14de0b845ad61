"""What re-ranking knows of images: each one's nearest, and distances, of matrices or of lists."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from scipy import sparse
from torch import Tensor

from casn_plugin.doors import check_count, check_lengths, check_tensor

BLOCK = 2**20
"""Distances, or entries of an index, that are worked on at a time."""

Sparse = Any
"""A ``scipy.sparse.csr_array``: SciPy's own types say nothing of their contents."""


@dataclass(frozen=True)
class Neighbourhood:
    """What re-ranking needs to know of N images, the queries before the gallery.

    Distances here are the *normalised* ones: squared, over the greatest square of the row.

    Attributes:
        queries: how many of the images are queries.
        nearest: each image's nearest, itself among them, nearest first; -1 where there are no more.
        of_pairs: gives the distances of listed pairs: rows, and as many columns.
        of_queries: gives the distances of some queries to the whole gallery.
    """

    queries: int
    nearest: Int64[np.ndarray, "images nearest"]
    of_pairs: Callable[[np.ndarray, np.ndarray], np.ndarray]
    of_queries: Callable[[slice], np.ndarray]


def membership(nearest: np.ndarray, values: np.ndarray | None = None) -> Sparse:
    """Returns which images each row lists: a matrix of 0 and 1, or of values of what is listed.

    Example:
        >>> membership(np.array([[0, 1], [1, -1]])).toarray()
        array([[1., 1.],
               [0., 1.]], dtype=float32)
    """
    there = nearest >= 0
    columns, indptr = nearest[there], np.concatenate([[0], there.sum(1).cumsum()])
    data = np.ones(len(columns), np.float32) if values is None else values[there]
    return sparse.csr_array((data, columns, indptr), shape=(len(nearest),) * 2)


def of_matrices(
    query_gallery: Any, query_query: Any, gallery_gallery: Any, number: int
) -> Neighbourhood:
    """Returns what three matrices of distances tell, tensors or NumPy arrays.

    Args:
        query_gallery: distances of queries and gallery.
        query_query: distances among the queries, symmetric.
        gallery_gallery: distances among the gallery, symmetric.
        number: nearest of each image, itself among them, in the order of ``np.argsort``.

    Raises:
        TypeError: distances that are no floats.
        ValueError: as :func:`casn_plugin.rerank`.

    Example:
        >>> of_matrices(torch.tensor([[3.0]]), torch.zeros(1, 1), torch.zeros(1, 1), 2).nearest
        array([[0, 1],
               [1, 0]])
    """
    matrices = _Matrices(
        _matrix("query_gallery", query_gallery),
        _matrix("query_query", query_query),
        _matrix("gallery_gallery", gallery_gallery),
    )
    nearest = matrices.look(number)
    return Neighbourhood(matrices.queries, nearest, matrices.of_pairs, matrices.of_queries)


def of_lists(
    indices: Any, distances: Any, queries: int, number: int, greatest: Any = None
) -> Neighbourhood:
    """Returns what lists of each image's nearest tell, tensors or NumPy arrays.

    What is in neither of the two lists of a pair counts as the greatest distance of its row.

    Args:
        indices: rows of the images that each lists, -1 where there are no more.
        distances: of these, ascending.
        queries: how many of the images are queries.
        number: nearest of each image to look at, itself among them.
        greatest: each image's greatest distance; None: the greatest of its list.

    Raises:
        TypeError: indices that are no integers, distances that are no floats.
        ValueError: as :func:`casn_plugin.rerank_neighbours`.

    Example:
        >>> of_lists(np.array([[1], [0]]), np.array([[3.0], [3.0]]), 1, 2).nearest
        array([[0, 1],
               [1, 0]])
    """
    found, near, most = _checked_lists(indices, distances, queries, greatest)
    # the image itself first, then the others in their order
    own = np.arange(len(found))[:, None]
    listed = np.concatenate([own, np.where(found == own, -1, found)], axis=1)
    order = (listed < 0).argsort(axis=1, kind="stable")
    nearest = np.take_along_axis(listed, order, 1)
    squares = np.take_along_axis(np.concatenate([0.0 * own, near**2], axis=1), order, 1)
    limit = float(most.max()) ** 2 or 1.0
    likeness = membership(nearest, limit - squares)  # 0, as where nothing is listed, is the least
    likeness = likeness.maximum(likeness.T).tocsr()  # either list may know a distance
    scale = np.where(most > 0, most, 1.0) ** 2

    def of_pairs(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        known = np.asarray(likeness[rows, columns]).ravel()
        return np.asarray(np.minimum((limit - known) / scale[rows], 1))

    def of_queries(rows: slice) -> np.ndarray:
        known = likeness[rows][:, queries:].toarray()
        return np.asarray(np.minimum((limit - known) / scale[rows, None], 1), np.float32)

    return Neighbourhood(queries, nearest[:, :number], of_pairs, of_queries)


def normalised(distances: Tensor, greatest: Tensor) -> Tensor:
    """Returns squared distances over the greatest square of the row; all 0 stay 0.

    Args:
        distances: of any shape.
        greatest: squares, of a shape that goes with it.

    Example:
        >>> normalised(torch.tensor([0.0, 1.0, 2.0]), torch.tensor(4.0))
        tensor([0.0000, 0.2500, 1.0000])
    """
    # in torchreid's order, so that the same distances tie
    return distances.square().float() / greatest.where(greatest > 0, 1.0)


class _Matrices:
    """The distances of all images, in torchreid's three matrices; read by rows."""

    def __init__(self, *parts: Tensor) -> None:
        query_gallery, query_query, gallery_gallery = parts
        self.queries, galleries = query_gallery.shape
        for name, square, size in (
            ("query_query", query_query, self.queries),
            ("gallery_gallery", gallery_gallery, galleries),
        ):
            if square.shape != (size, size):
                raise ValueError(
                    f"{name} must be of shape ({size}, {size}), as query_gallery is of "
                    f"{tuple(query_gallery.shape)}, got {tuple(square.shape)}"
                )
            few = square[:64]  # a sample: a look at all costs as much as the re-ranking
            if float((few - square[:, :64].T).abs().max()) > 1e-3 * float(few.abs().max()):
                raise ValueError(f"{name} must be symmetric, and is not")
        wide = any(part.dtype == torch.float64 for part in parts)
        dtype = torch.float64 if wide else torch.float32
        self._query_gallery, self._query_query, self._gallery_gallery = (
            part.to(dtype) for part in parts
        )
        self._greatest = torch.empty(0)

    def look(self, number: int) -> Int64[np.ndarray, "images nearest"]:
        """Returns each image's nearest; finds the greatest distances, by which to normalise."""
        images = sum(self._query_gallery.shape)
        number = min(number, images)
        found, greatest = np.empty((images, number), np.int64), []
        step = max(1, BLOCK // images)
        starts = [*range(0, self.queries, step), *range(self.queries, images, step)]
        for start, stop in zip(starts, [*starts[1:], images], strict=True):
            parts = self._rows(slice(start, stop))
            near, every = self._least(parts, number + 1)  # one more tells if the last one ties
            if float(near.amin()) < 0:  # by rounding, as of cosines: their squares count
                parts = parts[0].abs(), parts[1].abs()
                near, every = self._least(parts, number + 1)
            greatest.append(torch.maximum(*(part.amax(1) for part in parts)).square().float())
            if not bool(greatest[-1].isfinite().all()):
                raise ValueError("distances must be finite, but some are NaN or infinite")
            near, order = near.sort(dim=1, stable=True)
            near = normalised(near[:, : number + 1], greatest[-1][:, None])
            columns = every.gather(1, order)[:, :number].numpy()
            for row in (near[:, 1:] == near[:, :-1]).any(1).nonzero()[:, 0].tolist():
                whole = torch.cat([part[row] for part in parts])
                columns[row] = np.argsort(normalised(whole, greatest[-1][row]).numpy())[:number]
            found[start:stop] = columns
        self._greatest = torch.cat(greatest)
        return found

    def of_pairs(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Returns the normalised distances of listed pairs."""
        i, j, first = torch.from_numpy(rows), torch.from_numpy(columns).long(), self.queries
        found = torch.empty(len(rows), dtype=self._query_gallery.dtype)
        for of_query, to_query in ((True, True), (True, False), (False, True), (False, False)):
            some = ((i < first) == of_query) & ((j < first) == to_query)
            one, two = i[some] - first * (not of_query), j[some] - first * (not to_query)
            if of_query == to_query:
                found[some] = (self._query_query if of_query else self._gallery_gallery)[one, two]
            else:
                found[some] = self._query_gallery[(one, two) if of_query else (two, one)]
        return normalised(found, self._greatest[i]).numpy()

    def of_queries(self, rows: slice) -> np.ndarray:
        """Returns the normalised distances of some queries to the whole gallery."""
        return normalised(self._query_gallery[rows], self._greatest[rows, None]).numpy()

    def _rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Returns the distances of some images to the queries, and to the gallery."""
        if rows.stop <= self.queries:
            return self._query_query[rows], self._query_gallery[rows]
        rows = slice(rows.start - self.queries, rows.stop - self.queries)
        return self._query_gallery[:, rows].T.contiguous(), self._gallery_gallery[rows]

    def _least(self, parts: tuple[Tensor, Tensor], number: int) -> tuple[Tensor, Tensor]:
        """Returns the least distances of each part, and to which images they are."""
        values, columns = zip(
            *(part.topk(min(number, part.shape[1]), 1, largest=False) for part in parts),
            strict=True,
        )
        return torch.cat(values, 1), torch.cat([columns[0], columns[1] + self.queries], 1)


def _tensor(value: Any) -> Any:
    """Returns an array as a tensor on the CPU, without a graph, and anything else as it is."""
    value = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _matrix(name: str, value: Any) -> Tensor:
    """Returns the distances of some images, at least one."""
    matrix = check_tensor(name, _tensor(value), "rows columns")
    return matrix if matrix.itemsize >= 4 else matrix.float()


def _checked_lists(
    indices: Any, distances: Any, queries: int, greatest: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns indices, distances (0 where there is none) and the greatest distance of each row."""
    rows = check_tensor("indices", _tensor(indices), "images columns", floating=False)
    values = check_tensor("distances", _tensor(distances), "images columns")
    if rows.shape != values.shape:
        raise ValueError(
            "indices and distances must be of one shape, got "
            f"{tuple(rows.shape)} and {tuple(values.shape)}"
        )
    if not 1 <= check_count("queries", queries) < len(rows):
        raise ValueError(f"expected queries and a gallery, got {queries} of {len(rows)} images")
    found, near = np.asarray(rows.long()), np.asarray(values.double())
    there = found >= 0
    if found.min() < -1 or found.max() >= len(found):
        raise ValueError(
            f"indices must lie in [-1, {len(found)}), got {found.min()} to {found.max()}"
        )
    if (there[:, 1:] & ~there[:, :-1]).any():
        raise ValueError("indices must have -1 at the end of rows only")
    ordered = np.sort(found, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("indices must list an image once a row, and some are there twice")
    if not np.isfinite(near[there]).all() or (near[there] < 0).any():
        raise ValueError("distances must be >= 0 and finite where something is listed")
    if (np.diff(near, axis=1)[there[:, 1:]] < 0).any():
        raise ValueError("distances must ascend along each row")
    near = np.where(there, near, 0.0)
    most: np.ndarray = near.max(1)
    if greatest is not None:
        given = check_tensor("greatest", _tensor(greatest), "images").double().numpy()
        check_lengths(indices=found, greatest=given)
        if not np.isfinite(given).all() or (given < most * (1 - 1e-6)).any():
            raise ValueError("greatest must be finite, and no less than a listed distance")
        most = np.maximum(given, most)
    return found, near, most
