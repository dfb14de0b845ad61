"""Listed pairs: each query's nearest gallery images by features, and the distances of a list."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from casn_plugin.attention import attention_distance
from casn_plugin.doors import check_finite
from casn_plugin.ranking.pairs import Pairs


class Compared(NamedTuple):
    """Listed pairs and their distances.

    Attributes:
        rows: their queries.
        columns: their gallery images.
        features: distances of their features.
        attention: attention distances.
    """

    rows: Int[Tensor, " pairs"]
    columns: Int[Tensor, " pairs"]
    features: Float[Tensor, " pairs"]
    attention: Float[Tensor, " pairs"]

    @classmethod
    def cat(cls, *parts: "Compared") -> "Compared":
        """Returns several lists of pairs, at least one, as one."""
        return cls(*(torch.cat(each) for each in zip(*parts, strict=True)))


def compare(
    pairs: Pairs,
    rows: Int[Tensor, " pairs"],
    columns: Int[Tensor, " pairs"],
    *,
    row_threshold: float,
    unit: bool,
    desc: str | None = None,
) -> Compared:
    """Returns the distances of listed pairs: of those that are of this process's share.

    Args:
        pairs: where they are from.
        rows: their queries.
        columns: their gallery images.
        row_threshold: t, the share of a map's maximum above which a row counts as attended.
        unit: features and aligned profiles are of unit length.
        desc: what a progress bar says.

    Example:
        >>> from casn_plugin import Encoding
        >>> model = torch.nn.Module()
        >>> model.pair_classifier = torch.nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> rows, columns = torch.tensor([0, 2]), torch.tensor([0, 1])
        >>> compare(Pairs(model, images, images), rows, columns, row_threshold=0.2, unit=True)[2][0]
        tensor(0.)
    """
    nothing = torch.empty(0, device=rows.device)
    found = [Compared(rows[:0], columns[:0], nothing, nothing)]
    for some in pairs.listed(rows, columns, unit=unit, desc=desc):
        attention = attention_distance(
            some.first, some.second, row_threshold=row_threshold, unit=unit
        )
        check_finite("attention distances", attention)
        found.append(Compared(some.rows, some.columns, some.features, attention))
    return Compared.cat(*found)


def nearest(
    pairs: Pairs, topk: int, *, unit: bool
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Returns the pairs of each query with its topk nearest gallery images by features.

    Of images at one distance those that come first, unless FAISS has found them.

    Args:
        pairs: of which queries and which gallery.
        topk: how many, at most as many as the gallery has.
        unit: compare features of unit length.

    Returns:
        Queries, and as many gallery images; those of a query stand together.

    Example:
        >>> from casn_plugin import Encoding
        >>> model = torch.nn.Module()
        >>> model.pair_classifier = torch.nn.Linear(4, 2)
        >>> images = Encoding(torch.rand(3, 4), basis=torch.rand(3, 4, 6, 2))
        >>> nearest(Pairs(model, images, images), 1, unit=False)
        (tensor([0, 1, 2]), tensor([0, 1, 2]))
    """
    queries, galleries = pairs.shape
    topk, device = min(topk, galleries), pairs.device
    rows = torch.arange(queries, device=device)[:, None].expand(-1, topk).flatten()
    features = pairs.features(unit=unit)
    found = None if features is None else _nearest_by_faiss(*features, topk)
    if found is not None:
        return rows, found.flatten()
    distances = torch.full((queries, topk), torch.inf, dtype=torch.float64, device=device)
    columns = torch.full((queries, topk), -1, device=device)
    for some, block, new in pairs.feature_distances(unit=unit):
        numbers = torch.arange(block.start, block.stop, device=device).expand(len(new), -1)
        distances[some], columns[some] = _least(
            torch.cat([distances[some], new], 1), torch.cat([columns[some], numbers], 1), topk
        )
    distances, columns = pairs.join(distances, columns, dim=1)
    return rows, _least(distances, columns, topk)[1].flatten()


def _least(distances: Tensor, columns: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Returns the topk least distances of each row and their columns; the first where they tie."""
    distances, order = distances.sort(dim=1, stable=True)
    return distances[:, :topk], columns.gather(1, order[:, :topk])


def _nearest_by_faiss(qf: Tensor, gf: Tensor, topk: int) -> Tensor | None:
    """Returns the nearest rows of gf of each row of qf by FAISS; None where it cannot be used."""
    if qf.device.type != "cpu" or qf.dtype != torch.float32:
        return None
    try:
        import faiss
    except ImportError:
        return None
    _, nearest = faiss.knn(qf.contiguous().numpy(), gf.contiguous().numpy(), topk)
    return torch.from_numpy(nearest)
