"""k-reciprocal re-ranking on sparse neighbours (Zhong et al., CVPR 2017): memory grows as N.

Every image is encoded by its k-reciprocal neighbours, those that have it among their own nearest:
a sparse row. Two images are near where their rows overlap, which an inverted index finds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from scipy import sparse
from torch import Tensor

from casn_plugin.doors import check_count, check_fraction
from casn_plugin.ranking.neighbourhoods import (
    BLOCK,
    Neighbourhood,
    Sparse,
    membership,
    of_lists,
    of_matrices,
)


@dataclass(frozen=True)
class Reciprocity:
    """The parameters of k-reciprocal re-ranking, as its authors name them where they do.

    Attributes:
        k1: nearest images of which those that are reciprocal encode an image.
        k2: nearest images over which these encodings are averaged; 1: none but its own.
        original_weight: λ, the share of the original distance in the final one, in [0, 1].

    Raises:
        TypeError: numbers of another kind.
        ValueError: k1 or k2 below 1, a weight outside [0, 1].

    Example:
        >>> Reciprocity(k1=10).original_weight
        0.3
    """

    k1: int = 20
    k2: int = 6
    original_weight: float = 0.3

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what can't be."""
        check_count("k1", self.k1)
        check_count("k2", self.k2)
        check_fraction("original_weight", self.original_weight)

    @property
    def needed(self) -> int:
        """How many nearest of each image have to be known, itself among them."""
        return max(self.k1 + 1, self.k2)


@dataclass(frozen=True)
class Reranked:
    """The nearest gallery images of each query after re-ranking, nearest first.

    Attributes:
        indices: rows of the gallery, -1 where nothing is known of any other.
        distances: final distances in [0, 1], ascending along each row, infinite there.
    """

    indices: Int64[Tensor, "queries topk"]
    distances: Float32[Tensor, "queries topk"]


def rerank(
    query_gallery: Float[Tensor, "queries galleries"] | Float[np.ndarray, "queries galleries"],
    query_query: Float[Tensor, "queries queries"] | Float[np.ndarray, "queries queries"],
    gallery_gallery: Float[Tensor, "galleries galleries"]
    | Float[np.ndarray, "galleries galleries"],
    parameters: Reciprocity | None = None,
) -> Float32[Tensor, "queries galleries"]:
    """Returns the final distances of k-reciprocal re-ranking, equal to torchreid's up to rounding.

    d* = (1 − λ) d_Jaccard + λ d, with d the squared distance over the greatest square of the
    query's. Beside the matrices that are given, memory grows as the number of images.

    Args:
        query_gallery: distances of queries and gallery, tensors or NumPy arrays.
        query_query: distances among the queries, symmetric.
        gallery_gallery: distances among the gallery, symmetric.
        parameters: k1, k2 and λ.

    Returns:
        Distances in [0, 1], on the CPU; a query whose distances are all 0 keeps them.

    Raises:
        TypeError: distances that are no floats.
        ValueError: shapes that do not go together, no image, NaN or infinity, or matrices that
            are not symmetric where they have to be.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> rerank(torch.cdist(x[:1], x[1:]), torch.zeros(1, 1), torch.cdist(x[1:], x[1:])).argmin()
        tensor(0)
    """
    parameters = Reciprocity() if parameters is None else parameters
    images = of_matrices(query_gallery, query_query, gallery_gallery, parameters.needed)
    return rerank_neighbourhood(images, parameters)


# lists of neighbours, what is known of them, and what is wanted
def rerank_neighbours(
    indices: Int[Tensor, "images nearest"] | Int[np.ndarray, "images nearest"],
    distances: Float[Tensor, "images nearest"] | Float[np.ndarray, "images nearest"],
    queries: int,
    *,
    parameters: Reciprocity | None = None,
    greatest: Float[Tensor, " images"] | None = None,
    topk: int | None = None,
) -> Reranked:
    """Returns the nearest of each query after re-ranking lists of neighbours: no matrix is needed.

    Rows are the images, the first `queries` of them the queries, the others the gallery; each lists
    its nearest among *all* images, as a search of all images for all images finds them (FAISS).
    Whether an image lists itself does not matter. Exact where the lists hold all images; else
    a distance that is in neither of its two lists counts as the greatest of its row, and the
    greatest, by which distances are normalised, is that of the list where `greatest` does not say.

    Args:
        indices: rows of the images that each lists; -1 where there are no more.
        distances: of these, ascending along each row, >= 0; of -1 they are not looked at.
        queries: how many of the images are queries.
        parameters: k1, k2 and λ. Lists longer than k1 + 1 make unlisted distances rarer.
        greatest: each image's greatest distance to any other.
        topk: gallery images to return for each query; by default as many as are listed.

    Raises:
        TypeError: indices that are no integers, distances that are no floats.
        ValueError: unlike shapes, no queries or no gallery, rows that do not exist or are listed
            twice, distances that are negative, NaN, infinite or not ascending, `greatest` that is
            less than a listed distance, topk below 1.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> near = torch.cdist(x, x).sort(1)
        >>> rerank_neighbours(near.indices, near.values, queries=1, topk=2).indices
        tensor([[0, 1]])
    """
    parameters = Reciprocity() if parameters is None else parameters
    images = of_lists(indices, distances, queries, parameters.needed, greatest)
    topk = check_count("topk", indices.shape[1] if topk is None else topk)
    topk = min(topk, len(images.nearest) - queries)
    found = torch.full((queries, topk), -1)
    final = torch.full((queries, topk), torch.inf)
    for rows, block in _blocks(images, parameters):
        values, columns = torch.from_numpy(block).sort(dim=1, stable=True)
        known = values[:, :topk] < 1  # no overlap, and no distance: nothing is known
        final[rows] = values[:, :topk].where(known, torch.inf)
        found[rows] = columns[:, :topk].where(known, -1)
    return Reranked(found, final)


def rerank_neighbourhood(
    images: Neighbourhood, parameters: Reciprocity
) -> Float32[Tensor, "queries galleries"]:
    """Returns the final distances of all queries and the whole gallery.

    Args:
        images: what is known of the images.
        parameters: k1, k2 and λ.

    Example:
        >>> images = of_lists(np.array([[1], [0]]), np.zeros((2, 1)), queries=1, number=2)
        >>> rerank_neighbourhood(images, Reciprocity())
        tensor([[0.]])
    """
    final = torch.empty(images.queries, len(images.nearest) - images.queries)
    for rows, block in _blocks(images, parameters):
        final[rows] = torch.from_numpy(block)
    return final


# The method: neighbours to sparse rows, sparse rows to distances


def _reciprocal(nearest: np.ndarray) -> Sparse:
    """Returns who is among the nearest of whom, both ways: a symmetric matrix of 0 and 1."""
    forward = membership(nearest)
    return forward.multiply(forward.T).tocsr()


def expansions(nearest: Int64[np.ndarray, "images nearest"], k1: int) -> Sparse:
    """Returns R*(i): the k-reciprocal neighbours, with those of neighbours that they share.

    A neighbour's own, at half of k1, are added where more than two thirds are i's already.

    Args:
        nearest: each image's nearest, itself among them, nearest first; -1: no more.
        k1: how many of them, beside itself.

    Example:
        >>> expansions(np.array([[0, 1, 2], [1, 0, 2], [2, 1, 0]]), k1=1).toarray() > 0
        array([[ True,  True, False],
               [ True,  True, False],
               [False, False,  True]])
    """
    whole = _reciprocal(nearest[:, : k1 + 1])
    half = _reciprocal(nearest[:, : int(np.around(k1 / 2.0)) + 1])
    shared = (whole @ half.T).multiply(whole).tocsr()
    shared.data = (shared.data > 2.0 / 3 * half.sum(1)[shared.indices]).astype(np.float32)
    shared.eliminate_zeros()
    expanded = whole + shared @ half
    expanded.sort_indices()
    return expanded


def _encodings(images: Neighbourhood, parameters: Reciprocity) -> Sparse:
    """Returns V: the weight that each image gives to its expanded k-reciprocal neighbours."""
    encodings = expansions(images.nearest, parameters.k1)
    lengths = np.diff(encodings.indptr)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    weights = np.exp(-images.of_pairs(rows, encodings.indices))
    totals = np.bincount(rows, weights, minlength=len(lengths))
    encodings.data = (weights / totals[rows]).astype(np.float32)
    if parameters.k2 == 1:
        return encodings
    near = membership(images.nearest[:, : parameters.k2])
    near.data /= np.repeat(np.diff(near.indptr), np.diff(near.indptr))
    return (near @ encodings).tocsr()


def _blocks(
    images: Neighbourhood, parameters: Reciprocity
) -> Iterator[tuple[slice, Float32[np.ndarray, "rows galleries"]]]:
    """Yields some queries and their final distances to the whole gallery."""
    encodings, queries = _encodings(images, parameters), images.queries
    inverted, galleries = encodings[queries:].tocsc(), len(images.nearest) - queries
    entries = np.diff(inverted.indptr)[encodings.indices[: encodings.indptr[queries]]]
    work = np.concatenate([[0], entries.cumsum()])[encodings.indptr[: queries + 1]]
    work = work + galleries * np.arange(queries + 1)
    start = 0
    while start < queries:
        stop = max(start + 1, int(np.searchsorted(work, work[start] + BLOCK, "right")) - 1)
        rows = slice(start, stop)
        overlap = _overlaps(encodings[rows], inverted)
        final = overlap  # 1 - overlap / (2 - overlap), in place
        np.subtract(2, overlap, out=final)
        np.divide(2, final, out=final)
        np.subtract(2, final, out=final)
        final *= 1 - parameters.original_weight
        final += parameters.original_weight * images.of_queries(rows)
        yield rows, final
        start = stop


def _overlaps(some: Sparse, inverted: Sparse) -> Float32[np.ndarray, "rows galleries"]:
    """Returns Σ_k min(V_qk, V_gk) of some queries and the gallery.

    Args:
        some: the rows V_q.
        inverted: the rows V_g, by column.
    """
    met = inverted[:, some.indices]
    least = np.minimum(met.data, np.repeat(some.data, np.diff(met.indptr)))
    # a row lists a gallery image once for each k, and these add up
    rows = least, met.indices, met.indptr[some.indptr]
    found: np.ndarray = sparse.csr_array(rows, shape=(some.shape[0], inverted.shape[0])).toarray()
    return found
