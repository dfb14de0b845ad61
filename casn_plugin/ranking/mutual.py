"""Queries and gallery among themselves: who is near whom, for re-ranking, without all pairs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor, nn

from casn_plugin.attention import ROW_THRESHOLD
from casn_plugin.encoding import Ahead, Encoding, Encodings
from casn_plugin.ranking.candidates import compare
from casn_plugin.ranking.fused import FeatureDistances, RankingOptions, l2_distances
from casn_plugin.ranking.neighbourhoods import BLOCK, Neighbourhood, normalised
from casn_plugin.ranking.pairs import Pairs

LISTED = 100
"""So many nearest by features have their attention compared, where no shortlist says how many."""

QUERIES = 2048
"""So many images' maps are in memory as queries at a time."""


class Together:
    """Queries and gallery as one gallery, the queries first. Listed rows of it ascend.

    Args:
        query: the queries.
        gallery: the gallery: an encoding or an index.

    Example:
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> len(Together(images[:1], images[1:])[0:2])
        2
    """

    def __init__(self, query: Encodings, gallery: Encodings) -> None:
        self._parts = query, gallery
        self._queries = len(query)

    def __len__(self) -> int:
        """Returns the number of images."""
        return self._queries + len(self._parts[1])

    def __getitem__(self, rows: slice | Tensor) -> Encoding:
        """Returns the encoding of some of the images."""
        some = [part[own] for part, own in self._of(rows)]
        return Encoding.cat([each.to(some[0].features.dtype) for each in some])

    def features_of(self, rows: slice | Tensor) -> Tensor:
        """Returns their features alone."""
        return torch.cat([part.features_of(own) for part, own in self._of(rows)])

    def expect(self, rows: Tensor) -> None:
        """Says which images will be asked for next, in their order."""
        for part, own in self._of(rows):
            if isinstance(part, Ahead) and isinstance(own, Tensor):
                part.expect(own)

    def _of(self, rows: slice | Tensor) -> Iterator[tuple[Encodings, slice | Tensor]]:
        """Yields the part or parts that rows are of, and which rows of it."""
        first = self._queries
        if isinstance(rows, Tensor):
            queries = int((rows < first).sum())
            if queries or not len(rows):
                yield self._parts[0], rows[:queries]
            if queries < len(rows):
                yield self._parts[1], rows[queries:] - first
            return
        start, stop, _ = rows.indices(len(self))
        if start < first or start == stop:
            yield self._parts[0], slice(start, max(start, min(stop, first)))
        if stop > first:
            yield self._parts[1], slice(max(start, first) - first, stop - first)


def feature_neighbourhood(
    query: Encodings,
    gallery: Encodings,
    distmat: Float[Tensor, "queries galleries"],
    distances: FeatureDistances,
    number: int,
) -> Neighbourhood:
    """Returns what re-ranking needs to know of the distances of features: all of it exact.

    Args:
        query: the queries.
        gallery: the gallery.
        distmat: distances of queries and gallery.
        distances: gives the distances of features, symmetric.
        number: nearest of each image to find.

    Example:
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> distmat = torch.cdist(images[:1].features, images[1:].features)
        >>> feature_neighbourhood(images[:1], images[1:], distmat, torch.cdist, 2).nearest[:, 0]
        array([0, 1, 2])
    """
    features = _features(query, gallery)
    near = _near(features, distances, number)
    greatest = near.greatest.square().float()

    def of_pairs(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        found = _listed(features, distances, rows, columns)
        return normalised(found, greatest[torch.from_numpy(rows)]).numpy()

    def of_queries(rows: slice) -> np.ndarray:
        return normalised(distmat[rows].cpu(), greatest[rows, None]).numpy()

    return Neighbourhood(len(query), near.nearest, of_pairs, of_queries)


# what is compared, by what, and how many of it
def fused_neighbourhood(
    model: nn.Module,
    query: Encodings,
    gallery: Encodings,
    distmat: Float[Tensor, "queries galleries"],
    *,
    number: int,
    row_threshold: float = ROW_THRESHOLD,
    options: RankingOptions | None = None,
    feature_distances: FeatureDistances = l2_distances,
) -> Neighbourhood:
    """Returns what re-ranking needs to know of fused distances of unit-length vectors.

    Each image's attention is compared with its `options.shortlist` nearest by features, by default
    100, and with the image furthest from it by features: its nearest are the nearest of
    these by fused distance, and the furthest is taken for its greatest distance, unless the matrix
    knows a greater one. A distance of two images is the mean of both orders.

    Args:
        model: the CASN whose `pair_classifier` looks at the pairs.
        query: the queries.
        gallery: the gallery.
        distmat: fused distances of queries and gallery.
        number: nearest of each image to find.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        options: how distances become one ranking.
        feature_distances: gives the distances of features, symmetric.

    Example:
        >>> model = nn.Module()
        >>> model.pair_classifier = nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> distmat = torch.rand(1, 2)
        >>> fused_neighbourhood(model, images[:1], images[1:], distmat, number=2).nearest[:, 0]
        array([0, 1, 2])
    """
    options = RankingOptions() if options is None else options
    features = F.normalize(_features(query, gallery), dim=1)
    pairs = _FusedPairs(
        model, Together(query, gallery), features, row_threshold, options, feature_distances
    )
    images = len(features)
    near = _near(features, feature_distances, max(options.shortlist or LISTED, number))
    listed = torch.cat([torch.from_numpy(near.nearest), near.furthest[:, None]], 1)
    rows = torch.arange(images)[:, None].expand_as(listed)
    codes, values = pairs.both_orders(rows.flatten(), listed.flatten())
    order = values.argsort(stable=True)
    order = order[(codes[order] // images).argsort(stable=True)]
    starts = torch.searchsorted(codes, torch.arange(images) * images)
    nearest = codes[order[starts[:, None] + torch.arange(min(number, images))]] % images
    greatest = torch.zeros(images).scatter_reduce(0, codes // images, values.float(), "amax")
    known = torch.cat([distmat.amax(1), distmat.amax(0)]).cpu().float()
    greatest = torch.maximum(greatest, known).square()

    def of_pairs(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        i, j = torch.from_numpy(rows), torch.from_numpy(columns).long()
        codes, values = pairs.both_orders(i, j)
        return normalised(values[torch.searchsorted(codes, i * images + j)], greatest[i]).numpy()

    def of_queries(rows: slice) -> np.ndarray:
        return normalised(distmat[rows].cpu(), greatest[rows, None]).numpy()

    return Neighbourhood(len(query), nearest.numpy(), of_pairs, of_queries)


@dataclass(frozen=True)
class _FusedPairs:
    """The fused distances of listed pairs of images, of unit-length vectors."""

    model: nn.Module
    images: Together
    features: Float[Tensor, "images dim"]
    row_threshold: float
    options: RankingOptions
    feature_distances: FeatureDistances

    def both_orders(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Returns pairs as numbers i·N + j, both orders of each, ascending; and their distances."""
        images = len(self.features)
        codes = torch.cat([rows * images + columns, columns * images + rows]).unique()
        i, j = codes // images, codes % images
        one_way = self._attention(i, j)
        mean = (one_way + one_way[torch.searchsorted(codes, j * images + i)]) / 2
        by_features = _listed(self.features, self.feature_distances, i.numpy(), j.numpy())
        return codes, by_features + self.options.attention_weight * mean

    def _attention(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns the attention distances of pairs sorted by row, which is the first image."""
        images, found = len(self.features), self.features.new_empty(len(rows))
        for start in range(0, images, QUERIES):
            stop = min(start + QUERIES, images)
            first, last = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
            if first == last:
                continue
            pairs = Pairs(self.model, self.images[start:stop], self.images, self.options.compute)
            with pairs.working():
                i, j = (rows - start)[first:last].to(pairs.device), columns[first:last]
                own = compare(
                    pairs, i, j.to(pairs.device), row_threshold=self.row_threshold, unit=True,
                    desc="Re-ranking",
                )  # fmt: skip
                i, j, _, values = (each.cpu() for each in pairs.join(*own))
            found[first:last] = values[(i * images + j).argsort()].to(found.dtype)
        return found


class _Near(NamedTuple):
    """Each image's nearest, the furthest, and how far that is, by features."""

    nearest: Int64[np.ndarray, "images nearest"]
    furthest: Int64[Tensor, " images"]
    greatest: Float[Tensor, " images"]


def _features(query: Encodings, gallery: Encodings) -> Float[Tensor, "images dim"]:
    """Returns the features of all images."""
    return torch.cat([part.features_of(slice(0, len(part))).cpu() for part in (query, gallery)])


def _near(features: Float[Tensor, "images dim"], distances: FeatureDistances, number: int) -> _Near:
    """Searches all images for all images, block by block."""
    step, number = max(1, BLOCK // len(features)), min(number, len(features))
    nearest, furthest, greatest = [], [], []
    for some in features.split(step):
        block = distances(some, features).abs()
        nearest.append(block.topk(number, 1, largest=False).indices)
        values, columns = block.max(1)
        furthest.append(columns)
        greatest.append(values)
    return _Near(torch.cat(nearest).numpy(), torch.cat(furthest), torch.cat(greatest))


def _listed(
    features: Float[Tensor, "images dim"],
    distances: FeatureDistances,
    rows: np.ndarray,
    columns: np.ndarray,
) -> Float[Tensor, " pairs"]:
    """Returns the distances of listed pairs, sorted by row."""
    cuts = np.searchsorted(rows, np.arange(len(features) + 1)).tolist()
    found = [
        distances(features[row : row + 1], features[columns[start:stop]])[0]
        for row, (start, stop) in enumerate(pairwise(cuts))
        if start < stop
    ]
    return torch.cat(found).abs() if found else features.new_empty(0)
